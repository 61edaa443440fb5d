"""The feed-forward network as a mixture of experts, like Mixtral's, and the losses of its router."""

import torch
import torch.nn.functional as F
from torch import nn

from quant import BitLinear, TernaryLinear, output_dtype


class Experts(nn.Module):
    """n_expert SwiGLU networks, of which each token uses n_expert_active (Mixtral, arXiv 2401.04088, 2.1). A
    router gives each expert a probability, by which the outputs of the most probable ones are weighted,
    divided by their sum if they are several. No token is dropped, so none depends on another token."""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.n_active = cfg.n_expert_active
        self.n_expert = cfg.n_expert
        self.ternary = cfg.ternary
        Stack = BitExperts if cfg.ternary else FloatExperts
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=False)
        self.gate_proj = Stack(cfg.n_expert, cfg.n_embd, cfg.ffn_dim)
        self.up_proj = Stack(cfg.n_expert, cfg.n_embd, cfg.ffn_dim)
        self.down_proj = Stack(cfg.n_expert, cfg.ffn_dim, cfg.n_embd)
        # compiled, each batch would be another program; bound, a copy would run the original's layers
        self.run_eagerly = torch.compiler.disable(Experts.loop)

    def forward(self, x):
        """Return (y, router) for x (B, T, C): y like x, router (3 + E,) as ROUTER describes."""
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        k = self.n_active
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.float(), self.router.weight)  # (N, E), fp32
        probs = logits.softmax(-1)
        weights, chosen = probs.topk(k, -1)  # (N, k)
        if k > 1:  # a single weight divided by itself would leave the router without a gradient
            weights = weights / weights.sum(-1, keepdim=True)

        # each token k times, sorted by expert; both ways by permutation, so no sum depends on an order
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        sizes = (experts[:, None] == torch.arange(self.n_expert, device=x.device)).sum(0)  # (E,)
        y = rows[:, None].expand(-1, k, -1).reshape(len(experts), -1)[order]
        if not self.ternary and grouped_mm_pays(x, self.down_proj.weight):
            y = self.swiglu(y, sizes.cumsum(0).int())
        else:
            y = self.run_eagerly(self, y, sizes)
        y = (y[order.argsort()].view(-1, k, x.shape[-1]).float() * weights[..., None]).sum(1)

        load = sizes / len(experts)
        balance = self.n_expert * (load * probs.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        entropy = -(probs * logits.log_softmax(-1)).sum(-1).mean()
        return y.to(x.dtype).view_as(x), torch.cat([torch.stack([balance, z, entropy.detach()]), load])

    def swiglu(self, x, sizes):
        return self.down_proj(F.silu(self.gate_proj(x, sizes)) * self.up_proj(x, sizes), sizes)

    def loop(self, x, sizes):
        return self.swiglu(x, sizes.tolist())


# The first numbers that a router reports; the load of each expert follows (E,), its fraction of the tokens.
# balance  E sum_e(load_e * mean probability_e), 1 if even, over a micro-batch (arXiv 2101.03961, equation 4)
# z        mean square of the log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, equation 5)
# entropy  of the probabilities, in nats per token: ln(E) if all are equal
ROUTER = ("balance", "z", "entropy")


def router_loss(cfg, router):
    """Return what the routers add to the loss: a scalar, 0 if router, from Transformer.forward, is None."""
    if router is None:
        return 0.0
    return cfg.router_balance * router[:, 0].mean() + cfg.router_z * router[:, 1].mean()


class FloatExperts(nn.Module):
    """One float matrix per expert: nn.Linear for rows sorted by expert."""

    def __init__(self, n_expert, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))

    def forward(self, x, sizes):
        """Return y (N, out) for x (N, in). sizes lists the rows of each expert; as a tensor, int32, it holds
        the ends of their rows, and one grouped product computes all experts."""
        if torch.is_tensor(sizes):  # grouped_mm ignores autocast: both operands are cast by hand
            return F.grouped_mm(x.bfloat16(), self.weight.bfloat16().transpose(-2, -1), offs=sizes)
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), self.weight.unbind())])


class BitExperts(FloatExperts):
    """FloatExperts whose products are ternary, as BitLinear's; each matrix has its own scale."""

    def __init__(self, n_expert, in_features, out_features):
        super().__init__(n_expert, in_features, out_features)
        self.register_buffer("kept_codes", None, persistent=False)  # (E, out, in): see kept_codes.py
        self.register_buffer("kept_scale", None, persistent=False)
        self.register_buffer("kept_floats", None, persistent=False)

    def forward(self, x, sizes):
        codes = scales = floats = [None] * len(sizes)
        if self.kept_codes is not None:
            codes, scales = self.kept_codes.unbind(), self.kept_scale.unbind()
        if self.kept_floats is not None:
            floats = self.kept_floats.unbind()
        parts = zip(x.split(sizes), self.weight.unbind(), codes, scales, floats)
        return torch.cat([TernaryLinear.apply(*part, output_dtype(x)) for part in parts])


def grouped_mm_pays(x, weight):
    """Return whether one product for all experts is correct and faster: in bfloat16 on Hopper. Other devices
    loop inside it, or give wrong gradients to experts without tokens (PyTorch issues 186620, 172439)."""
    is_eligible = x.is_cuda and output_dtype(x) == torch.bfloat16 and not any(n % 8 for n in weight.shape[1:])
    # an MI300 of AMD reports 9.4
    return is_eligible and torch.cuda.get_device_capability(x.device)[0] == 9 and not torch.version.hip


def bit_layers(model):
    """Return {name: BitLinear or BitExperts} of a model, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (BitLinear, BitExperts))}
