"""
The transformer: a plain Llama block, so that stock engines can run what is trained here.

Pre-norm RMSNorm, rotary positions that rotate halves, grouped-query attention, SwiGLU, no biases, and a head
that may share the embedding's matrix. With cfg.ternary every linear layer of attention and FFN is a BitLinear
(quant.py); embedding, head and norms stay in full precision. Without it the same shape is an ordinary float
model: the twin.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H, V = vocab_size.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from quant import BitLinear


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
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + turned * sin).to(x.dtype)


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
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)"""

    def __init__(self, cfg, Linear):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.up_proj = Linear(cfg.n_embd, cfg.ffn_dim, bias=False)
        self.down_proj = Linear(cfg.ffn_dim, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg, Linear):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.attn = Attention(cfg, Linear)
        self.ffn_norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.ffn = FeedForward(cfg, Linear)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """cfg needs vocab_size, seq_len, n_layer, n_head, n_kv_head, n_embd, ffn_dim, rope_theta, norm_eps,
    dropout, tie_embeddings and ternary (config/default.py says what each is)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        Linear = BitLinear if cfg.ternary else nn.Linear
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, Linear) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rope_tables(cfg.seq_len, cfg.n_embd // cfg.n_head, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (seq_len, D)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """normal: std 0.02 for embedding and head; 1 / sqrt(inputs) for the matrices of the blocks, so that
        at every width they keep the size of what goes through them, and 1 / sqrt(2 n_layer) of that for
        those that write into the residual stream. The first loss is then near ln(V)."""
        for name, p in self.named_parameters():
            if name.startswith("blocks.") and p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * self.cfg.n_layer if into_residual else 1)) ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, cache=None):
        """logits (B, T, V) in fp32 of idx (B, T); with targets (B, T) the mean cross entropy in nats instead.
        With a cache, idx continues what the cache holds and only the last position's logits (B, 1, V) are
        made."""
        start = cache.length if cache is not None else 0
        cos, sin = (table[start : start + idx.shape[1]] for table in (self.cos, self.sin))
        x = self.dropout(self.embed(idx))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += idx.shape[1]
            x = x[:, -1:]
        logits = self.head(self.norm(x)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def counts(self):
        """unique parameters: total, active per token, ternary, full_precision (a tied matrix counts once)"""
        total = sum(p.numel() for p in self.parameters())
        ternary = sum(m.weight.numel() for m in self.modules() if isinstance(m, BitLinear))
        return dict(total=total, active=total, ternary=ternary, full_precision=total - ternary)

    def flops_per_token(self):
        """model FLOPs of forward and backward: 6 for each weight that is multiplied plus 12 L C T for
        attention (PaLM, arXiv 2204.02311, appendix B); an untied embedding is only looked up."""
        cfg = self.cfg
        looked_up = 0 if cfg.tie_embeddings else self.embed.weight.numel()
        return 6 * (self.counts()["active"] - looked_up) + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def restore(part, device):
    """the model of a checkpoint.pt (its loaded dict), on the device and ready for use"""
    with torch.device(device):
        model = Transformer(SimpleNamespace(**part["config"]))
    model.load_state_dict(part["model"])
    return model.eval()


class KVCache:
    """keys and values of the tokens seen so far, per attention layer, for at most `size` tokens"""

    def __init__(self, size):
        self.size, self.length, self.store = size, 0, {}

    def append(self, layer, k, v):
        """store k, v (B, K, T, D) of the new tokens; return all of them (B, K, length + T, D) and the mask
        that T new tokens need (None for one token, or where the cache was empty: plain causal attention)"""
        B, K, T, D = k.shape
        start, end = self.length, self.length + T
        if layer not in self.store:
            self.store[layer] = k.new_empty(2, B, K, self.size, D)
        kv = self.store[layer]
        kv[0, :, :, start:end], kv[1, :, :, start:end] = k, v
        mask = None
        if start > 0 and T > 1:
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(start)
        return kv[0, :, :, :end], kv[1, :, :, :end], mask


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """one token id (B, 1) from logits (B, V): greedy at temperature 0, else drawn from the top_k (0 = all)
    likeliest and from the least set of them whose chances reach top_p (nucleus, arXiv 1904.09751), by a
    generator of the CPU"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    device, logits = logits.device, logits.float().cpu() / temperature  # CUDA's cumsum is not deterministic
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        chance = ordered.softmax(-1)
        beyond = chance.cumsum(-1) - chance >= top_p  # the token that crosses top_p stays in
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).to(device)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """yield the next tokens (B, 1), one at a time, after the prompts idx (B, T). Where the context is full,
    the later half of it is read again and generation goes on with that."""
    size = model.cfg.seq_len
    idx = idx[:, -size:]
    cache, fresh = KVCache(size), idx
    for _ in range(max_new_tokens):
        if cache.length + fresh.shape[1] > size:
            cache, fresh = KVCache(size), idx[:, -(size // 2) :]
        logits = model(fresh, cache=cache)
        fresh = pick(logits[:, -1], temperature, top_k, top_p, generator)
        idx = torch.cat((idx, fresh), 1)[:, -size:]
        yield fresh


@torch.no_grad()
def mean_loss(model, batches, stop=lambda: False):
    """mean cross entropy in nats per token over batches of (inputs, targets), summed in float64; None where
    stop() turned true on the way"""
    was_training, losses, sizes = model.training, [], []
    model.eval()
    for idx, targets in batches:
        losses.append(model(idx, targets))
        sizes.append(targets.numel())
        if stop():
            break
    model.train(was_training)
    sizes = torch.tensor(sizes, dtype=torch.float64)
    return None if stop() else (torch.stack(losses).cpu().double() @ sizes / sizes.sum()).item()
