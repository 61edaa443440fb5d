"""train.py as a child process: whatever kills it, the resumed run is the unbroken one, bit for bit."""

import json
import os
import shlex
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import (
    EVENTS,
    NAN,
    ROOT,
    RUN,
    SCALARS,
    final,
    flags,
    kill_at,
    lines,
    rows,
    run,
    start,
    train,
    write_data,
)
from fork import Script

import config
from nanobit import checkpoint


def assert_same_run(a, b):
    for left, right in zip(final(a), final(b)):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(a) == rows(b)
    assert lines(a, "samples/samples.jsonl") == lines(b, "samples/samples.jsonl")
    assert json.load(open(f"{a}/best.json")) == json.load(open(f"{b}/best.json"))
    for name in ("bitnet", "router"):  # flips of the first line after a resume are not known
        found = [
            path
            for path in (f"{a}/metrics/{name}.jsonl", f"{b}/metrics/{name}.jsonl")
            if os.path.exists(path)
        ]
        totals = [[row["total"] | {"flip_rate": 0} for row in lines("", path)] for path in found]
        assert len(found) in (0, 2) and totals[:1] == totals[1:]


def test_kill_9_and_resume_is_the_unbroken_run(data_dir, out_dir):
    """bugs guarded: data that starts over, random state, optimizer state, best or log lines lost; across
    the epoch edge at step 7.75, with dropout, killed twice and once interrupted"""
    how = dict(dropout=0.2)
    train(data_dir, out_dir, "whole", **how)
    assert kill_at(data_dir, out_dir, 7, **how)[0] == -signal.SIGKILL
    assert kill_at(data_dir, out_dir, 17, resume="auto", **how)[0] == -signal.SIGKILL
    code, err = kill_at(data_dir, out_dir, 19, signal.SIGTERM, resume="auto", **how)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err
    # the command that it printed is whole: the settings are those of the run
    python, script, *args = shlex.split(err.split("to continue: ")[1])
    assert os.path.samefile(os.path.join(ROOT, python), sys.executable) and script.endswith("train.py")
    out, _ = run("train.py", *args)
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/broken")
    resumed = [row["step"] for row in lines(f"{out_dir}/broken", EVENTS) if row["event"] == "resume"]
    assert resumed[:2] == [6, 15] or resumed[:2] == [5, 15]
    assert resumed[2] >= 19 and json.loads(out.strip().split("\n")[-1])["step"] == 24


@pytest.mark.parametrize(
    "how",
    [
        dict(n_expert=3, optimizer="muon"),
        dict(n_expert=3, ternary=False, dropout=0.2),
        dict(ternary=False, dtype="float16", learning_rate=1e-2),
        dict(compile=True, dropout=0.2, n_layer=1),
    ],
)
def test_every_kind_of_run_resumes_bit_for_bit(data_dir, out_dir, how):
    """bugs guarded: Muon's momentum lost, a gradient scaler that begins again, a first line of the routers
    that tells only of the steps since the resume, a compiled model that draws its dropout from other random
    numbers after one"""
    how = how | dict(log_every=4, sample_every=0)
    train(data_dir, out_dir, "whole", **how)
    assert kill_at(data_dir, out_dir, 16, **how)[0] == -signal.SIGKILL  # 15 is saved
    train(data_dir, out_dir, "broken", resume="auto", **how)
    for left, right in zip(final(f"{out_dir}/whole"), final(f"{out_dir}/broken")):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(f"{out_dir}/whole") == rows(f"{out_dir}/broken")
    scalers = [
        checkpoint.load(checkpoint.step_dir(f"{out_dir}/{name}", 24), "trainer.pt")["scaler"]
        for name in ("whole", "broken")
    ]
    assert scalers[0] == scalers[1] and bool(scalers[0]) == (how.get("dtype") == "float16")
    assert json.load(open(f"{out_dir}/whole/config.json"))["compile"] is how.get("compile", False)
    if "n_expert" in how:
        tables = [lines(f"{out_dir}/{name}", "metrics/router.jsonl") for name in ("whole", "broken")]
        assert [row["step"] for row in tables[0]] == list(range(4, 25, 4)) and tables[0] == tables[1]


KILL_IN_SAVE = """
import os, signal; from nanobit import checkpoint
real, count = os.{function}, [0]
def dying(*args):
    count[0] += 1
    if count[0] == {nth}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
checkpoint.os = type(os)('os'); checkpoint.os.__dict__.update(os.__dict__); checkpoint.os.{function} = dying
"""


