"""train.py as a child process: whatever kills it, the resumed run is the unbroken one, bit for bit."""

import json
import os
import shlex
import shutil
import signal
import sys

import faults
import pytest
import torch
from checkpoints import flip
from conftest import (
    EVENTS,
    ROOT,
    SCALARS,
    kill_at,
    lines,
    result_of,
    rows,
    run,
    settings,
    train,
    write_data,
)
from written import (
    NO_EXTRAS,
    ROUTER,
    assert_same_end,
    assert_same_run,
    best_of,
    events,
    rewrite,
    val_losses,
)

import config
from nanobit import checkpoint, data, saving
from nanobit.checkpoint import MODEL, TRAINER, step_dir
from nanobit.run_dir import steps

# an exact resume


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return (out_dir, stderr of the interrupt, stdout of the end) of run "whole" and run "broken", which was
    killed twice, interrupted once, and resumed by the command that it printed; with dropout, across the edge
    of an epoch at step 7.75."""
    folder = tmp_path_factory.mktemp("killed")
    where = write_data(folder / "data"), str(folder / "runs")
    train(*where, "whole", dropout=0.2)
    assert kill_at(*where, 7, dropout=0.2)[0] == -signal.SIGKILL
    assert kill_at(*where, 17, resume="auto", dropout=0.2)[0] == -signal.SIGKILL
    code, err = kill_at(*where, 19, signal.SIGTERM, resume="auto", dropout=0.2)
    assert code == 128 + signal.SIGTERM
    out, _ = run("train.py", *shlex.split(err.split("to continue: ")[1])[2:])
    return where[1], err, out


def test_kill_9_and_resume_is_the_unbroken_run(killed):
    """A run that was killed and resumed repeats the unbroken one bit for bit: data, random numbers,
    optimizer, best and log."""
    assert_same_run(f"{killed[0]}/whole", f"{killed[0]}/broken")


def test_a_resume_begins_at_the_newest_checkpoint(killed):
    """A kill costs the steps since the last save, an interrupt costs none."""
    resumed = [row["step"] for row in events(f"{killed[0]}/broken", "resume")]
    assert resumed[:2] in ([6, 15], [5, 15])
    assert resumed[2] >= 19


def test_the_printed_command_resumes_the_run(killed):
    """An interrupted run prints the command that resumes it: this Python, train.py and the run,
    whose settings are those of its config.json."""
    _, err, out = killed
    assert "Traceback" not in err
    python, script, *_ = shlex.split(err.split("to continue: ")[1])
    assert os.path.samefile(os.path.join(ROOT, python), sys.executable)
    assert script.endswith("train.py")
    assert result_of(out)["step"] == 24


MIXTURE = dict(n_expert=3, optimizer="muon", n_layer=2)
FLOAT_MIXTURE = dict(n_expert=3, ternary=False, dropout=0.2)
HALF = dict(ternary=False, dtype="float16", learning_rate=1e-2)
COMPILED = dict(compile=True, dropout=0.2, eval_every=0)  # an evaluation would be another compilation


@pytest.fixture
def resumed(request, data_dir, out_dir):
    """Return the folders of a run with these settings, and of a copy that resumed from step 15."""
    changes = request.param | dict(log_every=4, sample_every=0, keep_last=0)
    train(data_dir, out_dir, "whole", **changes)
    shutil.copytree(f"{out_dir}/whole", f"{out_dir}/broken")
    for step in steps(f"{out_dir}/broken"):
        if step > 15:
            shutil.rmtree(step_dir(f"{out_dir}/broken", step))
    train(data_dir, out_dir, "broken", resume="auto", **changes)
    assert [row["step"] for row in events(f"{out_dir}/broken", "resume")] == [15]
    return f"{out_dir}/whole", f"{out_dir}/broken"


@pytest.mark.parametrize("resumed", [MIXTURE, FLOAT_MIXTURE, HALF, COMPILED], indirect=True)
def test_every_kind_of_run_resumes_bit_for_bit(resumed, request):
    """Muon's momentum, the sums of routers since the last line, the scale of the loss and the dropout of a
    compiled model are those of the unbroken run."""
    changes = request.node.callspec.params["resumed"]
    assert_same_end(*resumed)
    scalers = [checkpoint.load(step_dir(run_dir, 24), TRAINER)["scaler"] for run_dir in resumed]
    assert scalers[0] == scalers[1]
    assert bool(scalers[0]) == (changes is HALF)
    with open(f"{resumed[0]}/config.json", encoding="utf-8") as file:
        assert json.load(file)["compile"] is (changes is COMPILED)
    if "n_expert" in changes:
        whole, broken = (lines(run_dir, ROUTER) for run_dir in resumed)
        assert [row["step"] for row in whole] == list(range(4, 25, 4))
        assert whole == broken


def test_a_run_from_before_the_ratios_keeps_its_rates(data_dir, out_dir):
    """A run whose rates of stage 2 and of the end were settings keeps them to the last bit, though no ratio
    gives them, and no change is reported."""
    changes = dict(keep_last=0, learning_rate=2e-3, stage2_lr_ratio=0.65, min_lr_ratio=0.0085)
    train(data_dir, out_dir, "whole", patch=faults.rates(stage2_lr=1.3e-3, min_lr=1.7e-5), **changes)
    shutil.copytree(f"{out_dir}/whole", f"{out_dir}/half")
    shutil.rmtree(f"{out_dir}/half/checkpoints")
    folder = step_dir(f"{out_dir}/whole", 5)
    part, trainer = (torch.load(f"{folder}/{name}") for name in (MODEL, TRAINER))
    cfg = part["config"]
    assert cfg["learning_rate"] * cfg["stage2_lr_ratio"] != cfg["stage2_lr"] == 1.3e-3
    for name in config.RATIOS.values():  # which such a checkpoint does not have
        del cfg[name]
    saving.save(f"{out_dir}/half", 5, part, trainer)
    out, _ = train(data_dir, out_dir, "half", resume="auto", **changes)
    assert "resume: from step 5" in out
    assert "changed" not in out
    assert "learning rate" not in out
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/half")
    # and its own checkpoints are resumed so, again
    shutil.rmtree(step_dir(f"{out_dir}/half", 24))
    train(data_dir, out_dir, "half", resume="auto", **changes)
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/half")


# what is kept, and what is damaged


def test_retention_keeps_boundary_best_and_newest(data_dir, out_dir):
    """All weights that the schedule saves are kept; trainer.pt of the newest two, of the boundary and of the
    best; the former best is deleted."""
    train(data_dir, out_dir, "r", save_every=4, keep_last=2, eval_every=3)
    run_dir = f"{out_dir}/r"
    best = best_of(run_dir)
    losses = val_losses(run_dir)
    del losses[0]
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    saved = steps(run_dir)
    assert set(saved) == {4, 8, 11, 12, 16, 20, 24, best["step"]}
    resumable = {step for step in saved if checkpoint.fault(step_dir(run_dir, step), TRAINER) is None}
    assert {11, 12, 24, best["step"]} <= resumable <= {11, 12, 20, 24, best["step"]}


def test_a_validation_loss_that_is_not_a_number_is_not_the_best(data_dir, out_dir):
    """NaN does not replace the best evaluation, whose checkpoint stays."""
    changes = dict(max_steps=8, eval_every=3, save_every=0, sample_every=0)
    train(data_dir, out_dir, "r", patch=faults.validation_loss(4, "nan"), **changes)
    best = best_of(f"{out_dir}/r")
    assert best["step"] in (3, 6)
    assert best["step"] in steps(f"{out_dir}/r")


def test_a_skipped_step_is_reported_after_a_resume(data_dir, out_dir):
    """A step that was skipped between the last log line and a kill is reported by the resumed run."""
    changes = dict(log_every=10, eval_every=0, sample_every=0, schedule="linear")
    patch = faults.nan_loss_at(2) + faults.signal_at_update(7, signal.SIGKILL)
    train(data_dir, out_dir, "r", patch=patch, code=-signal.SIGKILL, **changes)
    train(data_dir, out_dir, "r", resume="auto", **changes)
    assert [(row["step"], row["steps"]) for row in events(f"{out_dir}/r", "anomaly")] == [(10, 1)]


@pytest.mark.parametrize("function, number", [("fsync", 4), ("rename", 2)])
def test_a_kill_during_a_save_costs_nothing(data_dir, out_dir, function, number):
    """A run that is killed in its second save resumes from the first, which is whole. The partial is
    removed."""
    run_dir = f"{out_dir}/r"
    patch = faults.kill_in_save(function, number)
    train(data_dir, out_dir, "r", code=-signal.SIGKILL, patch=patch, eval_every=0)
    assert any(".tmp-" in name for name in os.listdir(f"{run_dir}/checkpoints")), "it did not die in a save"
    assert checkpoint.newest(run_dir, resumable=True) == (step_dir(run_dir, 5), [])
    train(data_dir, out_dir, "r", resume="auto", eval_every=0)
    assert not any(".tmp-" in name for name in os.listdir(f"{run_dir}/checkpoints"))


@pytest.mark.parametrize("name", [MODEL, TRAINER])
def test_a_damaged_newest_checkpoint_is_skipped(copied, name):
    """A run whose newest checkpoint has a flipped bit resumes from the one before, prints and records that,
    and makes the newest again."""
    data_dir, out_dir = copied
    newest, earlier, *_ = steps(f"{out_dir}/a")
    assert newest == 10
    flip(f"{step_dir(f'{out_dir}/a', 10)}/{name}", -300, 4)
    out, _ = train(data_dir, out_dir, "a", max_steps=10, sample_every=0, resume="auto")
    (event,) = events(f"{out_dir}/a", "resume")
    assert event["step"] == earlier
    assert event["passed_over"][0][0] == 10
    assert name in event["passed_over"][0][1]
    assert "skipped step 10" in out
    assert steps(f"{out_dir}/a")[0] == 10


def test_without_a_whole_checkpoint_the_old_run_is_kept(data_dir, out_dir):
    """An unattended restart after damage to all checkpoints starts over, beside the curves of the old run."""
    changes = dict(max_steps=6, save_every=0, eval_every=0, sample_every=0, schedule="linear")
    train(data_dir, out_dir, "r", **changes)
    os.truncate(f"{step_dir(f'{out_dir}/r', 6)}/checkpoint.pt", 100)
    out, _ = train(data_dir, out_dir, "r", max_steps=6, resume="auto", sample_every=0)
    assert "starting over" in out
    assert len(lines(f"{out_dir}/r.aside", SCALARS)) == 6


def test_a_disk_that_fills_loses_nothing(data_dir, out_dir):
    """A save that fails is reported and recorded, and the run saves again when there is room."""
    _, err = train(data_dir, out_dir, "r", patch=faults.no_room_for_saves(3, 6), **NO_EXTRAS)
    assert "was not saved" in err
    assert steps(f"{out_dir}/r")[0] == 24
    assert events(f"{out_dir}/r", "anomaly")


def test_a_disk_that_stays_full_ends_the_run(data_dir, out_dir):
    """A run whose end cannot be saved exits with 1, and its last good checkpoint is whole."""
    patch = faults.no_room_for_saves(3) + faults.no_waiting()
    _, err = train(data_dir, out_dir, "s", patch=patch, code=1, **NO_EXTRAS)
    assert "error: " in err
    folder, _ = checkpoint.newest(f"{out_dir}/s", True)
    assert folder == step_dir(f"{out_dir}/s", 5)


def test_data_that_are_damaged_in_use_cost_nothing(data_dir, out_dir):
    """A run whose shard is cut ends with one line, saved, and repeats the unbroken run once the shard is
    repaired."""
    path = os.path.join(data_dir, "tiny", "train_00000.bin")
    train(data_dir, out_dir, "whole")
    with open(path, "rb") as file:
        content = file.read()
    patch = faults.truncate_at_update(7, path, 40)
    _, err = train(data_dir, out_dir, "broken", code=1, patch=patch, save_every=100)
    assert err.count("error: ") == 1, err
    assert "shorter" in err
    assert "saved step 7; " in err
    with open(path, "wb") as file:
        file.write(content)
    train(data_dir, out_dir, "broken", resume="auto")
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/broken")


def test_ids_beyond_the_vocabulary_end_a_run_before_its_first_step(data_dir, out_dir):
    """A shard with other bytes, of the size and the time that were checked, ends the run with one line, and
    nothing is saved."""
    data.meta(settings(data_dir=data_dir))  # checks the shards
    path = os.path.join(data_dir, "tiny", "train_00000.bin")
    time_of_check = os.stat(path).st_mtime_ns
    with open(path, "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
    os.utime(path, ns=(time_of_check, time_of_check))
    _, err = train(data_dir, out_dir, "first_batch", code=1)
    assert err.count("error: ") == 1, err
    assert "holds token id 65535" in err
    assert "saved" not in err


def test_damaged_lines_of_the_record_are_reported_and_cost_nothing(copied):
    """A resume drops damaged lines with one warning, which it records, and a finished run whose last event is
    damaged ends again with the same result."""
    data_dir, out_dir = copied
    run_dir = f"{out_dir}/a"
    whole = rows(run_dir)
    end = lines(run_dir, EVENTS)[-1]
    rewrite(f"{run_dir}/{SCALARS}", lambda text: text.replace('"step": 3,', '"stfp": 3,'))
    rewrite(f"{run_dir}/{EVENTS}", lambda text: text.replace('"why": "max_steps"', '"whx": "max_steps"'))
    out, _ = train(data_dir, out_dir, "a", max_steps=10, sample_every=0, resume="auto")
    says = f"{SCALARS}: 1 of 12 lines before step 10 are missing or damaged"  # of step 0 and 6: evaluations
    assert f"warning: {says}\n" in out
    assert [row["what"] for row in events(run_dir, "anomaly")] == [says]
    assert rows(run_dir) == [row for row in whole if row["step"] != 3]
    assert lines(run_dir, EVENTS)[-1]["result"]["val_loss"] == end["result"]["val_loss"]
