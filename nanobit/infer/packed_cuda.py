"""
One token through a ternary matrix packed to two bits, on CUDA: a Triton kernel. Imported only there.

Its twin in torch is PackedLinear's other way: unpack, and kernels.exact_matmul. Not measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl

ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away, it leaves a float rounded half to even


@triton.jit
def kernel(x, packed, y, s, n_in, R, BLOCK: tl.constexpr):
    """a program for each byte row, which holds four outputs; BLOCK is at least n_in"""
    r = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < n_in
    v = tl.load(x + column, mask=inside, other=0.0)
    # in the order of quant.py, where 127.0 / max is the reciprocal times 127
    a = tl.div_rn(1.0, tl.maximum(tl.max(tl.abs(v)), 1e-5)) * 127.0
    q = (v * a + ROUND) - ROUND
    four = tl.load(packed + r * n_in + column, mask=inside, other=0).to(tl.int32)
    for k in tl.static_range(4):
        t = ((four >> (2 * k)) & 3) - 1
        total = tl.sum(q * t.to(tl.float32))  # whole numbers below 2^24: exact in any order
        tl.store(y + k * R + r, tl.div_rn(total, s * a))


def packed_linear(packed, x, s):
    """y (out,) in float32 of one token x (in,) through packed (out / 4, in) with the scale s, a float"""
    R, n_in = packed.shape
    y = torch.empty(4 * R, device=x.device)
    block = triton.next_power_of_2(n_in)
    # a fused multiply-add would round x a and the sum at once
    kernel[(R,)](x.float().contiguous(), packed, y, s, n_in, R, BLOCK=block, enable_fp_fusion=False)
    return y
