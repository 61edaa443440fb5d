"""
Parameter groups, the optimizer, and the schedules of learning rate and weight decay as pure functions of the
step.

`step` counts updates already made: lr(cfg, 0) is the rate of the first one. Nothing of a schedule is saved,
so a resumed run cannot disagree with an unbroken one.
"""

import math

import torch


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
    """the last step of stage 1 and the first of stage 2, whose checkpoints are kept; none where there is one
    stage"""
    return {boundary(cfg) - 1, boundary(cfg)} if 0 < boundary(cfg) < cfg.max_steps else set()


def line(x, x0, x1, y0, y1):
    """the straight line from (x0, y0) to (x1, y1) at x"""
    return y1 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def lr(cfg, step):
    """learning rate of the update made at `step`; warm-up is (step + 1) / warmup_steps, never zero.

    two_stage   to stage2_lr at the boundary, then to min_lr at max_steps: continuous
    bitnet      min_lr + (P - min_lr) (1 - step / max_steps), where P is learning_rate before the boundary and
                stage2_lr after it: two lines and a drop (figure 1 of "The Era of 1-bit LLMs: Training Tips,
                Code and FAQ")
    wsd         constant, then to min_lr over the last decay_fraction (arXiv 2404.06395, section 4)
    cosine, linear, constant   as named, from the end of the warm-up to max_steps
    """
    peak, warm, end = cfg.learning_rate, cfg.warmup_steps, cfg.max_steps
    if step < warm:
        return peak * (step + 1) / warm
    if cfg.schedule == "two_stage":
        middle = boundary(cfg)
        if step < middle:
            return line(step, warm, middle, peak, cfg.stage2_lr)
        return line(step, max(warm, middle), end, cfg.stage2_lr, cfg.min_lr)
    if cfg.schedule == "bitnet":
        return line(step, 0, end, peak if step < boundary(cfg) else cfg.stage2_lr, cfg.min_lr)
    if cfg.schedule == "wsd":
        start = max(warm, end - round(cfg.decay_fraction * end))
        return peak if step < start else line(step, start, end, peak, cfg.min_lr)
    if cfg.schedule == "cosine":
        progress = line(step, warm, end, 0.0, 1.0)
        return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "linear":
        return line(step, warm, end, peak, cfg.min_lr)
    return peak


def weight_decay(cfg, step):
    """weight decay of the update made at `step`: stage2_weight_decay in stage 2"""
    return cfg.stage2_weight_decay if stage(cfg, step) == 2 else cfg.weight_decay


def make_optimizer(cfg, model):
    """fused AdamW (arXiv 1711.05101) over two groups: the matrices inside the blocks, which decay, and the
    rest (embedding, head, norms), which does not. Decay of latent weights keeps codes flipping; the others
    have none."""
    named = list(model.named_parameters())  # a tied matrix is named once
    decays = [p for name, p in named if name.startswith("blocks.") and p.dim() >= 2]
    rest = [p for name, p in named if not (name.startswith("blocks.") and p.dim() >= 2)]
    groups = [dict(params=decays, decays=True), dict(params=rest, decays=False, weight_decay=0.0)]
    return torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True
    )


def set_rates(optimizer, cfg, step):
    """give the groups the rates of `step`; returns (lr, weight decay)"""
    rate, decay = lr(cfg, step), weight_decay(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
        group["betas"], group["eps"] = (cfg.beta1, cfg.beta2), cfg.adam_eps  # a loaded state brings its own
    return rate, decay
