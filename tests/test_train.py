"""train.py as a child process: what a run begins with, what an update computes, and how a run ends."""

import os
import shutil
import signal

import faults
import pytest
import torch
from conftest import (
    EVENTS,
    final,
    lines,
    result_of,
    rows,
    run,
    run_flags,
    train,
    write_data,
)
from written import values_of

# the weights that a run begins with


def test_init_from_takes_weights_only(data_dir, out_dir):
    """init_from starts at step 0 with the weights of another run, which a learning rate of 0 keeps."""
    changes = dict(max_steps=6, sample_every=0)
    train(data_dir, out_dir, "float", ternary=False, **changes)
    train(data_dir, out_dir, "from", init_from=f"{out_dir}/float", learning_rate=0.0, **changes)
    start = lines(f"{out_dir}/from", EVENTS)[0]
    assert start["event"] == "start"
    assert start["step"] == 0
    for key, value in final(f"{out_dir}/float", 6)[0].items():
        assert torch.equal(value, final(f"{out_dir}/from", 6)[0][key]), key


# how a run ends


def test_out_of_memory_is_one_line(data_dir, out_dir):
    """A GPU without enough memory costs one line with the remedy."""
    _, err = train(data_dir, out_dir, "r", patch=faults.out_of_memory(), code=1, sample_every=0)
    assert "--batch_size=2 --total_batch_size=64" in err
    assert err.count("error: ") == 1


def test_max_minutes_ends_as_if_finished(data_dir, out_dir):
    """A run that its time limit ends is saved and evaluated."""
    changes = dict(max_minutes=0.01, max_steps=10**6, save_every=0, log_every=50, sample_every=0)
    out, _ = train(data_dir, out_dir, "t", **changes)
    result = result_of(out)
    assert 0 < result["step"] < 10**6
    assert os.path.exists(f"{result['checkpoint']}/manifest.json")
    assert result["val_loss"] is not None


# no evaluation is better than the first one
STILL = dict(eval_every=2, sample_every=0, learning_rate=0.0, weight_decay=0.0, stage2_weight_decay=0.0)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """Return (data_dir, out_dir, stdout) of run "p", which patience = 2 ended."""
    folder = tmp_path_factory.mktemp("impatient")
    where = write_data(folder / "data"), str(folder / "runs")
    out, _ = train(*where, "p", patience=2, **STILL)
    return *where, out


def test_patience_ends_a_run(impatient):
    """A run ends after so many evaluations without a new best."""
    assert result_of(impatient[2])["step"] == 6, "best at 2, none better at 4 and 6"


def test_patience_is_not_forgotten_by_a_resume(impatient):
    """A run that patience ended is finished."""
    data_dir, out_dir, _ = impatient
    out, _ = train(data_dir, out_dir, "p", resume="auto", patience=2, **STILL)
    assert "is finished" in out


def test_a_signal_does_not_count_an_evaluation_twice(data_dir, out_dir):
    """An evaluation that is repeated, since a signal came between it and the update, counts once."""
    changes = STILL | dict(patience=4, sample_every=4)
    patch = faults.signal_in("generate", "generate", 4, signal.SIGTERM)
    train(data_dir, out_dir, "i", patch=patch, code=128 + signal.SIGTERM, **changes)
    out, _ = train(data_dir, out_dir, "i", resume="auto", **changes)
    assert result_of(out)["step"] == 10, "best at 2, none better at 4, 6, 8 and 10"


def test_a_run_continues_without_patience(impatient, out_dir):
    """A run that patience ended continues to max_steps once patience is off."""
    data_dir, former_dir, _ = impatient
    shutil.copytree(f"{former_dir}/p", f"{out_dir}/p")
    out, _ = train(data_dir, out_dir, "p", resume="auto", patience=0, **STILL)
    assert result_of(out)["step"] == 24


BAD = [
    (dict(out_dir="{tmp}/file/x"), "cannot write"),
    (dict(dataset="nowhere"), "data set"),
    (dict(resume="{tmp}/gone"), "resume ="),
    (dict(init_from="{tmp}/file"), "init_from ="),
    (dict(sample_prompts="['ABC']"), "sample_prompts"),
    (dict(device="cuda:7"), "device = 'cuda:7'"),
    (dict(seq_len=600), "seq_len = 600"),
]


@pytest.mark.parametrize("changes, says", BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, out_dir, tmp_path, changes, says):
    """What the user can mend exits with 2 and one line."""
    (tmp_path / "file").write_text("")
    args = [flag.replace("{tmp}", str(tmp_path)) for flag in run_flags(data_dir, out_dir, "x", **changes)]
    _, err = run("train.py", *args, code=2)
    assert says in err
    assert err.count("error: ") == 1


# what an update computes


def test_accumulation_does_not_change_the_result(data_dir, out_dir):
    """Four micro-steps of one sequence are one of four: the same tokens, losses and norms. (AdamW hides the
    size of a gradient, its norm does not.)"""
    changes = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0)
    train(data_dir, out_dir, "one", batch_size=4, **changes)
    train(data_dir, out_dir, "four", batch_size=1, **changes)
    for key in ("loss", "grad_norm"):
        one, four = (values_of(f"{out_dir}/{run_id}", key) for run_id in ("one", "four"))
        assert one == pytest.approx(four, abs=1e-4)


def test_grad_clip_0_does_not_clip(data_dir, out_dir):
    """grad_clip = 0 is a bound that is never reached; a tiny one changes the run: beside such gradients
    adam_eps is no longer small."""
    changes = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0, adam_eps=1e-4)
    for run_id, grad_clip in (("off", 0.0), ("wide", 1e9), ("tight", 1e-6)):
        train(data_dir, out_dir, run_id, grad_clip=grad_clip, **changes)
    off, wide, tight = (rows(f"{out_dir}/{run_id}")[-1]["val_loss"] for run_id in ("off", "wide", "tight"))
    assert off == wide
    assert abs(tight - off) > 1e-3
