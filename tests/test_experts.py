"""nanobit/experts.py: the mixture against a loop over tokens, and what its routers report."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SCALARS, lines, settings, train

import quant
from model import Transformer
from nanobit import experts, metrics
from nanobit.experts import router_loss
from nanobit.kept_codes import keep_codes
from nanobit.metrics import mean_loss

MIX = dict(n_expert=4, n_expert_active=2)


def small_experts(**changes):
    """Return a layer whose router has preferences, and its cfg."""
    torch.manual_seed(1)
    model = Transformer(settings(**MIX | changes))
    layer = model.blocks[0].ffn
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    return layer, model.cfg


def by_hand(layer, x, linear):
    """Return the output of Mixtral's layer for tokens x (N, C), one after another, from its formula."""
    rows = []
    for row in x:
        probs = (layer.router.weight @ row).softmax(0)
        best = sorted(range(len(probs)), key=lambda e: -probs[e])[: layer.n_active]
        out = torch.zeros_like(row)
        for e in best:
            gate, up, down = (p.weight[e] for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
            h = F.silu(linear(row[None], gate)) * linear(row[None], up)
            total = sum(probs[i] for i in best) if len(best) > 1 else 1.0
            out = out + probs[e] / total * linear(h, down)[0]
        rows.append(out)
    return torch.stack(rows)


def bit_linear(x, w):
    layer = quant.BitLinear(w.shape[1], w.shape[0])
    layer.weight = torch.nn.Parameter(w.detach())
    return layer(x)


@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("active", [1, 2, 4])
def test_experts_are_mixtrals(ternary, active):
    """The layer is Mixtral's, and the rest of the batch does not matter. Guards against outputs given to
    another token, weights that do not sum to 1, and one scale for all experts."""
    layer, cfg = small_experts(ternary=ternary, n_expert_active=active)
    x = torch.randn(2, 9, cfg.n_embd)
    with torch.no_grad():
        y, _ = layer(x)
        want = by_hand(layer, x.view(-1, cfg.n_embd), bit_linear if ternary else F.linear)
        torch.testing.assert_close(y.view_as(want), want, rtol=1e-4, atol=1e-5)
        alone = layer(x[1:, 4:5])[0]  # nothing is dropped or crowded out: the batch does not matter
        torch.testing.assert_close(alone[0, 0], y[1, 4], rtol=1e-4, atol=1e-5)


def test_the_grouped_product_is_the_loop(monkeypatch):
    """The grouped product, the fast path on CUDA, gives the outputs and gradients of the loop."""
    layer, cfg = small_experts(ternary=False, n_embd=64, ffn_dim=32)
    results = []
    for pays in (False, True):
        monkeypatch.setattr(experts, "grouped_mm_pays", lambda *_, pays=pays: pays)
        layer.zero_grad()
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, router = layer(x)
        (y.float().square().sum() + router[0]).backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * a.abs().max().item())


def test_kept_codes_of_experts_give_the_same_bits():
    """Experts with kept codes compute what they compute without."""
    layer, cfg = small_experts(ternary=True)
    x = torch.randn(2, 8, cfg.n_embd)
    results = []
    for floats in (None, None, layer.down_proj.weight.detach().bfloat16()):
        layer.down_proj.kept_floats = floats  # as on CUDA
        if results:
            keep_codes(layer)
            assert layer.down_proj.kept_codes.dtype == torch.int8
        layer.zero_grad()
        y, _ = layer(x)
        y.sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
    for kept in results[1:]:
        assert all(map(torch.equal, results[0], kept))


@pytest.mark.parametrize("ternary", [True, False])
def test_an_expert_without_tokens_has_zero_gradients(ternary):
    """An expert without tokens has a gradient, of zeros: without one, DDP would wait for ever."""
    layer, cfg = small_experts(ternary=ternary)
    with torch.no_grad():
        layer.router.weight[2:] = -layer.router.weight[:1].sign() * 100 * layer.router.weight[:1].abs()
        x = layer.router.weight[0].sign().expand(1, 5, -1) + 0.01 * torch.randn(1, 5, cfg.n_embd)
    y, router = layer(x)
    y.sum().backward()
    assert router[5:].tolist() == [0.0, 0.0]
    assert y.isfinite().all()
    for stack in (layer.gate_proj, layer.up_proj, layer.down_proj):
        assert stack.weight.grad.isfinite().all()
        assert stack.weight.grad[:2].any()
        assert not stack.weight.grad[2:].any()


