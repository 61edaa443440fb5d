"""The schedules of a run as pure functions of the step: rates, stages, and what is due.

`step` counts updates already made: lr(cfg, 0) is the rate of the first one. Nothing of a schedule is saved,
so a resumed run cannot disagree with an unbroken one."""

import math

from config import RATIOS


def boundary(cfg):
    """Return the step at which stage 2 begins: the state after that many updates is the last of stage 1. It
    is max_steps if the schedule has one stage."""
    has_two = cfg.schedule in ("two_stage", "bitnet")
    return round(cfg.stage_boundary * cfg.max_steps) if has_two else cfg.max_steps


def stage(cfg, step):
    """Return the stage, 1 or 2, of the update made at `step`."""
    return 2 if boundary(cfg) <= step and boundary(cfg) < cfg.max_steps else 1


def boundary_steps(cfg):
    """Return the steps of the last update of stage 1 and of the first of stage 2, whose checkpoints (of the
    state before them) are kept; none if there is one stage."""
    return {boundary(cfg) - 1, boundary(cfg)} if 0 < boundary(cfg) < cfg.max_steps else set()


def lerp(start, end, step, first, last):
    """Return the straight line from `start` at step `first` to `end` at step `last`."""
    return end if last <= first else start + (end - start) * (step - first) / (last - first)


def final_rates(cfg):
    """Return the learning rates at the end of stage 1 and at the end of the run.

    A run from before they were fractions of learning_rate may hold a number that no fraction gives to the
    last bit: resume.keep_rates gives it to cfg under its former name."""
    return [getattr(cfg, former, cfg.learning_rate * getattr(cfg, ratio)) for former, ratio in RATIOS.items()]


def lr(cfg, step):
    """Return the learning rate of the update made at `step`. The warm-up is (step + 1) / warmup_steps, never
    zero.

    With P = learning_rate and S and E, the rates of final_rates:
    two_stage   to S at the boundary, then to E at max_steps: continuous
    bitnet      E + (P - E) (1 - step / max_steps), with S in place of P after the boundary: two lines and a
                drop (figure 1 of "The Era of 1-bit LLMs: Training Tips, Code and FAQ")
    wsd         constant, then to E over the last decay_fraction (arXiv 2404.06395, section 4)
    cosine, linear, constant   as named, from the end of the warm-up to max_steps
    """
    peak = cfg.learning_rate
    warmup = cfg.warmup_steps
    end = cfg.max_steps
    middle = boundary(cfg)
    stage2_rate, final_rate = final_rates(cfg)
    if step < warmup:
        return peak * (step + 1) / warmup
    if cfg.schedule == "two_stage" and step < middle:
        return lerp(peak, stage2_rate, step, warmup, middle)
    if cfg.schedule == "two_stage":
        return lerp(stage2_rate, final_rate, step, max(warmup, middle), end)
    if cfg.schedule == "bitnet":
        return lerp(peak if step < middle else stage2_rate, final_rate, step, 0, end)
    if cfg.schedule == "wsd":
        decay_start = max(warmup, end - round(cfg.decay_fraction * end))
        return peak if step < decay_start else lerp(peak, final_rate, step, decay_start, end)
    if cfg.schedule == "cosine":
        progress = lerp(0.0, 1.0, step, warmup, end)
        return final_rate + (peak - final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "linear":
        return lerp(peak, final_rate, step, warmup, end)
    return peak


def weight_decay(cfg, step):
    """Return the weight decay of the update made at `step`: stage2_weight_decay in stage 2."""
    return cfg.stage2_weight_decay if stage(cfg, step) == 2 else cfg.weight_decay


def due(task, cfg, step, forced=False):
    """Return whether "save", "eval" or "sample" is due at a step; forced: at any step, unless it is off. The
    untrained weights are evaluated, but neither saved nor sampled."""
    every = getattr(cfg, f"{task}_every")
    if task == "save" and step > 0 and (step in boundary_steps(cfg) or step == cfg.max_steps):
        return True
    return every > 0 and (bool(forced) or (step % every == 0 and (step > 0 or task == "eval")))


def ending(cfg, step, seconds):
    """Return what ends the run at a step, so many seconds after it began: a setting's name, or ''."""
    if step >= cfg.max_steps:
        return "max_steps"
    if cfg.max_minutes and seconds > 60 * cfg.max_minutes:
        return "max_minutes"
    return ""
