"""
The schedules of learning rate and weight decay as pure functions of the step.

`step` counts updates already made: lr(cfg, 0) is the rate of the first one. Nothing of a schedule is saved,
so a resumed run cannot disagree with an unbroken one.
"""

import math

from config import RATIOS


def boundary(cfg):
    """the step at which stage 2 begins (the state after that many updates is the last of stage 1); max_steps
    where the schedule has one stage"""
    return (
        round(cfg.stage_boundary * cfg.max_steps)
        if cfg.schedule in ("two_stage", "bitnet")
        else cfg.max_steps
    )


def stage(cfg, step):
    """1 or 2: the stage of the update made at `step`"""
    return 2 if step >= boundary(cfg) and boundary(cfg) < cfg.max_steps else 1


def boundary_steps(cfg):
    """the steps of the last update of stage 1 and of the first of stage 2, whose checkpoints (of the state
    before them) are kept; none where there is one stage"""
    return {boundary(cfg) - 1, boundary(cfg)} if 0 < boundary(cfg) < cfg.max_steps else set()


def line(x, x0, x1, y0, y1):
    """the straight line from (x0, y0) to (x1, y1) at x"""
    return y1 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def final_rates(cfg):
    """Return the learning rates at the end of stage 1 and at the end of the run, as fractions of
    learning_rate. A run from before they were fractions may hold a number that no fraction gives to the last
    bit: resume.keep_rates gives it to cfg under its former name."""
    return [getattr(cfg, former, cfg.learning_rate * getattr(cfg, ratio)) for former, ratio in RATIOS.items()]


def lr(cfg, step):
    """learning rate of the update made at `step`; warm-up is (step + 1) / warmup_steps, never zero.

    With S and E, the rates of final_rates:
    two_stage   to S at the boundary, then to E at max_steps: continuous
    bitnet      E + (P - E) (1 - step / max_steps), where P is learning_rate before the boundary and S after
                it: two lines and a drop (figure 1 of "The Era of 1-bit LLMs: Training Tips, Code and FAQ")
    wsd         constant, then to E over the last decay_fraction (arXiv 2404.06395, section 4)
    cosine, linear, constant   as named, from the end of the warm-up to max_steps
    """
    peak, warm, end = cfg.learning_rate, cfg.warmup_steps, cfg.max_steps
    second, low = final_rates(cfg)
    if step < warm:
        return peak * (step + 1) / warm
    if cfg.schedule == "two_stage":
        middle = boundary(cfg)
        if step < middle:
            return line(step, warm, middle, peak, second)
        return line(step, max(warm, middle), end, second, low)
    if cfg.schedule == "bitnet":
        return line(step, 0, end, peak if step < boundary(cfg) else second, low)
    if cfg.schedule == "wsd":
        start = max(warm, end - round(cfg.decay_fraction * end))
        return peak if step < start else line(step, start, end, peak, low)
    if cfg.schedule == "cosine":
        progress = line(step, warm, end, 0.0, 1.0)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "linear":
        return line(step, warm, end, peak, low)
    return peak


def weight_decay(cfg, step):
    """weight decay of the update made at `step`: stage2_weight_decay in stage 2"""
    return cfg.stage2_weight_decay if stage(cfg, step) == 2 else cfg.weight_decay
