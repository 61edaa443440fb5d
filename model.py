"""
The transformer: a plain Llama, so that stock engines can run what is trained here.

Pre-norm RMSNorm, rotary positions that rotate halves, grouped-query attention, SwiGLU, no biases. With
cfg.ternary every linear layer of attention and feed-forward is a BitLinear (quant.py); embedding, head, norms
and routers stay in full precision. Without it the model is a float model of the same shape, the twin. With
cfg.n_expert the feed-forward network of each block is a mixture of experts (nanobit/experts.py).

Shapes: B sequences, T tokens, C = n_embd, L = n_layer, H = n_head, K = n_kv_head, D = C / H, V = vocab_size,
E = n_expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanobit.experts import Experts, bit_layers
from quant import BitLinear


class Transformer(nn.Module):
    """The model of a cfg, which holds vocab_size, seq_len and the model's settings (config/default.py)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        Linear = BitLinear if cfg.ternary else nn.Linear
        n_rows = cfg.vocab_size + -cfg.vocab_size % cfg.vocab_multiple
        self.embed = nn.Embedding(n_rows, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, Linear) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, n_rows, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_positions()
        self.init_weights()

    def init_positions(self):
        """Compute the tables cos, sin (seq_len, D) of the rotary angles. Checkpoints do not hold them."""
        tables = rope_tables(self.cfg.seq_len, self.cfg.n_embd // self.cfg.n_head, self.cfg.rope_theta)
        for name, table in zip(("cos", "sin"), tables):
            self.register_buffer(name, table, persistent=False)

    def init_weights(self):
        """Draw the weights from normal distributions, so that the first loss is near ln(V). The std is 0.02
        for embedding, head and routers, and 1 / sqrt(inputs) for the matrices of the blocks. Those that write
        into the residual stream, two per block, get 1 / sqrt(2 n_layer) of that (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("_proj.weight"):  # (out, in), or (E, out, in) of experts
                inverse_variance = p.shape[-1]
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    inverse_variance *= 2 * self.cfg.n_layer
                nn.init.normal_(p, std=inverse_variance**-0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, divisor=None, cache=None):
        """Return logits (B, T, V) in fp32 for idx (B, T). With targets (B, T), return (loss, router) instead:
        the mean cross entropy in nats, and the numbers of the routers (n_layer, 3 + E), see experts.ROUTER,
        or None. With a divisor (0-dim), the loss is the sum over the targets that are not -100, divided by
        it. With a cache (generate.KVCache), idx continues the tokens that it holds, and the logits are those
        of the last position (B, 1, V)."""
        T = idx.shape[1]
        positions = slice(T) if cache is None else cache.positions(T)
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.dropout(self.embed(idx))  # (B, T, C)
        routers = []
        for block in self.blocks:
            x, router = block(x, cos, sin, cache)
            routers.append(router)
        if cache is not None:
            cache.length += T  # which every layer has stored
            x = x[:, -1:]
        logits = self.head(self.norm(x))[..., : self.cfg.vocab_size].float()  # without the rows of padding
        if targets is None:
            return logits
        logits = logits.reshape(-1, logits.shape[-1])
        if divisor is None:
            loss = F.cross_entropy(logits, targets.reshape(-1))
        else:
            loss = F.cross_entropy(logits, targets.reshape(-1), reduction="sum") / divisor
        return loss, torch.stack(routers) if self.cfg.n_expert else None

    def counts(self):
        """Return the numbers of parameters (total, active per token, ...); a tied matrix counts once."""
        total = sum(p.numel() for p in self.parameters())
        ternary = sum(layer.weight.numel() for layer in bit_layers(self).values())
        experts = sum(p.numel() for p in self.parameters() if p.dim() == 3)
        idle = experts // max(1, self.cfg.n_expert) * (self.cfg.n_expert - self.cfg.n_expert_active)
        return dict(total=total, active=total - idle, ternary=ternary, full_precision=total - ternary)

    def flops_per_token(self):
        """Return the FLOPs of forward and backward: 6 for each weight that is multiplied, and 12 L C T for
        attention (PaLM, arXiv 2204.02311, appendix B). An untied embedding is only looked up."""
        cfg = self.cfg
        looked_up = 0 if cfg.tie_embeddings else self.embed.weight.numel()
        return 6 * (self.counts()["active"] - looked_up) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


class Block(nn.Module):
    """Attention, then feed-forward: each reads x through a norm, and its output is added to x. PackedBlock
    (nanobit/infer/packed.py) repeats this for a single token. Both are compared when a model is loaded: if
    you change this one, the other is not used. For other engines, export with --verify."""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg, Linear)
        self.ffn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.ffn = (Experts if cfg.n_expert else FeedForward)(cfg, Linear)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, cos, sin, cache=None):
        """Return (x, router): x (B, T, C), and the numbers of the router of Experts, None without."""
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache))
        y, router = self.ffn(self.ffn_norm(x))
        return x + self.dropout(y), router


class Attention(nn.Module):
    """Causal attention softmax(q k^T / sqrt(D)) v (arXiv 1706.03762) of H query heads, in groups that share
    one of K key and value heads (GQA, arXiv 2305.13245)."""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.n_embd // cfg.n_head
        self.dropout = cfg.dropout
        self.q_proj = Linear(cfg.n_embd, cfg.n_head * self.head_dim, bias=False)
        self.k_proj = Linear(cfg.n_embd, cfg.n_kv_head * self.head_dim, bias=False)
        self.v_proj = Linear(cfg.n_embd, cfg.n_kv_head * self.head_dim, bias=False)
        self.o_proj = Linear(cfg.n_head * self.head_dim, cfg.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, D) and (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self, k, v)
        if self.n_head != self.n_kv_head and repeats_heads(q):
            k, v = (heads.repeat_interleave(self.n_head // self.n_kv_head, 1) for heads in (k, v))
        if attends_in_float32(q):
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None and T > 1,  # a single new token sees all that is stored
                enable_gqa=q.shape[1] != k.shape[1],
            )  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def repeats_heads(q):
    """Return whether keys and values are repeated for each head of their group: on CUDA, where torch sums the
    gradients of a group by a slow kernel (docs/log.md), and attention of groups stores T x T weights in
    float32 and before Ampere."""
    return q.is_cuda


def attends_in_float32(q):
    """Return whether attention is computed in float32: on a CPU, where torch's backward in bfloat16 takes up
    to four times as long (docs/log.md)."""
    return q.device.type == "cpu"


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.up_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.down_proj = Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        """Return (y, None) for x (B, T, C): Experts have the numbers of their router in the second place."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (arXiv 1910.07467), bit for bit as in the Llama code of transformers."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):  # (..., C)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_tables(seq_len, head_dim, theta):
    """Return cos and sin (T, D) of the rotary angles: position * theta^(-2i/D) for i < D/2, repeated for the
    second half of D (arXiv 2104.09864)."""
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Return x (B, T, H, D) with each pair (x_i, x_{i + D/2}) rotated by its angle; cos, sin (T, D)."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).to(x.dtype)
