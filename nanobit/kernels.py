"""Exact integer products of activations and ternary codes, by the fastest units of a CPU or GPU."""

import torch

HAS_VNNI = torch.cpu._is_vnni_supported()  # where torch._int_mm uses int8 units, for one row too
# whether oneDNN has int8 products for this CPU
HAS_INT8 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"


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
