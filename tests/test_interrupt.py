"""train.py under signals, and runs that end themselves: what they save, print and record."""

import os
import signal
import time

import faults
import pytest
from conftest import (
    EVENTS,
    SCALARS,
    lines,
    start_train,
    train,
)
from written import NO_EXTRAS

from nanobit import checkpoint


@pytest.mark.parametrize(
    "module, function, step, changes",
    [
        ("metrics", "mean_loss", 0, dict(eval_every=6)),
        ("generate", "generate", 6, dict(eval_every=0, sample_tokens=200000)),
    ],
)
def test_signals_are_heard_in_evaluation_and_sampling(data_dir, out_dir, module, function, step, changes):
    """Ctrl-C does not wait for the end of an evaluation or of a sample: the run is saved, and prints how to
    resume."""
    patch = faults.signal_in(module, function, 1, signal.SIGINT)
    _, err = train(data_dir, out_dir, "r", patch=patch, code=128 + signal.SIGINT, sample_every=6, **changes)
    end = lines(f"{out_dir}/r", EVENTS)[-1]
    assert end["event"] == "interrupt"
    assert end["step"] == step
    assert checkpoint.newest(f"{out_dir}/r", True)[0]
    assert f"--resume={out_dir}/r" in err


def test_the_second_signal_exits_immediately(data_dir, out_dir):
    """A run that saves to a dead disk is ended by the second Ctrl-C."""
    child = start_train(data_dir, out_dir, "r", faults.endless_save(), eval_every=0)
    while not os.path.exists(f"{out_dir}/r/{SCALARS}"):
        time.sleep(0.02)
    time.sleep(1)
    child.kill(signal.SIGINT)
    time.sleep(0.5)
    assert not child.ended()
    child.kill(signal.SIGINT)
    assert child.wait(10)[0] == 128 + signal.SIGINT


def failed(data_dir, out_dir, patch):
    """Return (stderr, last event) of a run that exits with 1."""
    code, _, err = start_train(data_dir, out_dir, "r", patch, save_every=0, **NO_EXTRAS).wait(60)
    assert code == 1
    return err, lines(f"{out_dir}/r", EVENTS)[-1]


@pytest.mark.parametrize(
    "patch, says",
    [(faults.nan_loss_always(), "5 steps in a row"), (faults.error_in_training(), "KeyError: 'x'")],
    ids=["skips", "error"],
)
def test_a_run_that_ends_itself_records_why(data_dir, out_dir, patch, says):
    """The last event of a run that an error ended holds the error, so that it does not look like a kill."""
    err, end = failed(data_dir, out_dir, patch)
    assert end["event"] == "failed"
    assert says in end["what"]
    assert says in err


def test_a_remedy_names_no_checkpoint_that_does_not_exist(data_dir, out_dir):
    """A run that diverges before its first save is not sent to a checkpoint."""
    _, end = failed(data_dir, out_dir, faults.nan_loss_always())
    assert "no checkpoint was saved" in end["what"]


def test_weights_changed_behind_kept_codes_end_training(data_dir, out_dir):
    """An update whose weights are not those of the kept codes raises an error before its forward."""
    err, event = failed(data_dir, out_dir, faults.change_weights_at(3))
    assert "q_proj: its weight has changed since keep_codes" in err
    assert (event["event"], event["step"]) == ("failed", 3)
