"""optim.py: schedules against hand-computed points, groups, and a first update that is not lost."""

import math

import pytest
import torch
from conftest import settings

import config
from model import Transformer
from nanobit import optim, schedule

BASE = dict(
    max_steps=1000,
    warmup_steps=10,
    learning_rate=1.0,
    stage2_lr_ratio=0.5,
    min_lr_ratio=0.1,
    weight_decay=0.1,
)


@pytest.mark.parametrize(
    "name, points",
    [
        # two lines that meet at the boundary; the update after step 500 is the first of stage 2
        ("two_stage", {10: 1.0, 255: 0.75, 500: 0.5, 750: 0.3, 1000: 0.1}),
        # E + (P - E)(1 - t/T): a drop at the boundary from 0.55 to 0.3
        ("bitnet", {10: 0.1 + 0.9 * 0.99, 499: 0.1 + 0.9 * 0.501, 500: 0.1 + 0.4 * 0.5, 1000: 0.1}),
        ("wsd", {10: 1.0, 669: 1.0, 670: 1.0, 835: 0.55, 1000: 0.1}),
        ("cosine", {10: 1.0, 505: 0.55, 1000: 0.1}),
        ("linear", {10: 1.0, 505: 0.55, 1000: 0.1}),
        ("constant", {10: 1.0, 999: 1.0}),
    ],
)
def test_schedules_hit_their_points(name, points):
    """bugs guarded: an off-by-one at the end of warm-up, at the boundary, at the end"""
    cfg = settings(schedule=name, **BASE)
    assert schedule.lr(cfg, 0) == pytest.approx(0.1), "a first update with rate zero is a lost batch"
    assert schedule.lr(cfg, 9) == pytest.approx(1.0)
    assert {step: schedule.lr(cfg, step) for step in points} == pytest.approx(points)


@pytest.mark.parametrize("name", config.CHOICES["schedule"])
def test_the_whole_schedule_scales_with_the_learning_rate(name):
    """bug guarded: a sweep over learning_rate that leaves the rates of stage 2 and of the end as they are"""
    rates = []
    for peak in (0.0, 1.0, 2.0):
        cfg = settings(schedule=name, **BASE | dict(learning_rate=peak))
        rates.append([schedule.lr(cfg, step) for step in range(1000)])
    assert not any(rates[0]) and rates[2] == [2 * rate for rate in rates[1]]


def test_weight_decay_ends_with_stage_1():
    """bug guarded: decay that ends one step off the boundary, or in schedules of one stage"""
    cfg = settings(schedule="two_stage", **BASE)
    assert [schedule.weight_decay(cfg, step) for step in (0, 499, 500, 999)] == [0.1, 0.1, 0.0, 0.0]
    assert [schedule.stage(cfg, step) for step in (499, 500)] == [1, 2]
    assert schedule.boundary_steps(cfg) == {499, 500}
    cfg = settings(schedule="cosine", **BASE)
    assert (
        schedule.weight_decay(cfg, 999) == 0.1
        and schedule.stage(cfg, 999) == 1
        and not schedule.boundary_steps(cfg)
    )


