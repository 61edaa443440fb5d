"""The mixture of experts: against a loop over tokens, over experts, and what its routers tell."""

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
from nanobit.metrics import mean_loss, router_health

MIX = dict(n_expert=4, n_expert_active=2)


def small_experts(**changes):
    """a layer whose router has preferences"""
    torch.manual_seed(1)
    model = Transformer(settings(**MIX | changes))
    layer = model.blocks[0].ffn
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    return layer, model.cfg


def by_hand(layer, x, linear):
    """Mixtral's layer for tokens x (N, C), one after another, from its formula"""
    rows = []
    for row in x:
        chance = (layer.router.weight @ row).softmax(0)
        best = sorted(range(len(chance)), key=lambda e: -chance[e])[: layer.n_active]
        out = torch.zeros_like(row)
        for e in best:
            gate, up, down = (p.weight[e] for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
            h = F.silu(linear(row[None], gate)) * linear(row[None], up)
            total = sum(chance[i] for i in best) if len(best) > 1 else 1.0
            out = out + chance[e] / total * linear(h, down)[0]
        rows.append(out)
    return torch.stack(rows)


def bit_linear(x, w):
    layer = quant.BitLinear(w.shape[1], w.shape[0])
    layer.weight = torch.nn.Parameter(w.detach())
    return layer(x)


@pytest.mark.parametrize("ternary", [True, False])
@pytest.mark.parametrize("active", [1, 2, 4])
def test_experts_are_mixtrals(ternary, active):
    """bugs guarded: a token's output given to another, weights that do not sum to 1, one scale for all
    experts"""
    layer, cfg = small_experts(ternary=ternary, n_expert_active=active)
    x = torch.randn(2, 9, cfg.n_embd)
    with torch.no_grad():
        y, _ = layer(x)
        want = by_hand(layer, x.view(-1, cfg.n_embd), bit_linear if ternary else F.linear)
        torch.testing.assert_close(y.view_as(want), want, rtol=1e-4, atol=1e-5)
        alone = layer(x[1:, 4:5])[0]  # nothing is dropped or crowded out: the batch does not matter
        torch.testing.assert_close(alone[0, 0], y[1, 4], rtol=1e-4, atol=1e-5)


def test_the_grouped_product_is_the_loop(monkeypatch):
    """bug guarded: the fast path on CUDA trains another model than the one that is tested here"""
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


def test_an_expert_without_tokens_is_no_trouble():
    """bug guarded: no gradient, on which DDP waits for ever, or NaN from an empty mean"""
    for ternary in (True, False):
        layer, cfg = small_experts(ternary=ternary)
        with torch.no_grad():
            layer.router.weight[2:] = -layer.router.weight[:1].sign() * 100 * layer.router.weight[:1].abs()
            x = layer.router.weight[0].sign().expand(1, 5, -1) + 0.01 * torch.randn(1, 5, cfg.n_embd)
        y, router = layer(x)
        y.sum().backward()
        assert router[5:].tolist() == [0.0, 0.0] and y.isfinite().all()
        for p in (layer.gate_proj, layer.up_proj, layer.down_proj):
            assert p.weight.grad.isfinite().all() and not p.weight.grad[2:].any() and p.weight.grad[:2].any()


def test_what_routers_tell():
    """bugs guarded: a balance loss that is not 1 when even, or has no gradient; a dead expert not counted"""
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
    assert router_loss(cfg, None) == 0.0
    table = torch.tensor([[1.5, 2.0, 0.9, 0.5, 0.5, 0.0, 0.0], [1.0, 4.0, 0.7, 0.25, 0.25, 0.25, 0.25]])
    found = router_health(table)
    assert found["total"] == dict(balance=1.25, z=3.0, entropy=0.8, load_max=2.0, dead=2)
    assert found["layers"][0]["dead"] == 2 and found["layers"][1]["load_max"] == 1.0
    assert found["layers"][0]["load"] == [0.5, 0.5, 0.0, 0.0]

    # on tokens that differ, from the formulas
    layer, cfg = small_experts()
    x = torch.randn(1, 64, cfg.n_embd)
    _, router = layer(x)
    logits = x[0] @ layer.router.weight.T
    chance = logits.softmax(-1)
    load = torch.bincount(chance.topk(2).indices.flatten(), minlength=4) / 128
    torch.testing.assert_close(router[3:], load)
    torch.testing.assert_close(router[0], 4 * (load * chance.mean(0)).sum())
    torch.testing.assert_close(router[1], logits.logsumexp(-1).square().mean())
    router[1].backward()
    assert layer.router.weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):  # the router stays in fp32
        torch.testing.assert_close(layer(x)[1], router, rtol=1e-6, atol=0)

    # the Switch loss: of all tokens to two experts that are likely for all, and its gradient evens them out
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
    """bug guarded: auxiliary losses that are logged and never trained"""
    how = dict(n_expert=3, max_steps=1, sample_every=0, eval_every=0, save_every=0)
    norms = []
    for balance, z in ((0.0, 0.0), (10.0, 0.0), (0.0, 10.0)):
        run_id = f"r{balance}{z}"
        train(data_dir, out_dir, run_id, router_balance=balance, router_z=z, **how)
        norms.append(lines(f"{out_dir}/{run_id}", SCALARS)[0]["grad_norm"])
    assert len({*norms}) == 3


