"""nanobit/machine.py on a CUDA card that is declared, with its name, its capability and its faults."""

import pytest
import torch

from nanobit import machine

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Return a function that declares a CUDA card, as torch describes it."""

    def declare(name="NVIDIA GeForce RTX 3060", capability=(8, 6)):
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
