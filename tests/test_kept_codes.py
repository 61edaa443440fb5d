"""nanobit/kept_codes.py: codes that are made once after an update are those that each forward would make."""

import pytest
import torch
from test_quant import layer, reference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import quant
from nanobit import kept_codes
from nanobit.experts import BitExperts
from nanobit.kept_codes import check_codes, keep_codes, write_codes, write_scales


def stepped(model, x, keep):
    """Return output and gradients of a model after a step of SGD, with kept codes or without."""
    if keep:
        if keep == "floats":
            model.kept_floats = torch.empty(48, 64, dtype=torch.bfloat16)
        keep_codes(model)
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
        if keep:
            keep_codes(model)
    return [y, x.grad.clone(), *(p.grad for p in model.parameters())]


def test_kept_codes_give_the_same_bits():
    """With kept codes, renewed after a step, outputs and gradients are those of a layer without; so they are
    if the codes are kept as floats too, as on CUDA, which the backward then reads."""
    x = torch.randn(9, 64, requires_grad=True)
    alone, *others = [stepped(layer(), x, keep) for keep in (False, True, "floats")]
    for kept in others:
        assert all(map(torch.equal, alone, kept))
    bit = layer()
    stepped(bit, x, "floats")
    grads = []
    for _ in range(2):
        grads += torch.autograd.grad(bit(x).sum(), x)
        bit.kept_floats *= 2
    assert torch.equal(grads[1], 2 * grads[0])


def test_scales_made_together_are_those_of_each_matrix():
    """The scales of many matrices, as they are made on a GPU, are those of weight_scale to the last bit, and
    the codes that are then written are those of ternarize."""
    weights = [torch.randn(8, 16), torch.zeros(3, 5), 1e-4 * torch.randn(768, 3072), torch.randn(4, 20, 7)]
    kept = [[torch.ones_like(w, dtype=torch.int8), torch.empty_like(w[..., :1, :1]), None] for w in weights]
    kept[0][2] = torch.empty(8, 16, dtype=torch.bfloat16)
    write_scales(weights, [scale for _, scale, _ in kept])
    for w, (_, scale, _) in zip(weights, kept):
        assert torch.equal(scale, quant.weight_scale(w))
        scale.mul_(2)
    write_codes(weights, kept, True)
    for w, (codes, scale, _) in zip(weights, kept):
        assert torch.equal(codes, (w * scale).round().clamp(-1, 1).to(torch.int8))
    assert torch.equal(kept[0][2].float(), kept[0][0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_float_codes_have_the_dtype_of_the_run(monkeypatch, dtype):
    """On CUDA one call writes the codes of all layers, as floats too in a 16-bit dtype of the run. Guards
    against bfloat16 on a card that has no units for it: there torch.compile refuses it."""
    calls = []
    monkeypatch.setattr(kept_codes, "write_codes", lambda *operands: calls.append(operands))
    with FakeTensorMode():  # a CUDA device without a card
        model = nn.Sequential(layer(), layer(48, 64), BitExperts(3, 64, 16))
        for bit in model:
            bit.weight = nn.Parameter(torch.empty(bit.weight.shape, device="cuda"))
        keep_codes(model, dtype=dtype)
    assert len(calls) == 1
    expected = dtype if dtype in (torch.bfloat16, torch.float16) else None
    assert [getattr(bit.kept_floats, "dtype", None) for bit in model] == 3 * [expected]


def test_kept_codes_are_not_saved():
    """The state dict of a layer has its master weights only."""
    bit = layer()
    bit.kept_floats = torch.empty(48, 64, dtype=torch.bfloat16)
    keep_codes(bit)
    assert list(bit.state_dict()) == ["weight"]


def test_a_layer_alone_follows_its_weight():
    """Without kept codes, a forward is that of the weight as it is, however it was changed."""
    bit, x = layer(), torch.randn(3, 64)
    bit.weight.data.mul_(torch.linspace(0.1, 2, 64))
    assert torch.equal(bit(x), reference(x, bit.weight))
    check_codes(bit)


def test_weights_changed_behind_kept_codes_are_an_error():
    """check names the layer whose weight is not that of its codes any more."""
    model = nn.Sequential(layer(), layer(48, 64))
    keep_codes(model)
    check_codes(model)
    with torch.no_grad():
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="1: its weight has changed"):
        check_codes(model)
    keep_codes(model)
    check_codes(model)


def test_a_weight_that_was_replaced_is_noticed():
    """Another Parameter in the place of the weight makes the kept codes stale, though versions are equal."""
    bit = layer()
    keep_codes(bit)
    bit.load_state_dict(layer(seed=1).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="has changed"):
        check_codes(bit)


def test_codes_are_kept_in_inference_mode():
    """Weights that were made in inference mode have no version, and can be kept."""
    with torch.inference_mode():
        bit = layer()
        keep_codes(bit)
        check_codes(bit)
        assert torch.equal(bit(torch.ones(1, 64)), reference(torch.ones(1, 64), bit.weight))
