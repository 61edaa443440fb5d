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

from nanobit.kernels import exact_matmul

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


def bit_layers(model):
    """{name: BitLinear or BitExperts} in the order of the model"""
    kinds = BitLinear, BitExperts
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
