"""The optimizers of a run, fused AdamW or Muon for the matrices of the blocks, and one update with them."""

import math

import torch

from nanobit import distributed, schedule

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalize(g, dtype):
    """Return the matrices g (..., m, n) with their singular values moved towards 1: between about 0.7 and
    1.2, by a quintic Newton-Schulz iteration in this dtype. Each matrix is treated by itself (Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024)."""
    a, b, c = NS_COEFFICIENTS
    is_tall = g.shape[-2] > g.shape[-1]
    x = g.to(dtype).mT if is_tall else g.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices (m, n) and for stacks of them (E, m, n), each matrix by itself.

    The update has the RMS of AdamW's, 0.2 lr (arXiv 2502.16982, equation 4), so that both take the same
    learning rate; decay is decoupled. dtype: that of the iteration. torch.optim.Muon does the same for single
    matrices, one after another; here those of one shape are one batch. As in fused AdamW, a step changes
    nothing if `found_inf` is set to a tensor of 1."""

    def __init__(self, params, lr, momentum, dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.dtype = dtype
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape, others = {}, []
            for p in group["params"]:
                if p.dim() == 2 and distributed.local(p) is p:
                    by_shape.setdefault(p.shape, []).append(p)
                else:  # a stack is a batch already; a sharded matrix is put together by itself
                    others.append([p])
            for batch in (*by_shape.values(), *others):
                self.update(batch, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, batch, lr, momentum, weight_decay):
        """Update parameters of one shape."""
        skip = torch.zeros((), dtype=torch.bool, device=batch[0].device)
        if self.found_inf is not None:
            skip = self.found_inf != 0
        directions = []
        for p in batch:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            mean = self.state[p]["momentum_buffer"]
            own = distributed.local(mean)
            own.copy_(torch.where(skip, own, own.lerp(distributed.local(p.grad), 1 - momentum)))
            directions.append(distributed.whole(p.grad.lerp(mean, momentum)))  # Nesterov's
        updates = orthogonalize(torch.stack(directions), self.dtype)
        rate = 0.2 * lr * math.sqrt(max(batch[0].shape[-2:]))
        for p, update in zip(batch, updates):
            own = distributed.local(p)
            own_update = distributed.local(distributed.as_sharded(update.to(p.dtype), p))
            own.copy_(torch.where(skip, own, own * (1 - lr * weight_decay) - rate * own_update))


def make_optimizers(cfg, model, dtype=torch.float32):
    """Return [fused AdamW] (arXiv 1711.05101) or [Muon, AdamW] over two kinds of parameters.

    The matrices inside the blocks decay, which keeps the codes of ternary weights flipping, and Muon takes
    them. The rest (embedding, head, norms, routers) does not decay. dtype: what Muon computes in."""
    named = list(model.named_parameters())  # a tied matrix is named once
    matrices = [p for name, p in named if name.endswith("_proj.weight")]
    rest = [p for name, p in named if not name.endswith("_proj.weight")]
    decaying = dict(params=matrices, decays=True)
    constant = dict(params=rest, decays=False, weight_decay=0.0)

    def adamw(groups):
        betas = (cfg.beta1, cfg.beta2)
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_eps, fused=True)

    if cfg.optimizer == "muon":
        optimizers = [Muon([decaying], cfg.learning_rate, cfg.muon_momentum, dtype), adamw([constant])]
    else:
        optimizers = [adamw([decaying, constant])]
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in named), "each parameter is in one group, and in one only"
    return optimizers


def set_rates(optimizers, cfg, step):
    """Give the parameter groups the rates of `step`. Return (learning rate, weight decay)."""
    rate = schedule.lr(cfg, step)
    decay = schedule.weight_decay(cfg, step)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
        if group["decays"]:
            group["weight_decay"] = decay
    return rate, decay


def update(model, optimizers, scaler, grad_clip, loss_sum):
    """Unscale and clip the gradients, make one step, and clear them. loss_sum: this rank's, on return that of
    all ranks.

    If the loss or a gradient is not finite on any rank, nothing changes. Return (norm of the gradient, 1.0
    if the step was skipped for that reason, else 0.0), both 0-dim on the device: nothing waits for it."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = distributed.whole(norm)
    has_loss = distributed.total(loss_sum).isfinite()
    skipped = (~(has_loss & norm.isfinite())).float()
    for optimizer in optimizers:
        optimizer.found_inf = skipped  # fused optimizers change nothing if it is 1
        optimizer.step()
        optimizer.zero_grad()
    torch.autograd.graph.increment_version(list(model.parameters()))  # fused AdamW does not, see version_of
    if scaler.is_enabled():
        # gradients that overflow are how the scaler finds its scale; get_scale() would wait for the device
        is_small = scaler.scale(torch.ones((), device=loss_sum.device)) < 1
        skipped = skipped * (is_small | ~has_loss)
        scaler.update()
    return norm, skipped


class SkipCounter:
    """Skipped steps, counted on the device: all of them, those in a row until now, and the longest row since
    the counter was read. A resumed run begins a new row."""

    def __init__(self, total, device):
        self.counts = torch.tensor([total, 0, 0], dtype=torch.float32, device=device)

    def add(self, skipped):
        """Count a step; skipped: 1.0 or 0.0 on the device."""
        self.counts[0] += skipped
        self.counts[1] = (self.counts[1] + 1) * skipped
        self.counts[2] = torch.maximum(self.counts[2], self.counts[1])

    def total(self):
        """Return the number of skipped steps; waits for the device."""
        return int(self.counts[0])

    def reset_row(self):
        """Forget the longest row, except the one that lasts."""
        self.counts[2] = self.counts[1]
