"""train.py as a child process: whatever kills it, the resumed run is the unbroken one, bit for bit."""

import json
import os
import shlex
import shutil
import signal
import sys
import time

import faults
import pytest
import torch
from checkpoints import flip
from conftest import (
    EVENTS,
    ROOT,
    SCALARS,
    final,
    kill_at,
    lines,
    result_of,
    rows,
    run,
    settings,
    start_train,
    train,
    write_data,
)

import config
from nanobit import checkpoint, data, saving
from nanobit.checkpoint import MODEL, TRAINER, step_dir
from nanobit.run_dir import steps

ROUTER, SAMPLES = "metrics/router.jsonl", "samples/samples.jsonl"


def best_of(run_dir):
    """Return the content of best.json."""
    with open(f"{run_dir}/best.json", encoding="utf-8") as file:
        return json.load(file)


def events(run_dir, name):
    """Return the events of one kind."""
    return [row for row in lines(run_dir, EVENTS) if row["event"] == name]


def trained_steps(run_dir):
    """Return the steps that have a training line, in the order of the file."""
    return [row["step"] for row in lines(run_dir, SCALARS) if "loss" in row]


def val_losses(run_dir):
    """Return {step: validation loss}."""
    return {row["step"]: row["val_loss"] for row in lines(run_dir, SCALARS) if "val_loss" in row}


def rewrite(path, change):
    """Replace the text of a file by change(text)."""
    with open(path, encoding="utf-8") as file:
        text = change(file.read())
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def assert_same_end(a, b):
    """Two runs end with the same weights and optimizer state, and have logged the same."""
    for left, right in zip(final(a), final(b)):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(a) == rows(b)


def assert_same_run(a, b):
    """Two runs are the same in all that they wrote, but for what depends on the clock."""
    assert_same_end(a, b)
    assert lines(a, SAMPLES) == lines(b, SAMPLES)
    assert best_of(a) == best_of(b)
    health = [[row["total"] for row in lines(run_dir, "metrics/bitnet.jsonl")] for run_dir in (a, b)]
    for total in health[0] + health[1]:
        del total["flip_rate"]  # of the first line after a resume it is not known
    assert health[0] == health[1]


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


