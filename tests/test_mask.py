"""Loss masks: the loss of a step is the sum over the targets that count, divided by their number."""

import functools
import json
import os

import numpy as np
import pytest
import torch
from conftest import (
    EVENTS,
    RUN,
    final,
    kill_at,
    lines,
    result_of,
    rows,
    run,
    settings,
    start_ranks,
    train,
    write_data,
)
from masks import T, add_masks, some_targets, stored, windows, write_masked

from model import Transformer
from nanobit import distributed
from nanobit.experts import router_loss
from nanobit.metrics import mean_loss

CPU = torch.device("cpu")
# one update of eight sequences; exp_avg, without clipping, is then 0.1 of its gradient
ONE = dict(n_layer=1, max_steps=1, ternary=False, grad_clip=0.0, eval_every=0, sample_every=0)
ONE |= dict(total_batch_size=8 * T)


def of_slots(data_dir, counts):
    """Return counts (8, T), of the sequences of the first step, as those of the windows that these are."""
    targets = np.zeros((31, T), np.uint8)
    targets[[i for _, i in windows(data_dir).places(range(8))]] = counts
    return targets


def half_without(counts):
    """Return counts (8, T) with no target in the last four sequences, and few in the two before."""
    counts = counts.copy()
    counts[2:4, 3:] = 0
    counts[4:] = 0
    return counts