def test_a_router_without_preferences_is_even():
    """Zero logits give a balance of 1, the z and entropy of equal probabilities, and loads that sum to 1."""
    cfg = settings(**MIX, router_balance=0.5, router_z=0.25)
    model = Transformer(cfg)
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.router.weight)
    idx = torch.randint(0, 28, (2, 16))
    _, router = model(idx, idx)
    assert router.shape == (cfg.n_layer, 3 + 4)
    torch.testing.assert_close(router[:, 0], torch.ones(2))
    torch.testing.assert_close(router[:, 1], torch.full((2,), math.log(4) ** 2))
    torch.testing.assert_close(router[:, 2], torch.full((2,), math.log(4)))
    torch.testing.assert_close(router[:, 3:].sum(1), torch.ones(2))
    torch.testing.assert_close(router_loss(cfg, router), torch.tensor(0.5 + 0.25 * math.log(4) ** 2))


def test_a_model_without_routers_adds_no_loss():
    """Without experts the routers add nothing to the loss."""
    assert router_loss(settings(), None) == 0.0


def test_what_a_router_reports_follows_the_formulas():
    """Load, balance and z are those of the formulas, in fp32 also under autocast, and z has a gradient."""
    layer, cfg = small_experts()
    x = torch.randn(1, 64, cfg.n_embd)
    _, router = layer(x)
    logits = x[0] @ layer.router.weight.T
    probs = logits.softmax(-1)
    load = torch.bincount(probs.topk(2).indices.flatten(), minlength=4) / 128
    torch.testing.assert_close(router[3:], load)
    torch.testing.assert_close(router[0], 4 * (load * probs.mean(0)).sum())
    torch.testing.assert_close(router[1], logits.logsumexp(-1).square().mean())
    router[1].backward()
    assert layer.router.weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x)[1], router, rtol=1e-6, atol=0)


def test_the_gradient_of_the_balance_evens_the_load():
    """Gradient descent on the balance loss brings it near 1, its value for an even load."""
    layer, cfg = small_experts()
    x = torch.randn(1, 64, cfg.n_embd)
    before = layer(x)[1][0].item()
    step = torch.optim.SGD([layer.router.weight], lr=0.3)
    for _ in range(30):
        step.zero_grad()
        layer(x)[1][0].backward()
        step.step()
    assert 0.95 < layer(x)[1][0].item() < before


def test_the_loss_that_is_trained_has_the_routers(data_dir, out_dir):
    """Each auxiliary loss changes the gradient of train.py, not only its log."""
    changes = dict(n_expert=3, n_layer=1, max_steps=1, sample_every=0, eval_every=0, save_every=0)
    norms = []
    for balance, z in ((0.0, 0.0), (10.0, 0.0), (0.0, 10.0)):
        run_id = f"r{balance}{z}"
        train(data_dir, out_dir, run_id, router_balance=balance, router_z=z, **changes)
        norms.append(lines(f"{out_dir}/{run_id}", SCALARS)[0]["grad_norm"])
    assert len({*norms}) == 3


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    return Transformer(settings(**MIX, n_embd=64, ffn_dim=48))


IDX = torch.arange(48).view(3, 16) % 28


def test_the_validation_loss_is_the_cross_entropy_alone(mixture):
    """Auxiliary losses are not part of the mean loss, which begins near ln(V)."""
    with torch.no_grad():
        expected = F.cross_entropy(mixture(IDX).flatten(0, 1), IDX.flatten()).item()
    assert mean_loss(mixture, [(IDX, IDX)]) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(math.log(28), abs=0.3)


def test_idle_experts_are_not_active_parameters(mixture):
    """Two of four experts are active, and all matrices of all experts are ternary."""
    counts = mixture.counts()
    stack = 4 * 48 * 64
    assert counts["total"] - counts["active"] == 2 * 3 * stack // 2
    assert counts["ternary"] == sum(p.numel() for n, p in mixture.named_parameters() if "_proj" in n)


def test_experts_have_ternary_health(mixture):
    """Ternary health covers the experts, whose codes are one tensor (E, out, in)."""
    health, codes = metrics.health(mixture, metrics.codes(mixture), IDX)
    row = health["layers"]["blocks.1.ffn.down_proj"]
    assert row["flip_rate"] == 0.0
    assert row["zero"] == pytest.approx(0.31, abs=0.02)
    assert row["act_absmax"] > 0
    assert codes["blocks.1.ffn.down_proj"].shape == (4, 64, 48)


def test_experts_begin_like_dense_layers(mixture):
    """Initial weights of a stack depend on the width of one expert."""
    ffn = mixture.blocks[0].ffn
    assert ffn.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert ffn.down_proj.weight.std().item() == pytest.approx((48 * 4) ** -0.5, rel=0.1)


def test_a_copy_computes_with_its_own_experts():
    """A deep copy of a mixture uses its own weights: a bound method would use those of the original."""
    model = Transformer(settings(n_layer=1, n_expert=4)).eval()
    other = copy.deepcopy(model)
    idx = torch.randint(28, (1, 8))
    with torch.no_grad():
        other.blocks[0].ffn.down_proj.weight.zero_()
        assert not torch.equal(model(idx), other(idx))
