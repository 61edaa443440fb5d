"""nanobit/cards.py: the peak of a CUDA card by its name, and why torch cannot use a card."""

import os

import pytest
import torch

from nanobit import cards, machine

CUDA = torch.device("cuda", 0)


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
    assert cards.peak_flops(CUDA, torch.bfloat16) == cards.peak_flops(CUDA, torch.float16)
    assert cards.peak_flops(CUDA, torch.bfloat16) == (tflops and tflops * 1e12)
    assert cards.peak_flops(CUDA, torch.float32) is None
    assert cards.peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Return a function that makes nvidia-smi print a text and end with an exit code."""

    def declare(text, code=0):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        os.chmod(tmp_path / "nvidia-smi", 0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return declare


@pytest.mark.parametrize(
    "text, code, cuda, says",
    [
        (
            "GPU 0: NVIDIA RTX A6000 (UUID: x)",
            0,
            "13.0",
            "A6000, but torch 2.99 needs a driver for CUDA 13.0",
        ),
        ("GPU 0: NVIDIA RTX A6000 (UUID: x)", 0, None, "A6000, but torch 2.99 is built without CUDA"),
        ("NVIDIA-SMI has failed", 9, "13.0", "nvidia-smi fails: NVIDIA-SMI has failed"),
    ],
)
def test_a_card_that_torch_does_not_see_is_reported(monkeypatch, nvidia_smi, capsys, text, code, cuda, says):
    """A card that nvidia-smi knows and torch does not is one line with auto, and an error with cuda."""
    nvidia_smi(text, code)
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # by the driver's own library
    assert machine.pick("auto").type == "cpu"
    assert machine.pick("cpu").type == "cpu"
    err = capsys.readouterr().err
    assert err.startswith("warning: computing on cpu: ")
    assert says in err
    assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        machine.pick("cuda")
    assert says in (err := capsys.readouterr().err)
    assert err.startswith("error: device = 'cuda' cannot be used: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.pick("auto").type == "cpu"
    assert not capsys.readouterr().err, "the card is hidden on purpose"


def test_nvidia_smi_that_hangs_is_reported(monkeypatch, nvidia_smi, capsys):
    """A driver that does not answer costs seconds and a line, not the command."""
    nvidia_smi("")
    run = cards.subprocess.run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def hang(*args, timeout, **options):
        return run(["sleep", "30"], timeout=timeout / 100)

    monkeypatch.setattr(cards.subprocess, "run", hang)
    assert machine.pick("auto").type == "cpu"
    assert "nvidia-smi does not answer" in capsys.readouterr().err


def test_a_card_without_code_in_torch_is_reported(card, capsys):
    """A card older than all code in torch is not used; newer and AMD's cards are."""
    card("NVIDIA GeForce GTX 1080", (6, 1))
    assert machine.pick("auto").type == "cpu"
    assert "no code for NVIDIA GeForce GTX 1080, compute capability 6.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        machine.pick("cuda:0")
    assert "error: device = 'cuda:0' cannot be used: torch" in capsys.readouterr().err
    card("NVIDIA GeForce RTX 5090", (12, 0))
    assert machine.pick("auto") == CUDA
    card("AMD Radeon RX 7900", (11, 0))
    torch.cuda.get_arch_list = lambda: ["gfx1100"]  # monkeypatch restores it
    assert machine.pick("auto") == CUDA
