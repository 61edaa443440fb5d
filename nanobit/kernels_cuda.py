"""The int8 product of a ternary layer with its scales in the epilogue, by a Triton kernel for CUDA cards.

torch._int_mm writes sums of 4 bytes, which the next kernel reads to divide them by the scales. Here the sums
stay in registers, and only the output is written.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q, t, x_scale, scale, y, N, n_out,
    n_in: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Compute a tile (ROWS, COLUMNS) of y. Eight tiles below each other share their columns of t in L2."""
    column_tiles = tl.cdiv(n_out, COLUMNS)
    group = tl.program_id(0) // (8 * column_tiles) * 8
    height = min(tl.cdiv(N, ROWS) - group, 8)
    place = tl.program_id(0) % (8 * column_tiles)
    rows = (group + place % height) * ROWS + tl.arange(0, ROWS)
    columns = place // height * COLUMNS + tl.arange(0, COLUMNS)
    # rows and columns past the end read those of the beginning, and are not stored
    q += (rows % N).to(tl.int64)[:, None] * n_in
    t += (columns % n_out).to(tl.int64)[None, :] * n_in
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, n_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x_int = tl.load(q + k[None, :], mask=k[None, :] < n_in, other=0)
        codes = tl.load(t + k[:, None], mask=k[:, None] < n_in, other=0)
        sums = tl.dot(x_int, codes, sums, out_dtype=tl.int32)
    divisor = (tl.load(scale) * tl.load(x_scale + rows, mask=rows < N, other=1.0))[:, None]
    values = quotient(sums.to(tl.float32), divisor).to(y.dtype.element_ty)
    inside = (rows < N)[:, None] & (columns < n_out)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * n_out + columns[None, :], values, mask=inside)


@triton.jit
def quotient(x, divisor):
    """Return x / divisor, rounded to nearest, for many x with one divisor, neither near the limits of fp32.

    It is x times 1 / divisor, corrected by its remainder, which a fused multiply-add computes exactly
    (Markstein, IBM Journal of Research and Development 34, 1990). A division takes more instructions."""
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    estimate = x * inverse
    return tl.fma(tl.fma(-estimate, divisor, x), inverse, estimate)


@torch.library.custom_op("nanobit::scaled_int8_matmul", mutates_args=())
def scaled_int8_matmul(
    q: torch.Tensor,
    codes: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    rounded_x: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (q @ codes^T) / (scale * x_scale) in dtype (N, out), rounded as kernels.scaled_matmul does. q
    (N, in) and codes (out, in) are int8, x_scale (N, 1) and scale (one number) fp32.

    rounded_x is not read. As the forward needs it, the compiler stores it for the backward. Otherwise the
    backward computes it again, from the input of the norm or from gate and up: about 2 % of a step
    (docs/log.md)."""
    q, codes = q.contiguous(), codes.contiguous()
    N, n_in = q.shape
    n_out = len(codes)
    y = torch.empty(N, n_out, dtype=dtype, device=q.device)
    small = N * n_out < 64 * 128 * 128  # too few tiles to fill a card
    rows, columns, depth, warps = (64, 64, 64, 4) if small else (128, 128, 128, 8)
    grid = (triton.cdiv(N, rows) * triton.cdiv(n_out, columns),)
    # not those that the compiler finds: they would round once where quant.py rounds twice
    options = dict(num_warps=warps, num_stages=3, enable_fp_fusion=False)
    kernel[grid](q, codes, x_scale, scale, y, N, n_out, n_in, rows, columns, depth, **options)
    return y


@scaled_int8_matmul.register_fake
def _(q, codes, x_scale, scale, dtype, rounded_x=None):
    return q.new_empty(len(q), len(codes), dtype=dtype)
