"""The optimizers: which parameters each one takes, that Muon is torch's, and one update with them."""

import math

import pytest
import torch
from conftest import settings

from model import Transformer
from nanobit import distributed, optim, schedule
from nanobit.kept_codes import check_codes, keep_codes


def test_a_resumed_optimizer_takes_the_settings_of_today():
    """A resumed run uses the betas and eps of its settings, not those of the loaded state."""
    cfg = settings(beta2=0.98, adam_eps=1e-6)
    model = Transformer(cfg)
    (optimizer,) = optim.make_optimizers(cfg, model)
    assert all(g["betas"] == (0.9, 0.98) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    cfg = settings(beta2=0.5, adam_eps=1e-3)
    saved = optimizer.state_dict()
    (optimizer,) = optim.make_optimizers(cfg, model)
    distributed.load(model, [optimizer], model.state_dict(), [saved])
    assert all(g["betas"] == (0.9, 0.5) and g["eps"] == 1e-3 for g in optimizer.param_groups)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_touches_only_the_matrices_of_the_blocks(tied):
    """Weight decay never touches norms and embeddings, and each parameter is in a group."""
    cfg = settings(tie_embeddings=tied)
    model = Transformer(cfg)
    (optimizer,) = optim.make_optimizers(cfg, model)
    assert optim.set_rates([optimizer], cfg, 0) == (schedule.lr(cfg, 0), cfg.weight_decay)
    decays = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decays == {id(p) for name, p in model.named_parameters() if "proj" in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_adamw_skips_a_step_that_is_not_finite():
    """A fused AdamW with found_inf = 1 leaves its weights and its state as they are."""
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


# one update


def model_with_gradients(**changes):
    """Return (model with the gradients of one batch, its optimizers)."""
    cfg = settings(**changes)
    torch.manual_seed(0)
    model = Transformer(cfg)
    idx = torch.randint(cfg.vocab_size, (1, 17))
    model(idx[:, :-1], idx[:, 1:])[0].backward()
    optimizers = optim.make_optimizers(cfg, model)
    optim.set_rates(optimizers, cfg, 0)
    return model, optimizers


def update(model, optimizers, grad_clip=1.0, loss=1.0):
    """Make one update in float32. Return (norm, skipped)."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return optim.update(model, optimizers, scaler, grad_clip, torch.tensor(loss))


def state_of(model, optimizers):
    """Return copies of all weights, and of all that the optimizers hold."""
    held = [value for o in optimizers for state in o.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *held]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", ["loss", "blocks.0.attn.q_proj.weight", "embed.weight"])
def test_an_update_that_is_not_finite_changes_nothing(optimizer, bad):
    """A loss or a gradient that is not finite leaves all weights and the state of every optimizer."""
    model, optimizers = model_with_gradients(optimizer=optimizer)
    gradients = [p.grad.clone() for p in model.parameters()]
    update(model, optimizers)
    before = state_of(model, optimizers)
    for p, gradient in zip(model.parameters(), gradients):
        p.grad = gradient
    loss = 1.0
    if bad == "loss":
        loss = float("nan")
    else:
        model.get_parameter(bad).grad[0, 0] = float("inf")
    _, skipped = update(model, optimizers, loss=loss)
    assert skipped == 1
    assert all(map(torch.equal, before, state_of(model, optimizers)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_finite_update_is_not_skipped(optimizer):
    """An update with a finite loss and finite gradients changes the weights."""
    model, optimizers = model_with_gradients(optimizer=optimizer)
    before = state_of(model, [])
    _, skipped = update(model, optimizers)
    assert skipped == 0
    assert not any(map(torch.equal, before, model.parameters()))


def test_an_update_clears_the_gradients():
    """The micro-steps of the next update begin without gradients."""
    model, optimizers = model_with_gradients()
    update(model, optimizers)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("grad_clip", [0.0, 1e-3, 1e3])
def test_the_norm_is_that_of_torch(grad_clip):
    """An update clips as torch.nn.utils.clip_grad_norm_ does, and reports its norm; 0 does not clip."""
    model, optimizers = model_with_gradients()
    other, (optimizer,) = model_with_gradients()
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), grad_clip or float("inf"))
    optimizer.step()
    norm, _ = update(model, optimizers, grad_clip)
    assert norm == expected
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def counter(*steps, total=0):
    """Return a SkipCounter that has seen these steps, 1 for a skipped one."""
    skips = optim.SkipCounter(total, torch.device("cpu"))
    for skipped in steps:
        skips.add(torch.tensor(float(skipped)))
    return skips


def test_skipped_steps_are_counted():
    """A SkipCounter counts all skipped steps, those in a row until now, and the longest row."""
    assert counter(1, 0, 1, 1, 0).counts.tolist() == [3, 0, 2]
    assert counter(1, 1, 1, 0, 1).counts.tolist() == [4, 1, 3]


def test_a_resumed_run_begins_a_new_row():
    """A SkipCounter continues the total of a checkpoint, and begins a new row."""
    skips = counter(1, total=4)
    assert skips.total() == 5
    assert skips.counts.tolist() == [5, 1, 1]


def test_a_row_that_has_ended_is_forgotten():
    """After reset_row only the row that lasts is known."""
    skips = counter(1, 1, 0, 1)
    skips.reset_row()
    assert skips.counts.tolist() == [3, 1, 1]


# Muon


def with_grads(shapes, seed=0):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    return params


def apart(ours, theirs, dtype):
    """Return how far four steps of our Muon end from torch's, as a share of the way, for each matrix."""
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
    """Four steps on a square, a wide and a tall matrix are those of torch.optim.Muon, but for rounding."""
    (distance,) = apart(with_grads([shape]), with_grads([shape]), torch.bfloat16)
    assert distance < 0.02  # bfloat16 in another order of operations


def test_muon_is_that_of_torch_on_every_matrix(monkeypatch):
    """Each matrix of a model, one of several of its shape, gets its own update."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # torch's iteration in float32 too
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Transformer(settings()))
    ours, theirs = ([p for n, p in m.named_parameters() if n.endswith("_proj.weight")] for m in models)
    distances = apart(ours, theirs, torch.float32)
    assert len(distances) == 14
    assert len({p.shape for p in ours}) == 4, "square, tall and wide, of two blocks"
    assert max(distances) < 1e-3


def test_muon_takes_each_expert_by_itself():
    """A stack of matrices is updated as its matrices are, each by itself, and not as one tall matrix."""
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
    """Muon with found_inf = 1 leaves its weights and its momentum as they are."""
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
    """Muon takes the matrices of the blocks; AdamW takes routers, embeddings and norms, without decay."""
    cfg = settings(optimizer="muon", n_expert=3, muon_momentum=0.8)
    model = Transformer(cfg)
    muon, adamw = optim.make_optimizers(cfg, model)
    optim.set_rates([muon, adamw], cfg, 3)
    names = {id(p): name for name, p in model.named_parameters()}
    (group,) = muon.param_groups
    assert {names[id(p)] for p in group["params"]} == {
        n for n in names.values() if n.endswith("_proj.weight")
    }
    assert group["lr"] == schedule.lr(cfg, 3)
    assert group["weight_decay"] == 0.1
    assert group["momentum"] == 0.8
    rest = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    assert "embed.weight" in rest
    assert "blocks.0.ffn.router.weight" in rest
    assert adamw.param_groups[0]["weight_decay"] == 0.0
    assert adamw.param_groups[0]["lr"] == group["lr"]


def test_a_loss_that_is_not_finite_is_a_skip_in_float16_too():
    """In float16 a gradient that overflows while the scale is large is usual and not counted; a loss that is
    not finite never comes from the scale."""
    model = torch.nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True)]
    scaler = torch.amp.GradScaler("cpu")
    for loss, gradient, counts in ((math.nan, 1.0, 1), (1.0, math.inf, 0), (1.0, 1.0, 0)):
        scaler.scale(model(torch.ones(1, 2)).sum() * gradient).backward()
        _, skipped = optim.update(model, optimizers, scaler, 1.0, torch.tensor(loss))
        assert skipped == counts


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_makes_kept_codes_stale(optimizer):
    """torch does not count what fused AdamW changes, but check_codes notices an update."""
    cfg = settings(n_layer=1, optimizer=optimizer)
    model = Transformer(cfg)
    keep_codes(model)
    optimizers = optim.make_optimizers(cfg, model)
    idx = torch.arange(8)[None]
    model(idx, idx)[0].backward()
    optim.update(model, optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0, torch.zeros(()))
    with pytest.raises(RuntimeError, match="has changed since keep_codes"):
        check_codes(model)