@pytest.mark.parametrize("function, nth", [("fsync", 4), ("rename", 2)])
def test_a_kill_during_a_save_costs_nothing(data_dir, out_dir, function, nth):
    """bug guarded: a checkpoint written in place: killed in the second save, the first must be there,
    whole"""
    patch = KILL_IN_SAVE.format(function=function, nth=nth)
    train(data_dir, out_dir, "r", code=-signal.SIGKILL, patch=patch, eval_every=0)
    run_dir = f"{out_dir}/r"
    assert any(".tmp-" in name for name in os.listdir(f"{run_dir}/checkpoints")), "it did not die in a save"
    assert checkpoint.newest(run_dir, resumable=True) == (checkpoint.step_dir(run_dir, 5), [])
    train(data_dir, out_dir, "r", resume="auto", eval_every=0)
    assert not any(".tmp-" in name for name in os.listdir(f"{run_dir}/checkpoints"))


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINER])
def test_a_damaged_newest_checkpoint_is_passed_over(data_dir, out_dir, name):
    """bug guarded: a flipped bit that trains on, or a run that cannot go on from what is still good"""
    train(data_dir, out_dir, "r", max_steps=16, sample_every=0)
    newest = checkpoint.step_dir(f"{out_dir}/r", 16)
    with open(f"{newest}/{name}", "r+b") as file:
        file.seek(-300, os.SEEK_END)
        byte = file.read(1)
        file.seek(-300, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))
    out, _ = train(data_dir, out_dir, "r", max_steps=16, sample_every=0, resume="auto")
    event = next(row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "resume")
    assert event["step"] == 15 and event["passed_over"][0][0] == 16 and name in event["passed_over"][0][1]
    assert "skipped step 16" in out and checkpoint.steps(f"{out_dir}/r")[0] == 16


