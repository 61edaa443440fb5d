"""nanobit/infer/head.py: each head gives the logits of its formula."""

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit.infer.head import Float32Head, Int8Head, set_head
from quant import quantize_activations


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lighter_head_leaves_the_embedding(form, dtype):
    """set_head rounds the head, and not the embedding that is tied to it."""
    model = Transformer(settings(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)).eval()
    idx = torch.randint(28, (1, 8))
    embed = model.embed.weight.clone()
    with torch.no_grad():
        before = model(idx)
        set_head(model, dtype)
        after = model(idx)
    assert torch.equal(model.embed.weight, embed)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize("shape", [(768, 101), (31, 5), (70, 64)])
def test_the_float32_head_is_a_product(form, shape):
    """One row is multiplied in fp32, up to the order of sums; several, and those of autocast, by torch."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape[::-1]), torch.randn(1, 2, shape[0])
    head = Float32Head(weight)
    exact = (x[:, :1].double() @ weight.double().t()).float()
    torch.testing.assert_close(head(x[:, :1]), exact, rtol=0, atol=1e-5 * shape[0] ** 0.5)
    assert torch.equal(head(x), x @ weight.t())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x[:, :1]), (x[:, :1] @ weight.t()))
    halves = Float32Head(weight.bfloat16())
    assert torch.equal(halves(x[:, :1].bfloat16()), x[:, :1].bfloat16() @ weight.bfloat16().t())


@pytest.mark.parametrize("change", ["a bias", "a subclass", "a sequence"])
def test_a_changed_head_is_kept(change):
    """In float32, a head that is not the Linear of model.py keeps what it computes."""
    model = Transformer(settings(tie_embeddings=False)).eval()
    linear, V = model.head, model.head.out_features
    if change == "a subclass":
        linear.__class__ = type("Half", (torch.nn.Linear,), {"forward": lambda self, x: 2 * x[..., :1]})
    if change == "a bias":
        linear.bias = torch.nn.Parameter(torch.ones(V))
    if change == "a sequence":
        model.head = torch.nn.Sequential(linear, torch.nn.Tanh())
    x = torch.randn(1, 1, linear.in_features)
    expected = model.head(x)
    set_head(model, "float32")
    assert torch.equal(model.head(x), expected)


@pytest.mark.parametrize("shape", [(768, 101), (31, 5), (70, 64)])
def test_the_int8_head_is_its_formula(form, shape):
    """Logits are integer sums by two scales, for one row and many, with the largest sums and autocast."""
    torch.manual_seed(0)
    weight = torch.randn(shape[::-1])
    weight[0] = weight[0].sign()
    x = torch.randn(2, 3, shape[0])
    x[0, 0] = weight[0]
    w_int, w_scale = quantize_activations(weight)
    x_int, x_scale = quantize_activations(x)
    expected = x_int @ w_int.t() / (w_scale.view(-1) * x_scale)  # whole numbers below 2^24: exact
    head = Int8Head(weight)
    assert torch.equal(head(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x[:1, :1]), expected[:1, :1])
    assert (expected - x @ weight.t()).abs().max() < 0.02 * expected.std() * shape[0] ** 0.5
