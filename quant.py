"""
BitLinear: the ternary linear layer of BitNet b1.58, trained with a straight-through gradient.

A BitLinear holds float master weights W (out, in), which the optimizer updates. Each forward rounds them to
{-1, 0, 1} with one scale per matrix, rounds its input to int8 with one scale per token, multiplies integers,
and divides by the two scales ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", figures 3 and 4):

    weights      s = 1 / mean|W|      t = round(W * s) clipped to {-1, 0, 1}
    activations  a = 127 / max|x|     q = round(x * a) clipped to [-128, 127]
    forward      y = (q @ t^T) / (s * a)
    backward     dx = dy @ (t / s)    dW = dy^T @ (q / a)

Both divisors are clamped to at least 1e-5; round is half to even. The backward pretends that neither rounding
happened (straight-through, no clip mask), so a latent weight goes on moving between its thresholds until it
flips.

The forward is the integer forward that an engine deploys, not "fake quantisation" in floats: the two differ
by an ulp here and there, and one ulp can flip an int8 rounding further on. The integer product is exact in
every form that computes it (int8 units, or fp32 while 127 * in_features < 2^24), so all of them give the same
bits.

Memory while training: the backward keeps t and q as int8 and makes the floats again when it needs them.
Training takes no less memory than a float model all the same, since master weights and optimizer state stay
fp32; it is the exported model that is small.

What this file does not do: no norm inside the layer, no bias, no quantisation of embeddings, head or norms,
no median or per-group scales, and no second ternarisation of weights that already are ternary (the scale
would shrink).
"""

import torch
from torch import nn

HAS_VNNI = torch.cpu._is_vnni_supported()  # where torch._int_mm uses int8 units, for one row too
# whether oneDNN has int8 products for this CPU
HAS_INT8 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"
EPS = 1e-5  # the least mean|W| and max|x|: an all-zero matrix or token divides by this, not by zero


def weight_scale(w):
    """s = 1 / mean|W| over the last two dimensions, fp32, shape (..., 1, 1).

    The mean is summed in float64 and rounded once, so that it does not depend on the number of threads or the
    compiler.
    """
    exact = torch.float32 if w.device.type == "mps" else torch.float64  # MPS has no float64
    mean = w.detach().abs().mean((-2, -1), keepdim=True, dtype=exact).float()
    return 1.0 / mean.clamp(min=EPS)


def ternarize(w):
    """(t, s): the codes of W (..., out, in) in {-1, 0, 1}, as floats, and the scale s (..., 1, 1)."""
    w = w.detach().float()
    s = weight_scale(w)
    return (w * s).round().clamp(-1, 1), s


def dequantised(w):
    """the values {-1, 0, 1} / s that the ternary forward multiplies by, as floats"""
    codes, s = ternarize(w)
    return codes / s


def quantize_activations(x):
    """(q, a): x (..., in) rounded to whole floats in [-128, 127] and the scale a (..., 1) of each token."""
    x = x.detach().float()
    a = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * a).round().clamp(-128, 127), a


def int_matmul_pays(device, rows, n_in, n_out):
    """whether the int8 product of these sizes is faster than the fp32 one"""
    if device.type == "cuda":  # cuBLAS: more than 16 rows, both widths multiples of 8
        return rows > 16 and n_in % 8 == 0 and n_out % 8 == 0
    # oneDNN reorders the weights first: 256 rows of 768 x 3072 earn that back, 1,024 of 256 x 256
    is_large = HAS_INT8 and rows >= 512 and rows * n_in * n_out >= 2**27
    return device.type == "cpu" and (HAS_VNNI or is_large)


@torch.library.custom_op("nanobit::int8_matmul", mutates_args=())
def int8_matmul(q: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """q (N, in) @ t (out, in)^T by oneDNN, int8 on the CPU, as fp32 (N, out). AVX2 adds products in pairs in
    16 bits, which saturate with any int8, but not with codes: 2 * 255 * 1 < 2^15."""
    scale, zero = torch.ones(len(t)), torch.zeros(len(t), dtype=torch.int64)
    weight = torch.ops.onednn.qlinear_prepack(t, None)
    how = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, no scale, nothing after it
    return torch.ops.onednn.qlinear_pointwise(q, 1.0, 0, weight, scale, zero, *how)


@int8_matmul.register_fake
def _(q, t):
    return q.new_empty(len(q), len(t), dtype=torch.float32)


def exact_matmul(q, t):
    """the integer product q (N, in) @ t (out, in)^T as fp32 (N, out); q holds whole floats in [-128, 127], t
    codes as floats or int8"""
    assert t.shape[1] * 127 < 2**24, "sums of this width are not exact in fp32"
    if not int_matmul_pays(q.device, q.shape[0], t.shape[1], t.shape[0]):
        return q.float() @ t.float().t()
    q, t = q.to(torch.int8), t.to(torch.int8)
    return torch._int_mm(q, t.t()).float() if q.is_cuda or HAS_VNNI else int8_matmul(q, t)


class TernaryLinear(torch.autograd.Function):
    """y = (q @ t^T) / (s a) for x (N, in) and W (out, in); y (N, out) in out_dtype"""

    @staticmethod
    def forward(ctx, x, w, out_dtype):
        # autocast would turn the exact fp32 product into a bf16 one without a word
        with torch.autocast(x.device.type, enabled=False):
            t, s = ternarize(w)
            q, a = quantize_activations(x)
            y = exact_matmul(q, t) / (s * a)
            ctx.save_for_backward(q.to(torch.int8), a, t.to(torch.int8), s)
        ctx.x_dtype = x.dtype
        # no cast to the dtype it has: compiled by torch 2.11, that cuts the gradient off without a word
        return y if out_dtype == torch.float32 else y.to(out_dtype)

    @staticmethod
    def backward(ctx, dy):
        q, a, t, s = ctx.saved_tensors
        dx = dw = None
        with torch.autocast(dy.device.type, enabled=False):
            # codes are exact in bf16 and t / s is not: s stays outside of the product, in fp32
            if ctx.needs_input_grad[0]:
                dx = ((dy @ t.to(dy.dtype)).float() / s).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                dw = (dy.t() @ (q / a).to(dy.dtype)).float()
        return dx, dw, None


def output_dtype(x):
    """the dtype that nn.Linear gives for x: autocast's where it is on, else that of x"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class BitLinear(nn.Linear):
    """nn.Linear without a bias whose forward is ternary; `weight` (out, in) holds the float master
    weights."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        if bias:
            raise ValueError("BitLinear has no bias: stock engines have no place for one")
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.absmax = None  # set to a tensor by activation_absmax() for one forward

    def forward(self, x):
        """y (..., out) for x (..., in), in the autocast dtype where autocast is on, as nn.Linear, else in
        x's"""
        if self.absmax is not None:
            self.absmax = x.detach().abs().max().float()
        y = TernaryLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, output_dtype(x))
        return y.view(*x.shape[:-1], -1)