def test_starting_and_resuming_follow_their_rules(data_dir, out_dir):
    """bugs guarded: a run overwritten by the same command, a resume into another model, a branch that eats
    its origin"""
    train(data_dir, out_dir, "a", max_steps=10, resume="auto", sample_every=0)  # nothing there: starts
    _, err = train(data_dir, out_dir, "a", code=2, sample_every=0)
    assert "already holds a run, up to step 10" in err and "--resume=auto" in err and "--run_id=" in err
    out, _ = train(data_dir, out_dir, "a", max_steps=10, resume="auto", sample_every=0)
    assert (
        "is finished: step 10, ended by max_steps" in out
        and json.loads(out.strip().split("\n")[-1])["step"] == 10
    )
    for changes, says in (
        (
            dict(n_embd=64, n_layer=3),
            ["n_embd = 64, the checkpoint has 32", "n_layer = 3, the checkpoint has 2"],
        ),
        (dict(seed=1), ["seed = 1, the checkpoint has 1337"]),
        (dict(ternary=False), ["ternary = False"]),
        (dict(total_batch_size=128), ["total_batch_size = 128, the checkpoint has 64"]),
    ):
        _, err = train(data_dir, out_dir, "a", code=2, resume="auto", sample_every=0, **changes)
        assert all(text in err for text in says), err
    _, err = train(data_dir, out_dir, "a", code=2, resume="auto", sample_every=0, max_steps=8)
    assert "max_steps = 8 is less than the 10 steps" in err and "raise it" in err
    # a path with another run_id branches off; what may change is printed
    origin = checkpoint.step_dir(f"{out_dir}/a", 5)
    out, _ = train(data_dir, out_dir, "b", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "changed: grad_clip = 0.5, the checkpoint has 1.0" in out
    event = lines(f"{out_dir}/b", EVENTS)[0]
    assert event["event"] == "resume" and event["step"] == 5 and event["path"] == origin
    assert [row["step"] for row in lines(f"{out_dir}/b", SCALARS) if "loss" in row] == [6, 7, 8, 9, 10]
    # a path inside the run itself rewinds it; later steps are set aside
    out, _ = train(data_dir, out_dir, "a", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "later than the step" in out and rows(f"{out_dir}/a")[-1] == rows(f"{out_dir}/b")[-1]
    assert [row["step"] for row in lines(f"{out_dir}/a", SCALARS) if "loss" in row] == list(range(1, 11))
    # a branch has a best of its own, though its losses are worse, and so have other validation windows
    how = dict(sample_every=0, learning_rate=3.0, stage2_lr_ratio=1.0, min_lr_ratio=1.0)
    for run_id, max_steps, resume, eval_tokens, its_own in (
        ("c", 12, f"{out_dir}/a", 64, (12,)),
        ("a", 12, "auto", 64, (10,)),
        ("a", 14, "auto", 48, (12, 14)),
    ):
        train(data_dir, out_dir, run_id, max_steps=max_steps, resume=resume, eval_tokens=eval_tokens, **how)
        assert json.load(open(f"{out_dir}/{run_id}/best.json"))["step"] in its_own
    # a refused start leaves no folder behind
    train(data_dir, out_dir, "d", code=2, resume=origin, seed=1)
    train(data_dir, out_dir, "d", code=2, resume=f"{out_dir}/nothing")
    assert not os.path.exists(f"{out_dir}/d")


FORMER_RATES = """
import config
real = config.load
def load(*args, **options):
    cfg = real(*args, **options)
    cfg.stage2_lr, cfg.min_lr = 1.3e-3, 1.7e-5
    return cfg
config.load = load
"""


def test_a_run_from_before_the_ratios_keeps_its_rates(data_dir, out_dir):
    """bugs guarded: rates of a resumed run that differ in the last bit; a change that is none reported"""
    how = dict(keep_last=0, learning_rate=2e-3, stage2_lr_ratio=0.65, min_lr_ratio=0.0085)
    train(data_dir, out_dir, "whole", patch=FORMER_RATES, **how)
    shutil.copytree(f"{out_dir}/whole", f"{out_dir}/half")
    shutil.rmtree(f"{out_dir}/half/checkpoints")
    folder = checkpoint.step_dir(f"{out_dir}/whole", 5)
    part, trainer = (torch.load(f"{folder}/{name}") for name in (checkpoint.MODEL, checkpoint.TRAINER))
    cfg = part["config"]
    assert cfg["learning_rate"] * cfg["stage2_lr_ratio"] != cfg["stage2_lr"] == 1.3e-3
    for name in config.RATIOS.values():  # which such a checkpoint does not have
        del cfg[name]
    checkpoint.save(f"{out_dir}/half", 5, part, trainer)
    out, _ = train(data_dir, out_dir, "half", resume="auto", **how)
    assert "resume: from step 5" in out and "changed" not in out and "learning rate" not in out
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/half")
    # and its own checkpoints are resumed so, again
    shutil.rmtree(checkpoint.step_dir(f"{out_dir}/half", 24))
    train(data_dir, out_dir, "half", resume="auto", **how)
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/half")


def test_a_finished_run_that_goes_on_loses_no_evaluation(data_dir, out_dir):
    """bugs guarded: the evaluation, the samples and the best of the former end dropped, since they are no
    longer due there"""
    for max_steps in (10, 16):
        how = dict(max_steps=max_steps, resume="auto", sample_every=8, save_every=0, stage_boundary=0.75)
        out, _ = train(data_dir, out_dir, "r", **how)
    assert "back in stage 1 until step 12" in out
    assert "the learning rate is 1.11e-03 from here; before it was 1.50e-05" in out
    losses = {row["step"]: row["val_loss"] for row in lines(f"{out_dir}/r", SCALARS) if "val_loss" in row}
    assert list(losses) == [0, 6, 10, 12, 16]
    del losses[0]
    best = json.load(open(f"{out_dir}/r/best.json"))
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert {row["step"] for row in lines(f"{out_dir}/r", "samples/samples.jsonl")} == {8, 10, 16}


def test_retention_keeps_boundary_best_and_newest(data_dir, out_dir):
    """bugs guarded: the boundary's or the best checkpoint's trainer.pt pruned; the former best kept for
    ever"""
    train(data_dir, out_dir, "r", save_every=4, keep_last=2, eval_every=3)
    run_dir = f"{out_dir}/r"
    best = json.load(open(f"{run_dir}/best.json"))
    evals = {
        row["step"]: row["val_loss"] for row in lines(run_dir, SCALARS) if "val_loss" in row and row["step"]
    }
    assert best["val_loss"] == min(evals.values()) == evals[best["step"]]
    steps = checkpoint.steps(run_dir)
    assert set(steps) == {4, 8, 11, 12, 16, 20, 24, best["step"]}
    resumable = {
        s for s in steps if checkpoint.fault(checkpoint.step_dir(run_dir, s), checkpoint.TRAINER) is None
    }
    assert {11, 12, 24, best["step"]} <= resumable <= {11, 12, 20, 24, best["step"]}


def test_a_validation_loss_that_is_not_a_number_is_not_the_best(data_dir, out_dir):
    """bug guarded: NaN takes the place of the best checkpoint, which is deleted"""
    patch = "from nanobit import metrics\nreal = metrics.mean_loss\ncount = [0]\n"
    patch += (
        "def nan(*a, **k):\n    count[0] += 1\n    return float('nan') if count[0] == 4 else real(*a, **k)\n"
    )
    patch += "metrics.mean_loss = nan"
    train(data_dir, out_dir, "r", patch=patch, max_steps=8, eval_every=3, save_every=0, sample_every=0)
    best = json.load(open(f"{out_dir}/r/best.json"))
    assert best["step"] in (3, 6) and best["step"] in checkpoint.steps(f"{out_dir}/r")


def test_a_skipped_step_is_told_after_a_resume(data_dir, out_dir):
    """bug guarded: a skip between the last log line and a kill that nobody hears of"""
    patch = NAN.format(bad="count[0] == 2") + "\nimport os, signal\nreal_step = torch.optim.AdamW.step\n"
    patch += "def step(*a, **k):\n    count.append(0)\n"
    patch += "    if len(count) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
    patch += "    return real_step(*a, **k)\ntorch.optim.AdamW.step = step"
    how = dict(log_every=10, eval_every=0, sample_every=0, schedule="linear")
    train(data_dir, out_dir, "r", patch=patch, code=-signal.SIGKILL, **how)
    train(data_dir, out_dir, "r", resume="auto", **how)
    told = [(row["step"], row["steps"]) for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert told == [(10, 1)]


def test_other_tokens_under_the_same_name_are_refused(data_dir, out_dir, tmp_path):
    """bug guarded: a data set made again in another way, on which a resumed run goes on"""
    train(data_dir, out_dir, "r", max_steps=6, sample_every=0)
    other = write_data(tmp_path / "other", n_train=501)
    _, err = train(other, out_dir, "r", code=2, resume="auto", sample_every=0)
    assert "its tokens are not those" in err


def test_without_a_whole_checkpoint_the_old_run_is_kept(data_dir, out_dir):
    """bug guarded: an unattended restart after disk damage that erases a month of curves"""
    train(data_dir, out_dir, "r", max_steps=6, save_every=0, eval_every=0, sample_every=0, schedule="linear")
    os.truncate(f"{checkpoint.step_dir(f'{out_dir}/r', 6)}/checkpoint.pt", 100)
    out, _ = train(data_dir, out_dir, "r", max_steps=6, resume="auto", sample_every=0)
    assert "starting over" in out and len(lines(f"{out_dir}/r.aside", SCALARS)) == 6


FULL_DISK = """
import os; from nanobit import checkpoint
real, count = os.fsync, [0]
def full(*args):
    count[0] += 1
    if 3 <= count[0] <= {last}: raise OSError(28, 'No space left on device')
    return real(*args)
checkpoint.os = type(os)('os'); checkpoint.os.__dict__.update(os.__dict__); checkpoint.os.fsync = full
"""


def test_a_disk_that_fills_loses_nothing(data_dir, out_dir):
    """bug guarded: a save that fails ends the run, or takes the last good checkpoint with it"""
    how = dict(sample_every=0, eval_every=0, schedule="linear")
    _, err = train(data_dir, out_dir, "r", patch=FULL_DISK.format(last=6), **how)
    assert "was not saved" in err and checkpoint.steps(f"{out_dir}/r")[0] == 24
    assert [row["step"] for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    patch = FULL_DISK.format(last=10**9) + "\nimport time; time.sleep = lambda seconds: None"
    _, err = train(data_dir, out_dir, "s", patch=patch, code=1, **how)
    assert "error: " in err and checkpoint.newest(f"{out_dir}/s", True)[0] in (
        None,
        checkpoint.step_dir(f"{out_dir}/s", 5),
    )


def test_data_that_are_damaged_in_use_cost_nothing(data_dir, out_dir):
    """bug guarded: a traceback, and the steps since the last save lost, because a shard is cut"""
    path = os.path.join(data_dir, "tiny", "train_00000.bin")
    cut = f"""
import os, torch
real, count = torch.optim.AdamW.step, [0]
def step(*args, **options):
    count[0] += 1
    if count[0] == 7: os.truncate({path!r}, 40)
    return real(*args, **options)
torch.optim.AdamW.step = step
"""
    train(data_dir, out_dir, "whole")
    with open(path, "rb") as file:
        content = file.read()
    _, err = train(data_dir, out_dir, "broken", code=1, patch=cut, save_every=100)
    assert err.count("error: ") == 1 and "shorter" in err and "saved step 7; " in err, err
    with open(path, "wb") as file:
        file.write(content)
    train(data_dir, out_dir, "broken", resume="auto")
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/broken")
    time_of_check = os.stat(path).st_mtime_ns
    with open(path, "wb") as file:
        file.write(b"\xff" * len(content))
    os.utime(path, ns=(time_of_check, time_of_check))
    _, err = train(data_dir, out_dir, "first_batch", code=1)
    assert err.count("error: ") == 1 and "holds token id 65535" in err and "saved" not in err, err


def test_signals_are_heard_in_evaluation_and_sampling(data_dir, out_dir):
    """bug guarded: Ctrl-C that waits for an evaluation of an hour; state lost with it"""
    for name, when in (("metrics.mean_loss", "evaluation"), ("generate.generate", "sampling")):
        patch = f"""
import os, signal; from nanobit import generate, metrics
real = {name}
def signalled(model_, *args, **options):
    if model_.training or {when == "sampling"}: os.kill(os.getpid(), signal.SIGINT)
    return real(model_, *args, **options)
{name} = signalled
"""
        how = dict(eval_every=6 if when == "evaluation" else 0, sample_every=6, sample_tokens=200000)
        _, err = train(data_dir, out_dir, when, patch=patch, code=128 + signal.SIGINT, **how)
        events = lines(f"{out_dir}/{when}", EVENTS)
        assert events[-1]["event"] == "interrupt" and events[-1]["step"] == (0 if when == "evaluation" else 6)
        assert checkpoint.newest(f"{out_dir}/{when}", True)[0] and f"--resume={out_dir}/{when}" in err


def test_the_second_signal_exits_at_once(data_dir, out_dir):
    """bug guarded: a run that cannot be stopped while it saves to a dead disk"""
    patch = "import time; from nanobit import checkpoint\ncheckpoint.save = lambda *a: time.sleep(100)"
    values = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id="r") | RUN | dict(eval_every=0)
    child = start("train.py", *flags(**values), patch=patch)
    path = f"{out_dir}/r/{SCALARS}"
    while not os.path.exists(path):
        time.sleep(0.02)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=10)
    assert child.returncode == 128 + signal.SIGINT


def test_damaged_lines_of_the_record_are_reported_and_cost_nothing(data_dir, out_dir):
    """bugs guarded: a resume that ends at a damaged line; lines of the record that are lost without a word; a
    finished run whose last event is damaged and that cannot end again"""
    how = dict(max_steps=10, sample_every=0)
    train(data_dir, out_dir, "r", **how)
    run_dir = f"{out_dir}/r"
    whole, ended = rows(run_dir), lines(run_dir, EVENTS)[-1]
    for name, change in (
        (SCALARS, lambda text: text.replace('"step": 3,', '"stfp": 3,')),
        (EVENTS, lambda text: text.replace('"why": "max_steps"', '"whx": "max_steps"')),
    ):
        with open(f"{run_dir}/{name}", encoding="utf-8") as file:
            text = change(file.read())
        with open(f"{run_dir}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    out, _ = train(data_dir, out_dir, "r", resume="auto", **how)
    says = f"{SCALARS}: 1 of 12 lines before step 10 are missing or damaged"  # of step 0 and 6: evaluations
    assert f"warning: {says}\n" in out
    found = lines(run_dir, EVENTS)
    assert [row["what"] for row in found if row["event"] == "anomaly"] == [says]
    assert rows(run_dir) == [row for row in whole if row["step"] != 3]
    assert found[-1]["result"]["val_loss"] == ended["result"]["val_loss"]


@pytest.mark.parametrize("bad, says", [("float('nan')", "5 steps in a row"), ("{}['x']", "KeyError: 'x'")])
def test_a_run_that_ends_itself_records_why(data_dir, out_dir, bad, says):
    """bugs guarded: a run whose own error looks like a kill; a remedy that names a checkpoint that does not
    exist"""
    patch = NAN.format(bad="True").replace("float('nan')", bad)
    how = dict(eval_every=0, sample_every=0, save_every=0, schedule="linear")
    values = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id="r") | RUN | how
    child = Script(os.path.join(ROOT, "train.py"), flags(**values), ROOT, patch)
    code, _, err = child.wait(60)
    end = lines(f"{out_dir}/r", EVENTS)[-1]
    assert code == 1 and end["event"] == "failed" and says in end["what"] and says in err
    assert "in a row" not in says or "no checkpoint was saved" in end["what"]
