"""Which products a CUDA card computes, and by what: those of ternary layers, of all experts, and attention.
The card is declared, with its name and its capability."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import settings
from torch._subclasses.fake_tensor import FakeTensorMode

import model
from nanobit import experts, kernels, machine

CUDA = torch.device("cuda", 0)


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


@pytest.mark.parametrize(
    "capability, has_int8, has_compiler, is_fused",
    [((8, 0), True, True, True), ((7, 5), True, True, False), ((9, 0), False, True, False)]
    + [((8, 6), True, False, False)],
)
def test_the_fused_product_is_for_ampere_and_newer(
    card, monkeypatch, capability, has_int8, has_compiler, is_fused
):
    """Triton's int8 product is used on Ampere and newer, if Triton can compile and the card has int8."""
    card(capability=capability, has_int8=has_int8)
    monkeypatch.setattr(machine, "no_compiler", lambda device: {False: "no gcc", True: ""}[has_compiler])
    machine.pick("cuda")
    assert bool(kernels.fused_matmul) == is_fused


def test_a_fused_product_that_fails_is_reported_and_not_used(card, monkeypatch, capsys):
    """A card on which Triton fails, or computes other bits, uses cuBLAS, with a line that says why."""
    working = kernels.working_fused
    card()
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    wrong = SimpleNamespace(scaled_int8_matmul=lambda q, codes, *_: torch.zeros(len(q), len(codes)))
    for module, says in ((None, "ModuleNotFoundError"), (wrong, "its product of 40 x 200 x 48 is wrong")):
        monkeypatch.setitem(sys.modules, "nanobit.kernels_cuda", module)
        monkeypatch.setattr(kernels, "working_fused", lambda device: working(torch.device("cpu")))
        machine.pick("cuda")
        assert kernels.fused_matmul is None
        assert says in capsys.readouterr().err


def test_compiled_code_divides_exactly_if_it_divides_by_the_scales(card, monkeypatch):
    """Without the fused product, which divides exactly, compiled code has to; with it, it need not."""
    card()
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    for fused, value in (("the fused kernel", None), (None, "1")):
        monkeypatch.delenv("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING", raising=False)
        monkeypatch.setattr(kernels, "working_fused", lambda device, fused=fused: (fused, ""))
        machine.pick("cuda")
        assert os.environ.get("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING") == value


def test_the_product_of_all_experts_is_for_hopper(card, monkeypatch):
    """Cards of AMD report Hopper's capability, and do not have its product for all experts."""
    with FakeTensorMode():
        x = torch.empty(8, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(4, 64, 64, device="cuda")
    for capability, hip, pays in [((9, 0), None, True), ((9, 4), "7.0", False), ((12, 0), None, False)]:
        card("", capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert experts.grouped_mm_pays(x, weight) == pays


def test_repeated_heads_are_groups_of_heads(monkeypatch):
    """Attention with repeated keys and values has the logits and gradients of groups of heads."""
    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = []

    def spy(*args, enable_gqa, **options):
        grouped.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    results = []
    for repeats in (False, True):
        monkeypatch.setattr(model, "repeats_heads", lambda q, repeats=repeats: repeats)
        torch.manual_seed(0)
        net = model.Transformer(settings(n_head=4, n_kv_head=2))
        idx = torch.randint(28, (3, 16))
        loss, _ = net(idx, idx)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert grouped == [True, True, False, False]


def test_the_fused_product_asks_for_the_rounded_input(monkeypatch):
    """The fused product receives the rounded input, which is then stored for the backward."""
    received = []
    monkeypatch.setattr(kernels, "fused_matmul", lambda *operands: received.append(operands[-1]))
    with FakeTensorMode():
        x, x_scale, scale = (torch.empty(shape, device="cuda") for shape in ((32, 64), (32, 1), (1, 1)))
        codes = torch.empty(48, 64, dtype=torch.int8, device="cuda")
        kernels.scaled_matmul(x, x_scale, codes, scale, torch.bfloat16, x)
    assert received == [x]


def test_heads_are_repeated_on_cuda():
    """Keys and values are repeated for the heads of their group on CUDA alone."""
    with FakeTensorMode():
        assert model.repeats_heads(torch.empty(1, device="cuda"))
        assert not model.repeats_heads(torch.empty(1, device="cpu"))