def test_experts_in_a_model():
    """bugs guarded: auxiliary losses in the validation loss; experts left out of ternary health or of the
    counts; initial weights of a stack by the wrong width"""
    cfg = settings(**MIX, n_embd=64, ffn_dim=48)
    torch.manual_seed(0)
    model = Transformer(cfg)
    idx = torch.randint(0, 28, (3, 16))
    with torch.no_grad():
        want = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert mean_loss(model, [(idx, idx)]) == pytest.approx(want.item(), rel=1e-6)
    assert abs(want.item() - math.log(28)) < 0.3
    counts, stack = model.counts(), 4 * 48 * 64
    assert counts["total"] - counts["active"] == 2 * 3 * stack // 2
    assert counts["ternary"] == sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    health, codes = metrics.health(model, metrics.codes(model), idx)
    row = health["layers"]["blocks.1.ffn.down_proj"]
    assert row["flip_rate"] == 0.0 and abs(row["zero"] - 0.31) < 0.02 and row["act_absmax"] > 0
    assert codes["blocks.1.ffn.down_proj"].shape == (4, 64, 48)
    assert model.blocks[0].ffn.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.blocks[0].ffn.down_proj.weight.std().item() == pytest.approx((48 * 4) ** -0.5, rel=0.1)


def test_padding_of_the_vocabulary_changes_nothing():
    """bug guarded: rows of padding that take part in the loss or are sampled"""
    torch.manual_seed(0)
    plain, padded = Transformer(settings()), Transformer(settings(vocab_multiple=64))
    assert (
        padded.embed.weight.shape[0] == 64 and padded.counts()["total"] - plain.counts()["total"] == 36 * 32
    )
    state = plain.state_dict()
    for name in ("embed.weight", "head.weight"):
        state[name] = torch.cat((state[name], torch.full((36, 32), 7.0)))
    padded.load_state_dict(state)
    idx = torch.randint(0, 28, (2, 16))
    torch.testing.assert_close(padded(idx), plain(idx), rtol=0, atol=0)
    loss, _ = padded(idx, idx)
    loss.backward()
    torch.testing.assert_close(loss, plain(idx, idx)[0], rtol=0, atol=0)
    assert not padded.embed.weight.grad[28:].any()


def test_a_copy_computes_with_its_own_experts():
    """bug guarded: a method kept as an attribute, which goes on with the layers of the original"""
    model = Transformer(settings(n_layer=1, n_expert=4)).eval()
    other, idx = copy.deepcopy(model), torch.randint(28, (1, 8))
    with torch.no_grad():
        other.blocks[0].ffn.down_proj.weight.zero_()
        assert not torch.equal(model(idx), other(idx))
