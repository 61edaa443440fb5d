"""nanobit/machine.py on a CUDA card that is declared, with its name, its capability and its faults."""

import pytest
import torch

from nanobit import kernels, machine

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Return a function that declares a CUDA card, as torch describes it."""

    monkeypatch.setattr(kernels, "HAS_CUDA_INT8", True)  # pick() sets it

    def declare(name="NVIDIA GeForce RTX 3060", capability=(8, 6), has_int8=True):
        monkeypatch.setattr(kernels, "multiplies_int8", lambda device: has_int8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: capability >= (8, 0))

    return declare


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_the_peak_is_that_of_the_whole_name(card, name, tflops):
    """The peak of a card is known by its whole name, in 16-bit floats only."""
    card(name)
    assert machine.peak_flops(CUDA, torch.bfloat16) == machine.peak_flops(CUDA, torch.float16)
    assert machine.peak_flops(CUDA, torch.bfloat16) == (tflops and tflops * 1e12)
    assert machine.peak_flops(CUDA, torch.float32) is None
    assert machine.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_card_without_int8_products_uses_floats(card, capsys):
    """A card whose cuBLAS refuses int8 is reported once, and its ternary layers multiply floats."""
    for has_int8 in (True, False):
        card("NVIDIA GeForce GTX 1650", (7, 5), has_int8)
        assert machine.pick("auto") == CUDA
        assert kernels.int_matmul_pays(CUDA, 1024, 768, 768) == has_int8
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "GTX 1650 has no int8 products" in err


def refused(a, b):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")


@pytest.mark.parametrize(
    "product, works",
    [(torch._int_mm, True), (refused, False), (lambda a, b: torch._int_mm(a, b) + 1, False)],
    ids=["right", "refused", "wrong"],
)
def test_int8_products_are_tried(monkeypatch, product, works):
    """An int8 product that raises, or gives wrong sums, is not used."""
    monkeypatch.setattr(torch, "_int_mm", product)
    assert kernels.multiplies_int8(torch.device("cpu")) == works