def test_warm_up_may_exceed_the_run():
    """bug guarded: a short trial of a long recipe divides by zero"""
    for name in ("two_stage", "bitnet", "wsd", "cosine", "linear", "constant"):
        cfg = settings(schedule=name, **BASE | dict(max_steps=5, warmup_steps=20))
        assert [schedule.lr(cfg, step) for step in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
        assert all(
            math.isfinite(schedule.lr(settings(schedule=name, **BASE | dict(max_steps=1)), s)) for s in (0, 1)
        )


def test_warm_up_may_pass_the_boundary():
    """bug guarded: a line that starts before the warm-up has ended, with a rate above the peak"""
    cfg = settings(schedule="two_stage", **BASE | dict(warmup_steps=600))
    assert (
        schedule.lr(cfg, 599) == 1.0
        and schedule.lr(cfg, 600) == 0.5
        and schedule.lr(cfg, 800) == pytest.approx(0.3)
    )
    cfg = settings(schedule="wsd", **BASE | dict(warmup_steps=800))
    assert schedule.lr(cfg, 799) == 1.0 and schedule.lr(cfg, 900) == pytest.approx(0.55)


def test_a_resumed_optimizer_takes_the_settings_of_today():
    """bug guarded: a changed beta that is announced but overwritten by the loaded state"""
    cfg = settings(beta2=0.98, adam_eps=1e-6)
    (optimizer,) = optim.make_optimizers(cfg, Transformer(cfg))
    assert all(g["betas"] == (0.9, 0.98) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    cfg = settings(beta2=0.5, adam_eps=1e-3)
    optim.set_rates([optimizer], cfg, 0)
    assert all(g["betas"] == (0.9, 0.5) and g["eps"] == 1e-3 for g in optimizer.param_groups)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_touches_only_the_matrices_of_the_blocks(tied):
    """bug guarded: weight decay on norms and embeddings; a parameter in no group is never trained"""
    cfg = settings(tie_embeddings=tied)
    model = Transformer(cfg)
    (optimizer,) = optim.make_optimizers(cfg, model)
    assert optim.set_rates([optimizer], cfg, 0) == (schedule.lr(cfg, 0), cfg.weight_decay)
    decays = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decays == {id(p) for name, p in model.named_parameters() if "proj" in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_step_that_is_not_finite_changes_nothing():
    """bug guarded: one NaN in a gradient poisons weights and optimizer state for ever"""
    cfg = settings()
    torch.manual_seed(0)
    model = Transformer(cfg)
    (optimizer,) = optim.make_optimizers(cfg, model)

    def update(bad):
        idx = torch.zeros(1, 16, dtype=torch.long)
        model(idx, idx)[0].backward()
        if bad:
            model.norm.weight.grad[0] = float("nan")
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        optimizer.zero_grad()

    update(False)
    before = (
        [p.clone() for p in model.parameters()],
        [s.clone() for v in optimizer.state.values() for s in v.values()],
    )
    update(True)
    after = list(model.parameters()), [s for v in optimizer.state.values() for s in v.values()]
    assert all(torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))


def with_grads(shapes, seed=0):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    return params


def apart(ours, theirs, dtype):
    """of each matrix, how far four steps of our Muon end from those of torch's, as a share of the way"""
    start = [p.detach().clone() for p in theirs]
    mine = optim.Muon([dict(params=ours, decays=True)], 0.01, 0.9, dtype)
    mine.param_groups[0]["weight_decay"] = 0.1
    other = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = b.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(4 * i + step))
        mine.step()
        other.step()
    return [((a - b).norm() / (b - s).norm()).item() for a, b, s in zip(ours, theirs, start)]


@pytest.mark.parametrize("shape", [(48, 48), (64, 24), (24, 64)])
def test_muon_is_that_of_torch(shape):
    """bugs guarded: a tall matrix orthogonalized along the wrong side, momentum or Nesterov's step off by
    one, decay with the adjusted rate"""
    (found,) = apart(with_grads([shape]), with_grads([shape]), torch.bfloat16)
    assert found < 0.02  # bfloat16 in another order of operations


def test_muon_is_that_of_torch_on_every_matrix(monkeypatch):
    """bug guarded: a matrix that gets the update of another of its shape"""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # torch's iteration in float32 too
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Transformer(settings()))
    ours, theirs = ([p for n, p in m.named_parameters() if n.endswith("_proj.weight")] for m in models)
    found = apart(ours, theirs, torch.float32)
    assert len(found) == 14 and len({p.shape for p in ours}) == 4  # square, tall and wide, of two blocks
    assert max(found) < 1e-3


def test_muon_takes_each_expert_by_itself():
    """bug guarded: a stack flattened into one tall matrix, whose updates are several times smaller"""
    stack, single = with_grads([(4, 32, 16)])[0], []
    for expert, grad in zip(stack.detach().clone(), stack.grad):
        single.append(torch.nn.Parameter(expert))
        single[-1].grad = grad.clone()
    for params in ([stack], single):
        optim.Muon([dict(params=params)], 0.01, 0.95, torch.float32).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-6)
    rms = (stack - with_grads([(4, 32, 16)])[0]).square().mean((-2, -1)).sqrt()
    assert ((rms > 0.8 * 0.2 * 0.01) & (rms < 1.2 * 0.2 * 0.01)).all(), "0.2 lr, as AdamW's"


def test_muon_skips_a_step_that_is_not_finite():
    """bug guarded: a NaN that stays in the momentum for ever"""
    params = with_grads([(8, 8), (2, 8, 8)])
    muon = optim.Muon([dict(params=params)], 0.01, 0.95, torch.float32)
    muon.step()
    before = [p.detach().clone() for p in params] + [muon.state[p]["momentum_buffer"].clone() for p in params]
    params[0].grad[0, 0] = float("nan")
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    after = [p.detach() for p in params] + [muon.state[p]["momentum_buffer"] for p in params]
    assert all(map(torch.equal, before, after))


def test_muon_takes_the_matrices_and_adamw_the_rest():
    """bug guarded: a router or an embedding under Muon, a parameter in no group or in two"""
    cfg = settings(optimizer="muon", n_expert=3, muon_momentum=0.8)
    model = Transformer(cfg)
    muon, adamw = optim.make_optimizers(cfg, model)
    optim.set_rates([muon, adamw], cfg, 3)
    names = {id(p): name for name, p in model.named_parameters()}
    (group,) = muon.param_groups
    assert {names[id(p)] for p in group["params"]} == {
        n for n in names.values() if n.endswith("_proj.weight")
    }
    assert group["lr"] == schedule.lr(cfg, 3) and group["weight_decay"] == 0.1 and group["momentum"] == 0.8
    rest = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    assert "embed.weight" in rest and "blocks.0.ffn.router.weight" in rest
    assert adamw.param_groups[0]["weight_decay"] == 0.0 and adamw.param_groups[0]["lr"] == group["lr"]