class BitExperts(nn.Module):
    """one ternary matrix per expert, each with a scale of its own: BitLinear for rows sorted by expert"""

    def __init__(self, n_expert, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))
        self.absmax = None

    def forward(self, x, sizes):
        """y (N, out) for x (N, in), of which the first sizes[0] rows go to expert 0, and so on"""
        if self.absmax is not None:
            self.absmax = x.detach().abs().max().float()
        dtype = output_dtype(x)
        parts = zip(x.split(sizes), self.weight.unbind())
        return torch.cat([TernaryLinear.apply(rows, w, dtype) for rows, w in parts])


# ternary health: what the weights of a run are doing, read every log_every steps


def bit_layers(model):
    """{name: BitLinear or BitExperts} in the order of the model"""
    kinds = BitLinear, BitExperts
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def whole(w):
    """a weight, put together where FSDP has sharded it; every rank must ask"""
    return w.full_tensor() if hasattr(w, "full_tensor") else w


@torch.no_grad()
def codes(model):
    """{name: int8 codes} of every ternary layer"""
    layers = bit_layers(model).items()
    return {name: ternarize(whole(layer.weight))[0].to(torch.int8) for name, layer in layers}


@torch.no_grad()
def activation_absmax(model, idx):
    """{name: max|x|} of the input of every ternary layer in one extra forward of idx (B, T); 0-dim device
    tensors"""
    layers = bit_layers(model)
    was_training = model.training
    model.eval()
    for layer in layers.values():
        layer.absmax = torch.zeros((), device=idx.device)
    model(idx)
    result = {name: layer.absmax for name, layer in layers.items()}
    for layer in layers.values():
        layer.absmax = None
    model.train(was_training)
    return result


HEALTH = ("zero", "plus", "minus", "scale", "near_threshold", "flip_rate", "act_absmax")


@torch.no_grad()
def health(model, before, idx):
    """(record, codes): the ternary health of the model now.

    before: the codes of the last record or None (flip_rate is then None); idx (B, T): tokens for the
    activations. record: {"total": row, "layers": {name: row}}, a row of
        zero, plus, minus   fractions of the codes (Gaussian weights begin at 0.31 zeros)
        scale               mean|W|, what a code of 1 stands for; of experts the mean of theirs
        near_threshold      fraction of |W| / mean|W| within 0.05 of 0.5, the border between 0 and 1
        flip_rate           fraction of codes that changed since `before`
        act_absmax          largest |x| that went into the layer
    Fractions are averaged over weights in the total, scale and act_absmax are the mean and the maximum over
    layers. One transfer from the device for all numbers.
    """
    absmax = activation_absmax(model, idx)
    now, rows, sizes = {}, [], []
    for name, layer in bit_layers(model).items():
        w = whole(layer.weight)
        t, s = ternarize(w)
        now[name] = t.to(torch.int8)
        near = ((w.float().abs() * s - 0.5).abs() < 0.05).float().mean()
        flips = (now[name] != before[name]).float().mean() if before else torch.zeros_like(near)
        fractions = [(t == value).float().mean() for value in (0, 1, -1)]
        rows.append(torch.stack([*fractions, (1 / s).mean(), near, flips, absmax[name]]))
        sizes.append(t.numel())
    table = torch.stack(rows).cpu().double()  # (layers, len(HEALTH)); MPS has no float64
    total = (table * torch.tensor(sizes, dtype=torch.float64)[:, None]).sum(0) / sum(sizes)
    total[HEALTH.index("scale")] = table[:, HEALTH.index("scale")].mean()
    total[HEALTH.index("act_absmax")] = table[:, HEALTH.index("act_absmax")].max()

    def row(values):
        record = dict(zip(HEALTH, (float(f"{v:.6g}") for v in values.tolist())))
        return record if before else record | {"flip_rate": None}

    return {"total": row(total), "layers": {name: row(r) for name, r in zip(now, table)}}, now
