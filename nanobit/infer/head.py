"""A head of fewer bits: less to read for each token, and logits that are not exact."""

import torch
from torch import nn

from nanobit.infer import packed
from quant import quantize_activations


class Bfloat16Head(nn.Linear):
    """A head in bfloat16, half the memory; logits are rounded to 8 bits."""

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
        self.uses_c = weight.device.type == "cpu" and packed.library() is not None

    def forward(self, x):
        if self.uses_c:
            return packed.int8_linear(self.rows, self.scales, x.float().contiguous())
        with torch.autocast(x.device.type, enabled=False):
            x_int, x_scale = quantize_activations(x)
            return x_int @ self.rows.float().t() / (self.scales * x_scale)


def lighten_head(model, dtype):
    """Keep the head of a model for inference in bfloat16 or int8; an embedding that is tied to it stays."""
    weight = model.head.weight.detach()
    if dtype == "int8":
        model.head = Int8Head(weight)
    elif dtype == "bfloat16":
        model.head = Bfloat16Head(*weight.shape[::-1], bias=False, device="meta")
        model.head.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
