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

from nanobit.experts import Experts
from quant import BitLinear, bit_layers


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
