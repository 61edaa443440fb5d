"""
BitLinear: the ternary linear layer of BitNet b1.58, trained with a straight-through gradient.

A BitLinear holds float master weights W (out, in), which the optimizer updates. Each forward rounds W to
codes t with one scale s per matrix, rounds the input x to int8 values q with one scale a per token,
multiplies the integers and divides by both scales ("The Era of 1-bit LLMs: Training Tips, Code and FAQ",
figures 3 and 4):

    weights      s = 1 / mean|W|      t = round(W * s) clipped to {-1, 0, 1}
    activations  a = 127 / max|x|     q = round(x * a) clipped to [-128, 127]
    forward      y = (q @ t^T) / (s * a)
    backward     dx = dy @ (t / s)    dW = dy^T @ (q / a)

mean|W| and max|x| are clamped to at least 1e-5, and round is half to even. The backward pretends that nothing
was rounded or clipped (the straight-through estimator, arXiv 1308.3432), so a master weight keeps moving
between two thresholds until its code flips.

The forward is the integer forward of a deployed model, not "fake quantization" in floats. The two differ in
the last bit of a float now and then, and one such bit can flip the rounding of an activation in a later
layer. Every form of the integer product (nanobit/kernels.py) is exact, so all of them give the same bits.

The backward needs t and q / a: eager code keeps q as int8, compiled code on CUDA q / a. Training takes about
as much memory as a float model, because the master weights and the optimizer state stay fp32: the exported
model is the small one.

This file has no norm inside the layer, no bias, no quantization of embeddings, head or norms, and no median
or per-group scales. Never ternarize the weights of an export again: their scale would shrink.
"""

import torch
from torch import nn

from nanobit.kernels import fp32_matmul, reciprocal, scaled_matmul

EPS = 1e-5  # the least mean|W| and max|x|: an all-zero matrix or token divides by this, not by zero


class BitLinear(nn.Linear):
    """An nn.Linear without bias whose forward is ternary; `weight` (out, in) holds the master weights."""

    def __init__(self, in_features, out_features, bias=False, device=None, dtype=None):
        if bias:
            raise ValueError("BitLinear has no bias: stock engines have no place for one")
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.register_buffer("kept_codes", None, persistent=False)  # see kept_codes.py
        self.register_buffer("kept_scale", None, persistent=False)
        self.register_buffer("kept_floats", None, persistent=False)

    def forward(self, x):
        """Return y (..., out) for x (..., in), in the dtype that nn.Linear would give."""
        rows = x.reshape(-1, x.shape[-1])
        kept = (self.kept_codes, self.kept_scale, self.kept_floats)
        y = TernaryLinear.apply(rows, self.weight, *kept, output_dtype(x))
        return y.view(*x.shape[:-1], -1)


class TernaryLinear(torch.autograd.Function):
    """Compute y (N, out) in out_dtype from x (N, in) and W (out, in), and the straight-through gradients.
    codes and scale are those of W, or None: then they are made here. float_codes: the same codes as floats
    for the backward, or None.

    Tutorials leave both to autograd, with `x + (rounded(x) - x).detach()`: its value is rounded(x), its
    gradient that of x. The result is the same, but the product is a float one and keeps float copies:

    >>> def tutorial_forward(x, w):
    ...     codes, scale = ternarize(w)
    ...     x_int, x_scale = quantize_activations(x)
    ...     w = w + (codes / scale - w).detach()
    ...     x = x + (x_int / x_scale - x).detach()
    ...     return x @ w.t()
    >>> x = torch.randn(6, 64, requires_grad=True)
    >>> layer = BitLinear(64, 48)
    >>> ours, tutorial = layer(x), tutorial_forward(x, layer.weight)
    >>> torch.allclose(ours, tutorial, atol=1e-5)
    True
    >>> dy = torch.randn(6, 48)
    >>> our_gradients = torch.autograd.grad(ours, (x, layer.weight), dy)
    >>> tutorial_gradients = torch.autograd.grad(tutorial, (x, layer.weight), dy)
    >>> [torch.allclose(*pair, atol=1e-5) for pair in zip(our_gradients, tutorial_gradients)]
    [True, True]
    """

    @staticmethod
    def forward(ctx, x, w, codes, scale, float_codes, out_dtype):
        with torch.autocast(x.device.type, enabled=False):  # it would round the exact product to bf16
            if codes is None:
                codes, scale = int8_codes(w)
            x_int, x_scale = quantize_activations(x)
            rounded_x = None
            if torch.compiler.is_compiling():  # eager code would keep a copy for each layer that reads x
                rounded_x = (x_int / x_scale).to(out_dtype)
            y = scaled_matmul(x_int, x_scale, codes, scale, out_dtype, rounded_x)  # (q @ t^T) / (s * a)
            if float_codes is not None:
                codes = float_codes
            # the compiler drops what the backward does not read
            ctx.save_for_backward(x_int.to(torch.int8), x_scale, rounded_x, codes, scale)
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x_int, x_scale, rounded_x, codes, scale = ctx.saved_tensors
        dx = dw = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:  # codes are exact in bf16, codes / scale is not: divide in fp32
                product = fp32_matmul if dy.dtype == torch.float16 else torch.mm  # dy @ t overflows float16
                dx = (product(dy, codes.to(dy.dtype)).float() / scale).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                if rounded_x is None:
                    rounded_x = (x_int / x_scale).to(dy.dtype)
                dw = fp32_matmul(dy.t(), rounded_x)
        return dx, dw, None, None, None, None


def int8_codes(w):
    """Return what ternarize does, the codes as int8."""
    codes, scale = ternarize(w)
    return codes.to(torch.int8), scale


def ternarize(w, scale=None):
    """Return (codes, scale) of W (..., out, in): t in {-1, 0, 1} as floats of that shape, s (..., 1, 1), made
    here if it is None."""
    w = w.detach().float()
    if scale is None:
        scale = weight_scale(w)
    return (w * scale).round().clamp(-1, 1), scale


def weight_scale(w):
    """Return s = 1 / mean|W| over the last two dimensions of W, fp32, of shape (..., 1, 1).

    The mean is summed in float64 and rounded once, so that it does not depend on the number of threads or on
    the compiler."""
    sum_dtype = torch.float64
    if w.device.type == "mps":  # it has no float64
        sum_dtype = torch.float32
    return scale_of_mean(w.detach().abs().mean((-2, -1), keepdim=True, dtype=sum_dtype).float())


def scale_of_mean(mean):
    """Return s of mean|W|."""
    return reciprocal(mean.clamp(min=EPS))


def dequantized(w):
    """Return codes / scale of W as floats: the matrix of an engine that multiplies floats."""
    codes, scale = ternarize(w)
    return codes / scale


def quantize_activations(x):
    """Return (x_int, x_scale) of x (..., in): q, whole floats in [-128, 127], and a per token, (..., 1)."""
    x = x.detach().float()
    x_scale = 127.0 * reciprocal(x.abs().amax(-1, keepdim=True).clamp(min=EPS))
    return (x * x_scale).round().clamp(-128, 127), x_scale


def output_dtype(x):
    """Return the dtype that nn.Linear gives for x: that of autocast if it is on, else that of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
