"""Parameter groups and the optimizers: fused AdamW, or Muon for the matrices of the blocks."""

import math

import torch

from nanobit import distributed, schedule
from nanobit.distributed import whole

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
    rate, decay = schedule.lr(cfg, step), schedule.weight_decay(cfg, step)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
        # a loaded state brings its own of these
        if "betas" in group:
            group["betas"], group["eps"] = (cfg.beta1, cfg.beta2), cfg.adam_eps
        else:
            group["momentum"] = cfg.muon_momentum
    return rate, decay
