"""A token through a ternary matrix packed to two bits, by a Triton kernel."""

import torch
import triton
import triton.language as tl

ROUND = tl.constexpr(1.5 * 2**23)  # added to a float and subtracted again, it rounds half to even


@triton.jit
def kernel(x, packed, y, scale, n_in, R, BLOCK: tl.constexpr):
    """Compute the four outputs of a byte row, one row per program; BLOCK is at least n_in."""
    r = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < n_in
    values = tl.load(x + column, mask=inside, other=0.0)
    # in the order of quant.py: torch computes 127.0 / max as the reciprocal times 127
    x_scale = tl.div_rn(1.0, tl.maximum(tl.max(tl.abs(values)), 1e-5)) * 127.0
    x_int = (values * x_scale + ROUND) - ROUND
    four = tl.load(packed + r * n_in + column, mask=inside, other=0).to(tl.int32)
    for k in tl.static_range(4):
        codes = ((four >> (2 * k)) & 3) - 1
        total = tl.sum(x_int * codes.to(tl.float32))  # whole numbers below 2^24: exact in any order
        tl.store(y + k * R + r, tl.div_rn(total, scale * x_scale))


def packed_linear(packed, x, scale):
    """Return y (out,) in fp32 of one token x (in,) through packed (out / 4, in) with its scale, a float."""
    R, n_in = packed.shape
    y = torch.empty(4 * R, device=x.device)
    block = triton.next_power_of_2(n_in)
    # a fused multiply-add would round only once, after x * x_scale + ROUND
    kernel[(R,)](x.float().contiguous(), packed, y, scale, n_in, R, BLOCK=block, enable_fp_fusion=False)
    return y