# how a run starts, resumes and branches off


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return (data_dir, out_dir) with run "a", finished at step 10, which began with resume = 'auto'."""
    folder = tmp_path_factory.mktemp("finished")
    where = write_data(folder / "data"), str(folder / "runs")
    train(*where, "a", max_steps=10, resume="auto", sample_every=0)
    return where


@pytest.fixture
def copied(finished, out_dir):
    """Return (data_dir, out_dir) with a copy of run "a", to be changed."""
    shutil.copytree(f"{finished[1]}/a", f"{out_dir}/a")
    return finished[0], out_dir


def test_auto_starts_if_there_is_nothing_to_resume(finished):
    """resume = 'auto' starts a run whose folder does not exist."""
    assert events(f"{finished[1]}/a", "start")[0]["step"] == 0
    assert trained_steps(f"{finished[1]}/a") == list(range(1, 11))


def test_a_run_is_not_overwritten(finished):
    """The same command again, without resume, exits with 2 and names both ways out."""
    _, err = train(*finished, "a", code=2, sample_every=0)
    assert "already holds a run, up to step 10" in err
    assert "--resume=auto" in err
    assert "--run_id=" in err


def test_a_finished_run_prints_its_result_again(finished):
    """resume = 'auto' of a finished run prints what ended it, and its result, and exits with 0."""
    out, _ = train(*finished, "a", max_steps=10, resume="auto", sample_every=0)
    assert "is finished: step 10, ended by max_steps" in out
    assert result_of(out)["step"] == 10


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            dict(n_embd=64, n_layer=3),
            ["n_embd = 64, the checkpoint has 32", "n_layer = 3, the checkpoint has 1"],
        ),
        (dict(seed=1), ["seed = 1, the checkpoint has 1337"]),
        (dict(ternary=False), ["ternary = False"]),
        (dict(total_batch_size=128), ["total_batch_size = 128, the checkpoint has 64"]),
    ],
)
def test_another_model_is_not_resumed(finished, changes, says):
    """A resume into another model, seed or batch exits with 2, and names each setting with both values."""
    _, err = train(*finished, "a", code=2, resume="auto", sample_every=0, **changes)
    assert [text for text in says if text not in err] == []


def test_a_run_is_not_made_shorter_than_its_checkpoint(finished):
    """A max_steps below the step of the checkpoint exits with 2."""
    _, err = train(*finished, "a", code=2, resume="auto", sample_every=0, max_steps=8)
    assert "max_steps = 8 is less than the 10 steps" in err
    assert "raise it" in err


def test_a_path_with_another_run_id_branches_off(finished):
    """A new run from the checkpoint of another records it, makes the later steps itself, and prints what
    changed."""
    data_dir, out_dir = finished
    origin = step_dir(f"{out_dir}/a", 5)
    out, _ = train(data_dir, out_dir, "b", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "changed: grad_clip = 0.5, the checkpoint has 1.0" in out
    event = lines(f"{out_dir}/b", EVENTS)[0]
    assert event["event"] == "resume"
    assert event["step"] == 5
    assert event["path"] == origin
    assert trained_steps(f"{out_dir}/b") == [6, 7, 8, 9, 10]


def test_a_path_inside_the_run_rewinds_it(copied):
    """A run that resumes from an earlier checkpoint of its own renames the later ones, and writes each line
    once; it then is what a branch from there is."""
    data_dir, out_dir = copied
    origin = step_dir(f"{out_dir}/a", 5)
    for run_id in ("b", "a"):
        out, _ = train(data_dir, out_dir, run_id, max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "later than the step" in out
    assert trained_steps(f"{out_dir}/a") == list(range(1, 11))
    assert rows(f"{out_dir}/a")[-1] == rows(f"{out_dir}/b")[-1]


WORSE = dict(sample_every=0, learning_rate=3.0, stage2_lr_ratio=1.0, min_lr_ratio=1.0)


def test_a_branch_has_its_own_best(finished):
    """The best of a branch is among its own evaluations, though they are worse than that of its origin."""
    data_dir, out_dir = finished
    train(data_dir, out_dir, "c", max_steps=12, resume=f"{out_dir}/a", **WORSE)
    assert best_of(f"{out_dir}/c")["step"] == 12


def test_the_best_stays_if_it_is_not_beaten(copied):
    """A run that continues with worse evaluations keeps its best."""
    data_dir, out_dir = copied
    former = best_of(f"{out_dir}/a")
    train(data_dir, out_dir, "a", max_steps=12, resume="auto", **WORSE)
    assert former["step"] <= 10
    assert best_of(f"{out_dir}/a") == former


def test_other_validation_windows_begin_a_new_best(copied):
    """The best loss of other validation windows is not compared with that of the former ones."""
    data_dir, out_dir = copied
    former = best_of(f"{out_dir}/a")
    train(data_dir, out_dir, "a", max_steps=14, resume="auto", eval_tokens=48, **WORSE)
    losses = {step: loss for step, loss in val_losses(f"{out_dir}/a").items() if step >= former["step"]}
    best = best_of(f"{out_dir}/a")
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert best["val_loss"] != former["val_loss"]


@pytest.mark.parametrize("resume, changes", [("checkpoints/step_000005", dict(seed=1)), ("nothing", {})])
def test_a_refused_start_leaves_no_folder(finished, resume, changes):
    """A start that exits with 2 leaves no folder of a run behind."""
    data_dir, out_dir = finished
    train(data_dir, out_dir, "d", code=2, resume=f"{out_dir}/a/{resume}", **changes)
    assert not os.path.exists(f"{out_dir}/d")


def test_other_tokens_under_the_same_name_are_refused(finished, tmp_path):
    """A data set that was made again in another way is not the one of the run, and exits with 2."""
    other = write_data(tmp_path / "other", n_train=501)
    _, err = train(other, finished[1], "a", code=2, max_steps=10, resume="auto", sample_every=0)
    assert "its tokens are not those" in err


# a finished run that is made longer


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Return (folder, stdout) of a run of 10 steps that was continued to 16."""
    folder = tmp_path_factory.mktemp("longer")
    where = write_data(folder / "data"), str(folder / "runs")
    changes = dict(resume="auto", sample_every=8, save_every=0, stage_boundary=0.75)
    train(*where, "r", max_steps=10, **changes)
    out, _ = train(*where, "r", max_steps=16, **changes)
    return f"{where[1]}/r", out


def test_a_longer_run_prints_where_its_schedule_jumps(longer):
    """A run that is made longer prints that it is back in stage 1, and both learning rates."""
    assert "back in stage 1 until step 12" in longer[1]
    assert "the learning rate is 1.11e-03 from here; before it was 1.50e-05" in longer[1]


def test_a_longer_run_loses_no_evaluation(longer):
    """The evaluation of the former end, and the best, stay, though nothing is due there any more."""
    losses = val_losses(longer[0])
    assert list(losses) == [0, 6, 10, 12, 16]
    del losses[0]
    best = best_of(longer[0])
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]


def test_a_longer_run_loses_no_sample(longer):
    """The samples of the former end stay."""
    assert {row["step"] for row in lines(longer[0], SAMPLES)} == {8, 10, 16}


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
    train(data_dir, out_dir, "r", patch=faults.nan_validation_at(4), **changes)
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


NO_EXTRAS = dict(sample_every=0, eval_every=0, schedule="linear")


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
    assert folder in (None, step_dir(f"{out_dir}/s", 5))


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


# signals, and errors


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
