"""nanobit/metrics.py: the mean loss, and the health of ternary layers and routers."""

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit import metrics
from nanobit.experts import bit_layers
from nanobit.kept_codes import keep_codes
from nanobit.metrics import mean_loss, router_health

Q_PROJ = "blocks.0.attn.q_proj"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(settings(n_layer=1))


IDX = torch.arange(16)[None]


def health(model, before=None):
    return metrics.health(model, before, IDX)[0]


def set_weights(model, *values):
    """Fill the matrix of the queries with a repeated row of four numbers."""
    with torch.no_grad():
        model.blocks[0].attn.q_proj.weight.copy_(torch.tensor([values]).repeat(32, 8))


def test_an_evaluation_refuses_stale_codes(model):
    """Weights that changed after keep_codes end an evaluation with an error."""
    keep_codes(model)
    set_weights(model, 1.0, 0.0, -1.0, 2.0)
    with pytest.raises(RuntimeError, match="keep_codes"):
        mean_loss(model, [(IDX, IDX)])
    with pytest.raises(RuntimeError, match="keep_codes"):
        health(model)


def test_health_begins_with_the_codes_of_gaussian_weights(model):
    """The fractions of a new model are those of Gaussian weights, 31.0 % zeros, and add up to 1."""
    total = health(model)["total"]
    assert total.keys() == set(metrics.HEALTH)
    assert total["zero"] + total["plus"] + total["minus"] == pytest.approx(1, abs=1e-5)
    assert total["zero"] == pytest.approx(0.31, abs=0.03)


def test_health_reports_the_scale_of_each_layer(model):
    """scale is mean|W| of the master weights."""
    w = model.blocks[0].attn.q_proj.weight
    assert health(model)["layers"][Q_PROJ]["scale"] == pytest.approx(w.abs().mean().item(), rel=1e-5)


def test_health_reports_the_largest_activation(model):
    """act_absmax is measured per layer, the total is the largest, and no probe stays in the model."""
    record = health(model)
    absmax = [row["act_absmax"] for row in record["layers"].values()]
    assert record["total"]["act_absmax"] == max(absmax) > min(absmax) > 0
    assert not any(layer._forward_pre_hooks for layer in bit_layers(model).values())


def test_health_leaves_a_model_in_training(model):
    """A model that trains continues to train."""
    health(model)
    assert model.training


def test_health_counts_codes_not_master_weights(model):
    """The fractions are those of the codes: |W| = 1.02 of a mean of 1.25 is a 1."""
    set_weights(model, 3.0, 1.02, -0.98, 0.0)  # mean 1.25: codes 1, 1, -1, 0
    row = health(model)["layers"][Q_PROJ]
    assert (row["plus"], row["minus"], row["zero"], row["near_threshold"]) == (0.5, 0.25, 0.25, 0)


def test_health_counts_weights_near_a_threshold(model):
    """near_threshold counts |W| / mean|W| within 0.05 of 0.5."""
    set_weights(model, 2.0, 0.54, -0.46, 1.0)  # mean 1: two within 0.05 of 0.5
    row = health(model)["layers"][Q_PROJ]
    assert (row["near_threshold"], row["plus"], row["zero"]) == (0.5, 0.75, 0.25)


def test_near_a_threshold_is_within_a_twentieth(model):
    """0.055 from the threshold is not near."""
    set_weights(model, 2.0, 0.555, -0.445, 1.0)  # mean 1
    assert health(model)["layers"][Q_PROJ]["near_threshold"] == 0


def test_the_scale_of_a_model_is_the_mean_over_its_layers(model):
    """In the total, a large layer has the weight of a small one in scale, and more of it in the fractions."""
    set_weights(model, 20.0, 0.0, 0.0, -20.0)
    record = health(model)
    sizes = {name: layer.weight.numel() for name, layer in bit_layers(model).items()}
    assert len(set(sizes.values())) > 1
    scales = [row["scale"] for row in record["layers"].values()]
    assert record["total"]["scale"] == pytest.approx(sum(scales) / len(scales), rel=1e-5)
    zeros = sum(record["layers"][name]["zero"] * size for name, size in sizes.items())
    assert record["total"]["zero"] == pytest.approx(zeros / sum(sizes.values()), rel=1e-5)


def test_health_counts_flips_since_the_last_codes(model):
    """flip_rate compares with the codes that are given, per layer, and is None without any."""
    assert health(model)["total"]["flip_rate"] is None
    set_weights(model, 2.0, 0.54, -0.46, 1.0)
    before = metrics.codes(model)
    with torch.no_grad():
        model.blocks[0].attn.q_proj.weight.neg_()  # every code that is not zero flips
    layers = health(model, before)["layers"]
    assert layers[Q_PROJ]["flip_rate"] == pytest.approx(1 - layers[Q_PROJ]["zero"], abs=1e-5)
    assert layers["blocks.0.attn.k_proj"]["flip_rate"] == 0


def test_health_returns_the_codes(model):
    """The second result is what codes() returns, ready for the next call."""
    record, codes = metrics.health(model, None, IDX)
    expected = metrics.codes(model)
    assert codes.keys() == expected.keys() == record["layers"].keys()
    assert all(torch.equal(codes[name], expected[name]) for name in codes)


def batches(*sizes):
    return [(torch.randint(0, 28, (n, 16)), torch.randint(0, 28, (n, 16))) for n in sizes]


def test_mean_loss_weighs_tokens_without_dropout():
    """The mean is over tokens, also if the last batch is smaller, and dropout is off."""
    torch.manual_seed(0)
    model = Transformer(settings(dropout=0.5))
    large, small = batches(4, 1)
    loss = mean_loss(model, [large, small])
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = (4 * model(*large)[0].item() + model(*small)[0].item()) / 5
    assert loss == pytest.approx(expected, rel=1e-6)


def test_mean_loss_can_be_stopped(model):
    """If stop() becomes true, there is no loss, no further batch is computed, and the model trains again."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert mean_loss(model, batches(1, 1, 1), stop=lambda: len(calls) == 2) is None
    assert len(calls) == 2
    assert model.training


def test_router_health_finds_busy_and_dead_experts():
    """Totals are means over blocks, load_max is relative to the mean, dead counts experts without tokens."""
    table = torch.tensor([[1.5, 2.0, 0.9, 0.5, 0.5, 0.0, 0.0], [1.0, 4.0, 0.7, 0.25, 0.25, 0.25, 0.25]])
    record = router_health(table)
    assert record["total"] == dict(balance=1.25, z=3.0, entropy=0.8, load_max=2.0, dead=2)
    assert record["layers"][0]["dead"] == 2
    assert record["layers"][0]["load"] == [0.5, 0.5, 0.0, 0.0]
    assert record["layers"][1]["load_max"] == 1.0