MASKS = {"uneven": some_targets(8), "half_without": half_without(some_targets(8))}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Return {name: data_dir} of the data sets whose first step has MASKS."""
    found = {}
    for name, counts in MASKS.items():
        data_dir = write_data(tmp_path_factory.mktemp(name), n_train=31 * T + 1, n_val=12 * T + 1)
        found[name] = add_masks(data_dir, train=of_slots(data_dir, counts))
    return found


def losses(run_dir, name):
    """Return the values of a field of scalars.jsonl that a run logged."""
    return [row[name] for row in rows(run_dir) if name in row]


def summed(logits, targets, counts):
    """Return the sum of the cross entropy over the targets that count, in plain torch."""
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (nats * counts).sum()


@functools.cache
def expected(data_dir, batch_size, **changes):
    """Return (loss, gradients by parameter) of the first step: the sum over all its targets / N, and the mean
    of the router losses of its micro-batches of batch_size sequences."""
    cfg = settings(**ONE | changes)
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg)
    tokens, counts = stored(data_dir)
    order = [i for _, i in windows(data_dir).places(range(8))]
    tokens, counts = tokens[order], counts[order]
    loss = summed(model(tokens[:, :-1]), tokens[:, 1:], counts) / counts.sum()
    routers = [router_loss(cfg, model(part[:, :-1], part[:, 1:])[1]) for part in tokens.split(batch_size)]
    (loss + sum(routers) / len(routers)).backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def train_on(n_ranks, data_dir, out_dir, run_id, **changes):
    """Train a tiny run on one rank or several; return what they print on stderr."""
    if n_ranks == 1:
        return train(data_dir, out_dir, run_id, **changes)[1]
    where = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id=run_id)
    children = [child.wait(150) for child in start_ranks(n_ranks, **where | RUN | changes)]
    assert [code for code, _, _ in children] == [0] * n_ranks, children
    return "".join(err for _, _, err in children)


def trained(data_dir, out_dir, n_ranks=1, **changes):
    """Train one update; return (its loss, the gradient of each parameter)."""
    train_on(n_ranks, data_dir, out_dir, "r", **ONE | changes)
    names = [name for name, _ in Transformer(settings(**ONE | changes)).named_parameters()]
    in_order = [name for name in names if "_proj" in name] + [name for name in names if "_proj" not in name]
    (state,) = final(f"{out_dir}/r", 1)[1]
    (loss,) = losses(f"{out_dir}/r", "loss")
    return loss, {name: state["state"][i]["exp_avg"] / 0.1 for i, name in enumerate(in_order)}


LAYOUTS = {  # of the eight sequences of a step
    "one batch": dict(batch_size=8),
    "two micro-steps": dict(batch_size=4),
    "four micro-steps": dict(batch_size=2),
    "two ranks": dict(batch_size=4, n_ranks=2),
    "two micro-steps on each of two ranks": dict(batch_size=2, n_ranks=2),
    "two shards": dict(batch_size=4, n_ranks=2, fsdp=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_loss_and_gradient_are_those_of_plain_torch(masked, out_dir, name, layout):
    """However a step is divided into micro-steps and ranks, of which some have no target, its loss is the sum
    over all its targets / N, and so is its gradient."""
    loss, gradients = trained(masked[name], out_dir, **LAYOUTS[layout])
    expected_loss, expected_gradients = expected(masked[name], 8)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)


def test_router_losses_are_means_over_micro_steps(masked, out_dir):
    """Masks do not weigh the losses of routers."""
    changes = dict(n_expert=3, router_balance=1.0, router_z=0.1)
    _, gradients = trained(masked["half_without"], out_dir, batch_size=2, **changes)
    _, expected_gradients = expected(masked["half_without"], 2, **changes)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clipping_and_the_loss_scale_see_the_final_gradient(masked, out_dir, dtype):
    """The norm that is clipped is that of the sum over all targets / N, without the scale of float16."""
    changes = dict(dtype=dtype, batch_size=2, grad_clip=0.01)
    _, gradients = trained(masked["half_without"], out_dir, n_ranks=2, **changes)
    _, expected_gradients = expected(masked["half_without"], 8)
    norm = torch.cat([g.flatten() for g in expected_gradients.values()]).norm().item()
    tolerance = {"float32": 1e-5, "float16": 0.02}[dtype]
    assert losses(f"{out_dir}/r", "grad_norm") == [pytest.approx(norm, rel=tolerance)]
    clipped = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert clipped == pytest.approx(0.01, rel=1e-4)


def test_a_target_that_does_not_count_has_no_gradient(masked):
    """The gradient of the logits of a target of mask 0 is exactly zero, and of others it is not."""
    w = windows(masked["half_without"], batch_size=8)
    model = Transformer(w.cfg)
    gradients = []  # of the logits
    model.head.register_full_backward_hook(lambda _, inputs, outputs: gradients.append(outputs[0]))
    inputs, targets, divisor = w.micro_batch(0, 0, CPU)
    model(inputs, targets, divisor)[0].backward()
    has_gradient = (gradients[0] != 0).any(-1)
    assert torch.equal(has_gradient, targets >= 0)
    assert has_gradient.tolist() == (MASKS["half_without"] > 0).tolist()


def test_masks_that_let_all_count_are_as_none(tmp_path, out_dir):
    """If each target counts, loss and gradient are those of the data set without masks."""
    plain = write_data(tmp_path / "plain", n_train=31 * T + 1, n_val=12 * T + 1)
    ones = write_masked(tmp_path / "ones", train=np.ones((31, T)), val=np.ones((12, T)))
    changes = dict(batch_size=4, eval_every=1)
    (loss, gradients), (plain_loss, plain_gradients) = (
        trained(data_dir, f"{out_dir}/{i}", **changes) for i, data_dir in enumerate((ones, plain))
    )
    assert loss == pytest.approx(plain_loss, abs=1e-6)
    torch.testing.assert_close(gradients, plain_gradients, rtol=0, atol=1e-6)
    val_losses, plain_val_losses = (losses(f"{out_dir}/{i}/r", "val_loss") for i in (0, 1))
    assert len(val_losses) == 2
    assert val_losses == pytest.approx(plain_val_losses, abs=1e-6)


def test_two_ranks_are_one_process_bit_for_bit(tmp_path, out_dir):
    """Two ranks count the targets of each other, and compute what one process does in two micro-steps."""
    data_dir = write_masked(tmp_path / "data")
    changes = dict(total_batch_size=8 * T, max_steps=20, dropout=0.1, sample_every=0)
    train_on(1, data_dir, out_dir, "one", **changes)
    train_on(2, data_dir, out_dir, "two", **changes)
    one, two = (final(f"{out_dir}/{run_id}", 20) for run_id in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert rows(f"{out_dir}/one") == rows(f"{out_dir}/two")


# a step in which no target counts

NONE_COUNTS = dict(max_steps=6, save_every=1, keep_last=0, eval_every=0, sample_every=0)
NONE_COUNTS |= dict(total_batch_size=8 * T, schedule="constant", warmup_steps=0)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Return data_dir of a data set whose step 3 has no target; a step is eight sequences."""
    folder = tmp_path_factory.mktemp("without")
    data_dir = write_masked(folder)
    targets = some_targets(31)
    targets[[i for _, i in windows(data_dir).places(range(16, 24))]] = 0
    return add_masks(data_dir, train=targets)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_step_without_targets_is_skipped_and_reported(without, out_dir, n_ranks):
    """A step in which no target counts changes no weight, is an anomaly like one that is not finite, and one
    line gives the reason."""
    err = train_on(n_ranks, without, out_dir, "r", **NONE_COUNTS)
    assert err.count("no target of step 3 counts") == 1
    anomalies = [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert [(row["step"], row["steps"]) for row in anomalies] == [(3, 1)]
    has_loss = [loss is not None for loss in losses(f"{out_dir}/r", "loss")]
    assert has_loss == [True, True, False, True, True, True]
    before, skipped, after = (final(f"{out_dir}/r", step) for step in (2, 3, 4))
    torch.testing.assert_close(before, skipped, rtol=0, atol=0)
    assert not torch.equal(before[0]["norm.weight"], after[0]["norm.weight"])


# resuming


def test_a_killed_run_resumes_bit_for_bit(tmp_path, out_dir):
    """A run with masks that is killed and resumed ends as one that was not."""
    data_dir = write_masked(tmp_path / "data")
    changes = dict(total_batch_size=8 * T, dropout=0.1)
    train(data_dir, out_dir, "whole", **changes)
    kill_at(data_dir, out_dir, 13, **changes)
    train(data_dir, out_dir, "broken", resume="auto", **changes)
    torch.testing.assert_close(final(f"{out_dir}/whole"), final(f"{out_dir}/broken"), rtol=0, atol=0)
    assert rows(f"{out_dir}/whole") == rows(f"{out_dir}/broken")


def test_other_masks_are_other_data(tmp_path, out_dir):
    """A run does not continue with other masks than those it was begun with."""
    data_dir = write_masked(tmp_path / "data")
    train(data_dir, out_dir, "r", max_steps=1, sample_every=0)
    add_masks(data_dir, train=some_targets(31, seed=1))
    _, err = train(data_dir, out_dir, "r", code=2, resume="auto", sample_every=0)
    assert "its tokens are not those of" in err


# validation


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Return (data_dir, out_dir, the result of run "v"): one validation window in six has no target, and a
    byte of text is four tokens."""
    folder = tmp_path_factory.mktemp("validated")
    targets = some_targets(12)
    targets[::6] = 0
    data_dir = write_masked(folder / "data", val=targets)
    path = os.path.join(data_dir, "tiny", "meta.json")
    with open(path, encoding="utf-8") as file:
        meta = json.load(file)
    meta["bytes"]["val"] = 4 * meta["counted"]["val"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(meta, file)
    changes = dict(max_steps=2, batch_size=1, total_batch_size=T, eval_tokens=0, eval_every=2, sample_every=0)
    out, _ = train(data_dir, str(folder / "runs"), "v", **changes)
    return data_dir, str(folder / "runs"), result_of(out)


def test_validation_weighs_batches_by_their_targets(validated):
    """The validation loss is the sum over the targets that count, divided by their number; here each batch is
    one window, and some have no target."""
    data_dir, out_dir, result = validated
    tokens, counts = stored(data_dir, "val")
    model = Transformer(settings(n_layer=1)).eval()
    model.load_state_dict(final(f"{out_dir}/v", 2)[0])
    nats = summed(model(tokens[:, :-1]), tokens[:, 1:], counts) / counts.sum()
    assert result["val_loss"] == pytest.approx(nats.item(), abs=1e-6)


def test_evaluate_agrees_with_training(validated):
    """evaluate.py, with other batches, gives the validation loss of train.py, of either split."""
    data_dir, out_dir, result = validated
    for split in ("val", "train"):
        out, _ = run("evaluate.py", f"--ckpt={out_dir}/v", f"--split={split}", "--batch_size=5", "--json")
        if split == "val":
            assert result_of(out)["val_loss"] == pytest.approx(result["val_loss"], abs=1e-6)
            assert result_of(out)["bits_per_byte"] == pytest.approx(result["val_bits_per_byte"], abs=1e-6)
        assert 0 < result_of(out)["val_loss"] < 10
        mask = np.fromfile(f"{data_dir}/tiny/{split}_00000.mask", np.uint8)[1:]  # of the targets
        assert result_of(out)["tokens"] == mask[: len(mask) // T * T].sum()


def test_an_export_is_verified_on_masked_windows(validated, tmp_path):
    """export.py --verify finds the validation loss of training, also if a window has no target."""
    pytest.importorskip("transformers")
    _, out_dir, result = validated
    out, _ = run("export.py", f"--ckpt={out_dir}/v", "--format=hf", f"--out={tmp_path}/hf", "--verify")
    for key in ("val_loss", "reader_val_loss"):
        assert result_of(out)[key] == pytest.approx(result["val_loss"], abs=1e-6)
    flags = ["--format=hf", f"--out={tmp_path}/one", "--verify", f"--eval_tokens={T}"]  # one without a target
    out, _ = run("export.py", f"--ckpt={out_dir}/v", *flags)
    assert "val_loss" not in result_of(out)


def test_bits_per_byte_are_those_of_the_answers(validated):
    """Both the tokens and the bytes of bits per byte are those that count."""
    _, _, result = validated
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / np.log(2) / 4)


def test_ranks_share_a_validation_with_masks(tmp_path, monkeypatch):
    """Two ranks, each with half of the batches, find the mean over all targets."""
    w = windows(write_masked(tmp_path), "val")
    model = Transformer(w.cfg)
    alone = mean_loss(model, w.fixed(0, 5, CPU))
    tables = []
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed, "total", lambda table: (tables.append(table), table)[1])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "RANK", rank)
        mean_loss(model, w.fixed(0, 5, CPU))
    sizes = [int((targets >= 0).sum()) for _, targets, _ in w.fixed(0, 5, CPU)]
    together = (sum(tables).double() * torch.tensor(sizes)).sum() / sum(sizes)
    assert together.item() == pytest.approx(alone, rel=1e-6)
