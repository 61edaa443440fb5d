"""The head for inference: all of it is read for each token, so fewer bits, or more threads, save time."""

import torch
from torch import nn

from nanobit.infer import packed
from quant import output_dtype, quantize_activations


def has_c(weight):
    """Return whether packed.c can be used where this weight is."""
    return weight.device.type == "cpu" and packed.library() is not None


class Float32Head(nn.Linear):
    """The head of training. Torch gave the product of one row to one thread of a CPU, C gives it to all: for
    32,000 x 768 and two threads, 7.4 ms became 2.6. C adds in another order, which changes last bits."""

    def __init__(self, weight):
        super().__init__(*weight.shape[::-1], bias=False, device="meta")
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.uses_c = has_c(weight)

    def forward(self, x):
        is_float32 = self.weight.dtype == output_dtype(x) == torch.float32
        if self.uses_c and is_float32 and x.numel() == self.in_features:
            return packed.float_linear(self.weight, x.contiguous())
        return super().forward(x)


class Bfloat16Head(nn.Linear):
    """A head in bfloat16, half the memory; logits are rounded to 8 bits."""

    def __init__(self, weight):
        super().__init__(*weight.shape[::-1], bias=False, device="meta")
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Int8Head(nn.Module):
    """A head whose rows are int8, each with a scale in fp32: a quarter of the memory. The rows of W and the
    input x are rounded as quant.py rounds activations; y (..., V) = (q_x @ q_W^T) / (scale_W * scale_x). C
    sums integers. Without C the sums are in fp32, exact up to a width of 1,040 (1040 * 127^2 < 2^24), and
    slower than those of a head in fp32."""

    def __init__(self, weight):
        super().__init__()
        rows, scales = quantize_activations(weight)
        self.register_buffer("rows", rows.to(torch.int8).contiguous(), persistent=False)
        self.register_buffer("scales", scales.view(-1), persistent=False)
        self.uses_c = has_c(weight)

    def forward(self, x):
        if self.uses_c:
            return packed.int8_linear(self.rows, self.scales, x.float().contiguous())
        with torch.autocast(x.device.type, enabled=False):
            x_int, x_scale = quantize_activations(x)
            return x_int @ self.rows.float().t() / (self.scales * x_scale)


def set_head(model, dtype):
    """Give a model its head for inference, float32, bfloat16 or int8; an embedding tied to it stays. A head
    that was changed in model.py is only replaced for fewer bits."""
    if dtype == "float32" and (type(model.head) is not nn.Linear or model.head.bias is not None):
        return
    heads = {"float32": Float32Head, "bfloat16": Bfloat16Head, "int8": Int8Head}
    model.head = heads[dtype](model.head.weight.detach())
