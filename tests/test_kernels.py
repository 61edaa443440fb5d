"""nanobit/kernels.py: every form of the integer product gives the same bits, and the fastest is used."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import quant
from nanobit import kernels
from quant import BitLinear

PRODUCTS = "oneDNN", "_int_mm", "fp32"  # how a CPU may compute the integer product
CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
WIDTHS = 768, 3072


def set_product(monkeypatch, product):
    """Make exact_matmul use this product, whatever the CPU has and whatever the sizes are."""
    if product == "oneDNN" and not kernels.HAS_INT8:
        pytest.skip("needs a CPU for which oneDNN has int8 products")
    monkeypatch.setattr(kernels, "HAS_VNNI", product == "_int_mm")
    monkeypatch.setattr(kernels, "int_matmul_pays", lambda *sizes: product != "fp32")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(33, 3072, 64), (7, 5, 3), (1, 768, 384), (0, 64, 48)])
def test_every_product_gives_the_same_bits(monkeypatch, shape, product):
    """Every product equals that of int64. Guards against sums of 16 bits that saturate, and odd widths."""
    n, n_in, n_out = shape
    torch.manual_seed(0)
    x_int = torch.randint(-128, 128, (n, n_in))
    codes = torch.randint(-1, 2, (n_out, n_in))
    if n:
        x_int[0], x_int[-1], codes[0], codes[-1] = 127, -128, 1, -1
    set_product(monkeypatch, product)
    assert torch.equal(kernels.exact_matmul(x_int.float(), codes.float()), (x_int @ codes.T).float())


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_layer_uses_the_product_of_its_cpu(monkeypatch, product):
    """BitLinear computes with the product that exact_matmul chooses, and with no other."""
    names = {"oneDNN": "nanobit::int8_matmul", "_int_mm": "aten::_int_mm"}
    set_product(monkeypatch, product)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        BitLinear(64, 48)(torch.randn(8, 64))
    calls = {event.key for event in profile.key_averages()} & set(names.values())
    assert calls == ({names[product]} if product in names else set())


def test_avx2_uses_int8_for_large_products_only(monkeypatch):
    """Without VNNI, oneDNN's int8 product is used only for sizes that pay for reordering the weights."""
    monkeypatch.setattr(kernels, "HAS_INT8", True)
    monkeypatch.setattr(kernels, "HAS_VNNI", False)
    assert kernels.int_matmul_pays(CPU, 1024, *WIDTHS)
    assert kernels.int_matmul_pays(CPU, 512, 768, 384)
    assert not kernels.int_matmul_pays(CPU, 1, *WIDTHS)
    assert not kernels.int_matmul_pays(CPU, 511, *WIDTHS)
    assert not kernels.int_matmul_pays(CPU, 768, 128, 512)


def test_a_cpu_without_int8_products_uses_floats(monkeypatch):
    """ARM, and CPUs older than AVX, always use the float product."""
    monkeypatch.setattr(kernels, "HAS_INT8", False)
    monkeypatch.setattr(kernels, "HAS_VNNI", False)
    assert not kernels.int_matmul_pays(CPU, 1024, *WIDTHS)


def test_vnni_uses_int8_for_a_single_row(monkeypatch):
    """A CPU with int8 units uses them for every number of rows."""
    monkeypatch.setattr(kernels, "HAS_INT8", False)
    monkeypatch.setattr(kernels, "HAS_VNNI", True)
    assert kernels.int_matmul_pays(CPU, 1, *WIDTHS)


def test_gpus_use_int8_for_the_sizes_of_cublas(monkeypatch):
    """CUDA uses int8 for more than 16 rows and widths that are multiples of 8, MPS never."""
    monkeypatch.setattr(kernels, "HAS_VNNI", True)
    assert kernels.int_matmul_pays(CUDA, 17, *WIDTHS)
    assert not kernels.int_matmul_pays(CUDA, 16, *WIDTHS)
    assert not kernels.int_matmul_pays(CUDA, 17, 768, 3070)
    assert not kernels.int_matmul_pays(MPS, 1024, *WIDTHS)


def test_a_width_without_exact_sums_is_refused():
    """A width whose sums could exceed 2^24 is an error, not a rounded product."""
    with pytest.raises(AssertionError, match="not exact"):
        kernels.exact_matmul(torch.ones(1, 140_000), torch.ones(1, 140_000))


class Calls(TorchDispatchMode):
    """The operators that torch calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_on_cuda_are_fp32_products(dtype):
    """On CUDA a product for gradients returns its fp32 sums, without a cast of the result."""
    with FakeTensorMode():
        a = torch.empty(8, 16, device="cuda", dtype=dtype)
        with Calls() as calls:
            assert kernels.fp32_matmul(a, a.t()).dtype == torch.float32
    assert ("aten.mm.dtype" in calls.names) == (dtype != torch.float32)
    assert "aten._to_copy.default" not in calls.names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_float16_do_not_overflow(monkeypatch, dtype):
    """dy @ t, which is much larger than dx, leaves the product as fp32, and so does dW."""
    monkeypatch.setattr(quant, "fp32_matmul", lambda a, b: a.float() @ b.float())
    layer = BitLinear(64, 512)
    torch.nn.init.constant_(layer.weight, 1e-2)
    x = torch.zeros(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.backward(torch.full_like(y, 500))
    assert x.grad.isfinite().all()
    assert x.grad[0, 0].item() == pytest.approx(512 * 500 * 1e-2, rel=1e-2)
