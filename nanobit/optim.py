"""
Parameter groups, the optimizer, and the schedules of learning rate and weight decay as pure functions of the
step.

`step` counts updates already made: lr(cfg, 0) is the rate of the first one. Nothing of a schedule is saved,
so a resumed run cannot disagree with an unbroken one.
"""

import math

import torch

from config import RATIOS
from nanobit import distributed
from quant import whole


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


NS_STEPS, NS_COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)


def orthogonalize(g, dtype):
    """the matrices g (..., m, n) with their singular values moved towards 1: between about 0.7 and 1.2, by a
    quintic Newton-Schulz iteration in this dtype. Each by itself, whatever stands before its two
    dimensions (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024)."""
    a, b, c = NS_COEFFICIENTS
    tall = g.shape[-2] > g.shape[-1]
    x = g.to(dtype).mT if tall else g.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """momentum, orthogonalized, for matrices (m, n) and stacks of them (E, m, n), each matrix of which is one
    of its own. The update has the RMS of AdamW's, 0.2 lr (arXiv 2502.16982, equation 4), so that both take
    the same learning rate; decay is decoupled. dtype: of the iteration.

    torch.optim.Muon does the same for single matrices, one after another; here those of one shape are one
    batch. As in fused AdamW, a step changes nothing where `found_inf` is set to a tensor of 1.
    """

    def __init__(self, params, lr, momentum, dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.dtype, self.found_inf = dtype, None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}  # a stack is a batch already
            for p in group["params"]:
                is_single = (
                    p.dim() == 2 and distributed.local(p) is p
                )  # a sharded one is put together by itself
                batches.setdefault(p.shape if is_single else p, []).append(p)
            for batch in batches.values():
                self.update(batch, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})

    def update(self, batch, lr, momentum, weight_decay):
        """one step of parameters of one shape"""
        found_inf = torch.zeros((), device=batch[0].device) if self.found_inf is None else self.found_inf
        skip, directions = found_inf != 0, []
        for p in batch:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            mean = self.state[p]["momentum_buffer"]
            old, grad = distributed.local(mean), distributed.local(p.grad)
            old.copy_(torch.where(skip, old, old.lerp(grad, 1 - momentum)))
            directions.append(whole(p.grad.lerp(mean, momentum)))  # Nesterov's
        updates = orthogonalize(torch.stack(directions), self.dtype)
        rate = 0.2 * lr * math.sqrt(max(batch[0].shape[-2:]))
        for p, update in zip(batch, updates):
            old, update = (
                distributed.local(p),
                distributed.local(distributed.as_sharded(update.to(p.dtype), p)),
            )
            old.copy_(torch.where(skip, old, old * (1 - lr * weight_decay) - rate * update))


def make_optimizers(cfg, model, dtype=torch.float32):
    """[fused AdamW] (arXiv 1711.05101), or [Muon, AdamW], over two kinds of parameters: the matrices inside
    the blocks, which decay and which Muon takes, and the rest (embedding, head, norms, routers), which does
    not. Decay of latent weights keeps codes flipping; the others have none. dtype: what Muon computes in."""
    named = list(model.named_parameters())  # a tied matrix is named once
    matrices = [p for name, p in named if name.endswith("_proj.weight")]
    rest = [p for name, p in named if not name.endswith("_proj.weight")]
    decays, stays = dict(params=matrices, decays=True), dict(params=rest, decays=False, weight_decay=0.0)

    def adamw(groups):
        betas = cfg.beta1, cfg.beta2
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_eps, fused=True)

    if cfg.optimizer == "muon":
        optimizers = [Muon([decays], cfg.learning_rate, cfg.muon_momentum, dtype), adamw([stays])]
    else:
        optimizers = [adamw([decays, stays])]
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in named), "each parameter is in one group, and in one only"
    return optimizers


def set_rates(optimizers, cfg, step):
    """give the groups the rates of `step`; returns (lr, weight decay)"""
    rate, decay = lr(cfg, step), weight_decay(cfg, step)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
        # a loaded state brings its own of these
        if "betas" in group:
            group["betas"], group["eps"] = (cfg.beta1, cfg.beta2), cfg.adam_eps
        else:
            group["momentum"] = cfg.muon_momentum
    return rate, decay
