"""The feed-forward network as a mixture of experts, as Mixtral's, and the losses of its router."""

import torch
import torch.nn.functional as F
from torch import nn

from quant import BitExperts, output_dtype


class FloatExperts(nn.Module):
    """one matrix per expert: nn.Linear for rows sorted by expert"""

    def __init__(self, n_expert, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))

    def forward(self, x, sizes):
        """y (N, out) for x (N, in): sizes lists the rows of each expert, or is the tensor of their ends,
        int32, for one grouped product"""
        if torch.is_tensor(sizes):  # knows nothing of autocast: both operands are cast by hand
            w = self.weight.bfloat16().transpose(-2, -1)
            return F.grouped_mm(x.bfloat16(), w, offs=sizes)
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), self.weight.unbind())])


def grouped_mm_pays(device, dtype, n_embd, ffn_dim):
    """whether one product for all experts is faster than a loop, and right: its kernel is for bfloat16 on
    Hopper. Elsewhere torch loops itself, with a wait for the device, and on Blackwell the gradient of an
    expert without tokens is not zero (PyTorch's issues 186620 and 172439)."""
    if device.type != "cuda" or dtype != torch.bfloat16 or n_embd % 8 or ffn_dim % 8:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


# what a router tells of a batch, before the share of the tokens that each expert got (E,), 1 / E when even:
# balance: E sum_e(load_e * mean chance_e), 1 when even, the auxiliary loss of the Switch Transformer (arXiv
#          2101.03961, equation 4), over all k choices; a product of means over the micro-batch, so that
#          another batch_size gives another loss
# z:       mean square of the log-sum-exp of its logits (ST-MoE, arXiv 2202.08906, equation 5)
# entropy: of its chances, in nats per token, ln(E) when it does not care
ROUTER = ("balance", "z", "entropy")


def router_loss(cfg, router):
    """what the routers add to the loss, for the second result of Transformer.forward; 0 without experts"""
    if router is None:
        return 0.0
    balance, z = router[:, 0].mean(), router[:, 1].mean()
    return cfg.router_balance * balance + cfg.router_z * z


class Experts(nn.Module):
    """n_expert SwiGLU networks; a router sends each token through the n_expert_active that it finds likeliest
    and adds their outputs, weighted by the chances of these, which are made to sum to 1 (Mixtral, arXiv
    2401.04088, section 2.1); with one active, by its chance, as in the Switch Transformer. No token is
    dropped, so that a token's output depends on no other token."""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.n_active, self.n_expert, self.ternary = cfg.n_expert_active, cfg.n_expert, cfg.ternary
        Stack = BitExperts if cfg.ternary else FloatExperts
        self.router = nn.Linear(cfg.n_embd, cfg.n_expert, bias=False)
        self.gate_proj = Stack(cfg.n_expert, cfg.n_embd, cfg.ffn_dim)
        self.up_proj = Stack(cfg.n_expert, cfg.n_embd, cfg.ffn_dim)
        self.down_proj = Stack(cfg.n_expert, cfg.ffn_dim, cfg.n_embd)
        # its sizes differ from batch to batch: compiled, each would be another program
        self.run_eagerly = torch.compiler.disable(Experts.loop)  # no method: a copy runs its own layers

    def forward(self, x):
        """(y, router) for x (B, T, C); router (3 + E,): see ROUTER"""
        rows, k = x.reshape(-1, x.shape[-1]), self.n_active  # (N, C)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.float(), self.router.weight)  # (N, E), fp32
        chance = logits.softmax(-1)
        weight, chosen = chance.topk(k, -1)  # (N, k)
        if k > 1:  # of one, that would leave the router without a gradient from the loss
            weight = weight / weight.sum(-1, keepdim=True)

        # each token k times, sorted by expert: permutations both ways, so that nothing is added in any order
        slots = chosen.flatten()
        order = slots.argsort(stable=True)
        sizes = (slots[:, None] == torch.arange(self.n_expert, device=x.device)).sum(0)  # (E,)
        y = rows[:, None].expand(-1, k, -1).reshape(len(slots), -1)[order]
        if not self.ternary and self.grouped_mm_pays(x):
            y = self.swiglu(y, sizes.cumsum(0).int())
        else:
            y = self.run_eagerly(self, y, sizes)
        y = (y[order.argsort()].view(-1, k, x.shape[-1]).float() * weight[..., None]).sum(1)

        load = sizes / len(slots)
        balance = self.n_expert * (load * chance.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        entropy = -(chance * logits.log_softmax(-1)).sum(-1).mean()
        return y.to(x.dtype).view_as(x), torch.cat([torch.stack([balance, z, entropy.detach()]), load])

    def grouped_mm_pays(self, x):
        return grouped_mm_pays(x.device, output_dtype(x), *self.down_proj.weight.shape[-2:])

    def swiglu(self, x, sizes):
        return self.down_proj(F.silu(self.gate_proj(x, sizes)) * self.up_proj(x, sizes), sizes)

    def loop(self, x, sizes):
        return self.swiglu(x, sizes.tolist())
