"""The Triton kernels without a card: by Triton's interpreter, and compiled for cards that are not here.

All run in a process of their own, since Triton decides at its import whether it interprets."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import quant

TILES = ((64, 64, 64), 4), ((128, 128, 128), 8)  # tile and warps
CARDS = 80, 86, 89, 90, 100, 120


def in_child(function, **env):
    """Run a function of this file in a process with these variables."""
    pytest.importorskip("triton", reason="needs triton")
    program = f"import sys; sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]; "
    program += f"import test_kernels_cuda as test; test.{function}()"
    child = [sys.executable, "-c", program]
    done = subprocess.run(child, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def check_bits():
    """Compare the kernel with the formula of quant.py, for sizes that are no multiple of a tile too."""
    from triton.runtime import interpreter

    from nanobit import kernels_cuda

    def fma(self, x, y, z):  # Triton's rounds the product too; here that is exact
        result = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(result.astype("float32"), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma
    for N, n_in, n_out in ((40, 64, 48), (1, 80, 64), (130, 200, 136), (70, 33, 17)):
        x_int, x_scale = quant.quantize_activations(3 * torch.randn(N, n_in))
        codes, scale = quant.int8_codes(torch.randn(n_out, n_in))
        expected = (x_int @ codes.float().t()) / (scale * x_scale)
        x_int = x_int.to(torch.int8)
        for dtype in (torch.float32, torch.float16):
            y = kernels_cuda.scaled_int8_matmul(x_int, codes, x_scale, scale, dtype)
            assert torch.equal(y, expected.to(dtype))
        y = kernels_cuda.scaled_int8_matmul(x_int, codes, x_scale, scale, torch.float32, x_int / x_scale)
        assert torch.equal(y, expected)
        # whatever the strides are
        q, t = x_int.t().contiguous().t(), codes.t().contiguous().t()
        y = kernels_cuda.scaled_int8_matmul(q, t, x_scale, scale, torch.float32)
        assert torch.equal(y, expected)
        # the interpreter cuts bits off where a card rounds to bfloat16
        y = kernels_cuda.scaled_int8_matmul(x_int, codes, x_scale, scale, torch.bfloat16)
        torch.testing.assert_close(y, expected.to(torch.bfloat16), rtol=2**-7, atol=0)


def check_packed():
    """Compare the kernel of packed weights with BitLinear."""
    from nanobit.infer import packed, packed_cuda

    for shape in ((80, 48), (100, 64), (768, 16)):
        bit = quant.BitLinear(*shape)
        layer = packed.packed_linear(bit.weight)
        for x in (torch.randn(shape[0]), torch.zeros(shape[0]), torch.randint(-254, 255, shape[:1]) / 2):
            x[:1] = 127.0 * x.any()
            with torch.no_grad():
                assert torch.equal(packed_cuda.packed_linear(layer.packed, x, layer.matrix.scale), bit(x))


def check_compilation():
    """Compile the kernel for every card: integer products, exact division, rounding to nearest."""
    import triton
    from triton.backends.compiler import GPUTarget

    from nanobit import kernels_cuda

    pointers = dict(q="*i8", t="*i8", x_scale="*fp32", scale="*fp32", y="*bf16")
    sizes = dict(N="i32", n_out="i32")
    for capability in CARDS:
        for tile, warps in TILES:
            constants = dict(zip(("n_in", "ROWS", "COLUMNS", "DEPTH"), (768, *tile)))
            signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
            source = triton.compiler.ASTSource(kernels_cuda.kernel, signature, constants)
            options = dict(num_warps=warps, num_stages=3, enable_fp_fusion=False)
            ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
            assert "s32.s8.s8" in ptx
            assert 1 <= ptx.count("div.rn.f32") <= 8  # of the scales alone: outputs take fma, see quotient
            assert "fma.rn.f32" in ptx
            assert "div.full.f32" not in ptx
            assert "cvt.rn.bf16" in ptx


def test_the_kernel_gives_the_bits_of_quant():
    """Interpreted, the kernel computes the forward of quant.py to the last bit."""
    in_child("check_bits", TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_every_card():
    """The compiler makes integer tensor-core code with exact divisions, from Ampere to Blackwell."""
    in_child("check_compilation")


def test_the_kernel_of_packed_weights_computes_what_bitlinear_does():
    """Interpreted, the kernel for one token equals BitLinear. It shows rows and codes that are mistaken, not
    what the compiler does to a rounding."""
    in_child("check_packed", TRITON_INTERPRET="1")
