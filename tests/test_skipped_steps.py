"""Steps that are not finite: they change nothing, are reported, and end the run if they do not stop; and the
scale of the loss in float16, which an overflow lowers."""

import faults
import pytest
import torch
from conftest import EVENTS, SCALARS, final, lines, train
from written import values_of

HALF = dict(ternary=False, dtype="float16", sample_every=0, eval_every=0)


def skips_of(run_dir):
    """Return [(step, number of skipped steps)] of what the run reported."""
    rows = lines(run_dir, EVENTS)
    return [(row["step"], row["steps"]) for row in rows if row["event"] == "anomaly"]


def is_finite(run_dir, step):
    """Return whether all weights of a checkpoint are finite."""
    return all(w.isfinite().all() for w in final(run_dir, step)[0].values())


def test_a_step_that_is_not_finite_is_skipped_and_reported(data_dir, out_dir):
    """A NaN loss changes no weight: the step counts, is reported, and its loss is null."""
    patch = faults.nan_loss_at(4, 6)
    train(data_dir, out_dir, "r", patch=patch, max_steps=12, save_every=0, sample_every=0)
    assert is_finite(f"{out_dir}/r", 12)
    assert skips_of(f"{out_dir}/r") == [(4, 1), (6, 1)]
    losses = {row["step"]: row["loss"] for row in lines(f"{out_dir}/r", SCALARS) if "loss" in row}
    assert losses[4] is None
    assert losses[5] is not None
    assert list(losses) == list(range(1, 13))


def test_a_gradient_that_is_not_finite_is_skipped_too(data_dir, out_dir):
    """An overflow in the backward only, which the loss does not show, is skipped and reported."""
    patch = faults.infinite_gradient_at(4, "norm.weight")
    train(data_dir, out_dir, "r", patch=patch, max_steps=8, save_every=0, sample_every=0)
    assert skips_of(f"{out_dir}/r") == [(4, 1)]
    assert is_finite(f"{out_dir}/r", 8)


def test_a_run_that_overflows_ends_with_one_line(data_dir, out_dir):
    """Infinities in the record of ternary health do not end a run with a traceback."""
    _, err = train(data_dir, out_dir, "r", code=1, learning_rate=1e30, sample_every=0, eval_every=0)
    assert "5 steps in a row" in err


def test_five_in_a_row_end_the_run(data_dir, out_dir):
    """Five skipped steps in a row end the run, though the log comes every 6 steps, and the last good
    checkpoint is named; a resumed run begins a new row."""
    changes = dict(log_every=6, sample_every=0, eval_every=0)
    _, err = train(data_dir, out_dir, "r", patch=faults.nan_loss_at(*range(7, 12)), code=1, **changes)
    assert "5 steps in a row" in err
    assert "checkpoints/step_000011" in err
    train(data_dir, out_dir, "r", resume="auto", **changes)


def test_an_overflow_in_float16_lowers_the_scale(data_dir, out_dir):
    """An overflow under float16 halves the scale of the loss until it fits, and is not an anomaly."""
    changes = HALF | dict(schedule="linear", max_steps=12, save_every=0)
    train(data_dir, out_dir, "r", patch=faults.loss_scale(2.0**40), **changes)
    scales = values_of(f"{out_dir}/r", "loss_scale")
    assert scales[0] == 2.0**39
    assert 1 <= scales[-1] < 2.0**39
    assert skips_of(f"{out_dir}/r") == []


def test_gradients_are_clipped_without_their_scale(data_dir, out_dir):
    """The norm of a gradient under float16 is that of float32."""
    changes = HALF | dict(schedule="linear", max_steps=1, save_every=0)
    train(data_dir, out_dir, "plain", **changes | dict(dtype="float32"))
    train(data_dir, out_dir, "scaled", **changes)
    norm, scaled = (values_of(f"{out_dir}/{run_id}", "grad_norm")[0] for run_id in ("plain", "scaled"))
    assert scaled == pytest.approx(norm, rel=0.02)


def test_float16_that_always_overflows_ends(data_dir, out_dir):
    """A scale that no halving helps ends the run, although an overflow is not an anomaly."""
    patch = faults.loss_scale(2.0) + faults.nan_loss_always()
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, save_every=0, **HALF)
    assert "steps in a row were not finite" in err


def test_an_overflow_under_muon_moves_nothing(data_dir, out_dir):
    """An infinity in a matrix of Muon also stops the AdamW of the embedding, whose gradient is finite."""
    patch = faults.loss_scale(2.0**16) + faults.infinite_gradient_at(4, "blocks.0.attn.q_proj.weight")
    changes = HALF | dict(optimizer="muon", schedule="constant", max_steps=4, save_every=1, keep_last=0)
    train(data_dir, out_dir, "r", patch=patch, **changes)
    earlier, before, after = (final(f"{out_dir}/r", step)[0] for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["embed.weight"], earlier["embed.weight"])
