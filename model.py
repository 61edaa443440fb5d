"""
The transformer: a plain Llama block, so that stock engines can run what is trained here.

Pre-norm RMSNorm, rotary positions that rotate halves, grouped-query attention, SwiGLU, no biases, and a head
that may share the embedding's matrix. With cfg.ternary every linear layer of attention and FFN is a BitLinear
(quant.py); embedding, head, norms and routers stay in full precision. Without it the same shape is an
ordinary float model: the twin. With cfg.n_expert the feed-forward network of every block is a mixture of
experts, as Mixtral's.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H, V = vocab_size, E = n_expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanobit import distributed
from quant import BitExperts, BitLinear, bit_layers, output_dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (arXiv 1910.07467). Written out in the order of the Llama code in
    transformers, whose forward of an export is to equal ours bit for bit."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):  # (..., C)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_tables(seq_len, head_dim, theta):
    """cos, sin (T, D) of the rotary angles: position times theta^(-2i/D), each half of D the same (arXiv
    2104.09864)"""
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """rotary positions for x (B, H, T, D) with cos, sin (T, D)"""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, Linear):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.n_embd // cfg.n_head
        self.dropout = cfg.dropout
        self.q_proj = Linear(cfg.n_embd, cfg.n_head * self.head_dim, bias=False)
        self.k_proj = Linear(cfg.n_embd, cfg.n_kv_head * self.head_dim, bias=False)
        self.v_proj = Linear(cfg.n_embd, cfg.n_kv_head * self.head_dim, bias=False)
        self.o_proj = Linear(cfg.n_head * self.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_head != self.n_kv_head,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202), and None, where Experts tell of their router"""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.up_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.down_proj = Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


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


def router_health(router):
    """{"total": row, "layers": [row of each block]} of routers (L, 3 + E), averaged over batches: a row has
    balance, z, entropy, load_max (of the busiest expert over the mean) and dead (experts without a token),
    that of a block the load of each expert too, as a share of the tokens"""

    def row(values, loads):
        most, dead = loads.max() * loads.shape[-1], (loads == 0).sum()
        named = zip((*ROUTER, "load_max"), (*values.tolist(), most.item()))
        return {name: float(f"{value:.6g}") for name, value in named} | {"dead": int(dead)}

    router = router.float().cpu()
    values, loads = router[:, : len(ROUTER)], router[:, len(ROUTER) :]
    shares = [{"load": [float(f"{share:.4g}") for share in load]} for load in loads.tolist()]
    layers = [row(*each) | share for *each, share in zip(values, loads, shares)]
    return {"total": row(values.mean(0), loads), "layers": layers}


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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to x.

    PackedBlock (packed.py) repeats this forward, with all that it calls, for one token of a ternary model.
    What you change here is used everywhere all the same: if PackedBlock then gives other logits when a model
    is loaded, it is not used, which a line on stderr says. Generating text is slower then, until you change
    it too. Other engines cannot know of a change either: export with --verify.
    """

    def __init__(self, cfg, Linear):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg, Linear)
        self.ffn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.ffn = (Experts if cfg.n_expert else FeedForward)(cfg, Linear)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, cos, sin, cache=None):
        """(x, router): what the router of a mixture of experts did, None elsewhere"""
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache))
        y, router = self.ffn(self.ffn_norm(x))
        return x + self.dropout(y), router


class Transformer(nn.Module):
    """cfg needs vocab_size, seq_len and the settings of the model (config/default.py says what each is)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        Linear = BitLinear if cfg.ternary else nn.Linear
        rows = -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
        self.embed = nn.Embedding(rows, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, Linear) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, rows, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_positions()
        self.init_weights()

    def init_positions(self):
        """Compute the tables cos, sin (seq_len, D) of the rotary angles, which no checkpoint holds."""
        cfg = self.cfg
        cos, sin = rope_tables(cfg.seq_len, cfg.n_embd // cfg.n_head, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self):
        """normal: std 0.02 for embedding, head and routers; 1 / sqrt(inputs) for the matrices of the blocks,
        so that at every width they keep the size of what goes through them, and 1 / sqrt(2 n_layer) of that
        for those that write into the residual stream. The first loss is then near ln(V)."""
        for name, p in self.named_parameters():
            if name.endswith("_proj.weight"):  # (out, in) or, of experts, (E, out, in)
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p.shape[-1] * (2 * self.cfg.n_layer if into_residual else 1)) ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, cache=None):
        """logits (B, T, V) in fp32 of idx (B, T). With targets (B, T), (loss, router) instead: the mean cross
        entropy in nats, and what the routers did (L, 3 + E), see ROUTER, or None without experts. With a
        cache, idx continues what the cache holds and only the last position's logits (B, 1, V) are made."""
        at = slice(idx.shape[1]) if cache is None else cache.at(idx.shape[1])
        cos, sin = self.cos[at], self.sin[at]
        x, routers = self.dropout(self.embed(idx)), []  # (B, T, C)
        for block in self.blocks:
            x, router = block(x, cos, sin, cache)
            routers.append(router)
        if cache is not None:
            cache.length += idx.shape[1]
            x = x[:, -1:]
        x = self.norm(x).to(self.head.weight.dtype)  # see lighten_head
        logits = self.head(x)[..., : self.cfg.vocab_size].float()  # without the rows of padding
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        return loss, torch.stack(routers) if self.cfg.n_expert else None

    def counts(self):
        """unique parameters: total, active per token, ternary, full_precision (a tied matrix counts once)"""
        total = sum(p.numel() for p in self.parameters())
        ternary = sum(layer.weight.numel() for layer in bit_layers(self).values())
        idle = 0
        if self.cfg.n_expert:
            experts = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 3)
            idle = experts // self.cfg.n_expert * (self.cfg.n_expert - self.cfg.n_expert_active)
        return dict(total=total, active=total - idle, ternary=ternary, full_precision=total - ternary)

    def flops_per_token(self):
        """model FLOPs of forward and backward: 6 for each weight that is multiplied plus 12 L C T for
        attention (PaLM, arXiv 2204.02311, appendix B); an untied embedding is only looked up."""
        cfg = self.cfg
        looked_up = 0 if cfg.tie_embeddings else self.embed.weight.numel()
        return 6 * (self.counts()["active"] - looked_up) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


@torch.no_grad()
def mean_loss(model, batches, stop=lambda: False):
    """mean cross entropy in nats per token over batches of (inputs, targets), the same on every rank, which
    share the work; summed in float64. None where stop() turned true on the way."""
    was_training, losses, sizes, mine = model.training, [], [], None
    model.eval()
    for i, batch in enumerate(batches):
        sizes.append(batch[1].numel())
        if (
            i % distributed.WORLD == distributed.RANK or mine is None
        ):  # a sharded model computes on all ranks or none
            mine = batch
        if i % distributed.WORLD == distributed.WORLD - 1:
            losses.append(model(*mine)[0])
            mine = None
            if stop():
                break
    if mine is not None:
        losses.append(model(*mine)[0])
    model.train(was_training)
    if stop():
        return None
    table = torch.zeros(len(sizes), dtype=torch.float64)
    mine = table[distributed.RANK :: distributed.WORLD]
    mine[:] = torch.stack(losses).cpu().double()[: len(mine)]
    sizes = torch.tensor(sizes, dtype=torch.float64)
    return (distributed.total(table) @ sizes / sizes.sum()).item()
