"""nanobit/infer/head.py: a head of fewer bits gives the logits of its formula."""

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit.infer.head import Int8Head, lighten_head
from quant import quantize_activations


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lighter_head_leaves_the_embedding(form, dtype):
    """lighten_head rounds the head, and not the embedding that is tied to it."""
    model = Transformer(settings(n_layer=2, n_embd=64, n_head=4, n_kv_head=2, ffn_dim=96, seq_len=32)).eval()
    idx = torch.randint(28, (1, 8))
    embed = model.embed.weight.clone()
    with torch.no_grad():
        before = model(idx)
        lighten_head(model, dtype)
        after = model(idx)
    assert torch.equal(model.embed.weight, embed)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


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
