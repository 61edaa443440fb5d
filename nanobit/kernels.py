"""Exact integer products of activations and ternary codes, by the fastest units of a CPU or GPU."""

import torch

HAS_VNNI = torch.cpu._is_vnni_supported()  # torch._int_mm then uses int8 units, for a single row too
# whether oneDNN has int8 products for this CPU
HAS_INT8 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"
# of a CUDA card; machine.pick sets them
HAS_CUDA_INT8 = True  # whether cuBLAS has int8 products for it
fused_matmul = None  # kernels_cuda.scaled_int8_matmul if it works there
FUSED_FROM = 8, 0  # the compute capability from which it is used; bench.py prints its time beside cuBLAS's


def scaled_matmul(x_int, x_scale, codes, scale, dtype, rounded_x=None):
    """Return (x_int @ codes^T) / (scale * x_scale) in dtype, (N, out), as exact_matmul computes it. codes are
    int8, x_scale (N, 1). rounded_x: x_int / x_scale or None, see kernels_cuda.scaled_int8_matmul."""
    if fused_matmul and x_int.is_cuda and len(x_int) > 16:
        assert codes.shape[-1] * 127 < 2**24, "sums of this width are not exact in fp32"
        return fused_matmul(x_int.to(torch.int8), codes, x_scale, scale, dtype, rounded_x)
    y = exact_matmul(x_int, codes) / (scale * x_scale)
    # compiled by torch 2.11, a cast to the same dtype silently cuts the gradient off
    return y if dtype == torch.float32 else y.to(dtype)


def exact_matmul(x_int, codes):
    """Return x_int (N, in) @ codes (out, in)^T as fp32 (N, out), exact. x_int holds whole floats in
    [-128, 127]; codes are floats or int8. AssertionError if a sum could reach 2^24."""
    n_out, n_in = codes.shape
    assert n_in * 127 < 2**24, "sums of this width are not exact in fp32"
    if not int_matmul_pays(x_int.device, x_int.shape[0], n_in, n_out):
        return x_int.float() @ codes.float().t()
    x_int, codes = x_int.to(torch.int8), codes.to(torch.int8)
    if x_int.is_cuda or HAS_VNNI:
        return torch._int_mm(x_int, codes.t()).float()
    return int8_matmul(x_int, codes)


def int_matmul_pays(device, rows, n_in, n_out):
    """Return whether the int8 product of these sizes is faster than the fp32 one."""
    if device.type == "cuda":  # cuBLAS: more than 16 rows, both widths multiples of 8
        return HAS_CUDA_INT8 and rows > 16 and n_in % 8 == 0 and n_out % 8 == 0
    # oneDNN reorders the weights first: 256 rows of 768 x 3072 earn that back, 1,024 of 256 x 256
    is_large = HAS_INT8 and rows >= 512 and rows * n_in * n_out >= 2**27
    return device.type == "cpu" and (HAS_VNNI or is_large)


def fp32_matmul(a, b):
    """Return a (N, in) @ b (in, out) of 16-bit floats as fp32; on CUDA its sums are never rounded to 16."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def reciprocal(x):
    """Return 1 / x of fp32, rounded once: compiled code for CUDA does that only in float64."""
    if x.is_cuda and torch.compiler.is_compiling():
        return x.double().reciprocal().float()
    return x.reciprocal()


def multiplies_int8(device):
    """Return whether torch._int_mm works on a CUDA device: cuBLAS refuses on those without tensor cores."""
    codes = (torch.arange(32 * 32, device=device) % 3 - 1).view(32, 32).to(torch.int8)
    try:
        product = torch._int_mm(codes, codes.t())
        return torch.equal(product.float(), codes.float() @ codes.float().t())
    except RuntimeError:
        return False


def working_fused(device):
    """Return (kernels_cuda.scaled_int8_matmul, '') if it gives the right bits on a CUDA device with each of
    its tiles, else (None, the reason)."""
    try:
        from nanobit.kernels_cuda import scaled_int8_matmul  # here, since it needs Triton

        for N, n_in, n_out in ((40, 200, 48), (1032, 200, 1032)):
            q = (torch.arange(N * n_in, device=device) % 255 - 127).view(N, n_in).to(torch.int8)
            codes = (torch.arange(n_out * n_in, device=device) % 3 - 1).view(n_out, n_in).to(torch.int8)
            x_scale = torch.linspace(1, 9, N, device=device)[:, None]
            scale = torch.full((1, 1), 7.0, device=device)
            expected = q.float() @ codes.float().t() / (scale * x_scale)
            for dtype in (torch.float32, torch.bfloat16):
                y = scaled_int8_matmul(q, codes, x_scale, scale, dtype)
                if not torch.equal(y, expected.to(dtype)):
                    return None, f"its product of {N} x {n_in} x {n_out} is wrong in {dtype}"
    except Exception as error:  # of Triton, its compiler or the driver: cuBLAS works
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return scaled_int8_matmul, ""


@torch.library.custom_op("nanobit::int8_matmul", mutates_args=())
def int8_matmul(x_int: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return x_int (N, in) @ codes (out, in)^T, int8 on the CPU, as fp32 (N, out), by oneDNN. AVX2 adds
    products in pairs in 16 bits, which saturate with any int8, but not with codes: 2 * 255 * 1 < 2^15."""
    scale = torch.ones(len(codes))
    zero = torch.zeros(len(codes), dtype=torch.int64)
    weight = torch.ops.onednn.qlinear_prepack(codes, None)
    unscaled = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, and nothing after the product
    return torch.ops.onednn.qlinear_pointwise(x_int, 1.0, 0, weight, scale, zero, *unscaled)


@int8_matmul.register_fake
def _(x_int, codes):
    return x_int.new_empty(len(x_int), len(codes), dtype=torch.float32)
