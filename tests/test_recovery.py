"""train.py as a child process: whatever kills it, the resumed run is the unbroken one, bit for bit."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import RUN, flags, lines, start, train

import checkpoint

SCALARS, EVENTS = "metrics/scalars.jsonl", "metrics/events.jsonl"


def final(run_dir, step=24):
    """weights and optimizer state at the end of a run"""
    folder = checkpoint.step_dir(run_dir, step)
    return checkpoint.load(folder)["model"], checkpoint.load(folder, checkpoint.TRAINER)["optimizer"]


def rows(run_dir):
    """what a run logged, without what depends on the clock"""
    clocked = {"time", "tokens_per_sec", "step_ms", "memory_gb"}
    return [{k: v for k, v in row.items() if k not in clocked} for row in lines(run_dir, SCALARS)]


def assert_same_run(a, b):
    for left, right in zip(final(a), final(b)):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(a) == rows(b)
    assert lines(a, "samples/samples.jsonl") == lines(b, "samples/samples.jsonl")
    assert json.load(open(f"{a}/best.json")) == json.load(open(f"{b}/best.json"))
    total = [row["total"] | {"flip_rate": 0} for row in lines(a, "metrics/bitnet.jsonl")]
    assert total == [row["total"] | {"flip_rate": 0} for row in lines(b, "metrics/bitnet.jsonl")]


@pytest.fixture
def out_dir(tmp_path):
    return str(tmp_path / "runs")


def kill_at(data_dir, out_dir, step, how=signal.SIGKILL, run_id="broken", **changes):
    """train until the log has this step, then send the signal; returns the exit code and stderr"""
    values = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id=run_id) | RUN | changes
    slow = "import time, torch; f = torch.optim.AdamW.step\n"
    slow += "def step(*a, **k): time.sleep(0.05); return f(*a, **k)\ntorch.optim.AdamW.step = step"
    child = start("train.py", *flags(**values), patch=slow)
    path, deadline = os.path.join(out_dir, run_id, SCALARS), time.time() + 100
    while not (os.path.exists(path) and f'"step": {step}, "epoch"' in open(path, encoding="utf-8").read()):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(how)
    _, err = child.communicate(timeout=60)
    return child.returncode, err


def test_kill_9_and_resume_is_the_unbroken_run(data_dir, out_dir):
    """bugs guarded: data that starts over, random state, optimizer state, best or log lines lost; across
    the epoch edge at step 7.75, with dropout, killed twice and once interrupted"""
    how = dict(dropout=0.2)
    train(data_dir, out_dir, "whole", **how)
    assert kill_at(data_dir, out_dir, 7, **how)[0] == -signal.SIGKILL
    assert kill_at(data_dir, out_dir, 17, resume="auto", **how)[0] == -signal.SIGKILL
    code, err = kill_at(data_dir, out_dir, 19, signal.SIGTERM, resume="auto", **how)
    assert code == 128 + signal.SIGTERM and "--resume=auto" in err and "Traceback" not in err
    out, _ = train(data_dir, out_dir, "broken", resume="auto", **how)
    assert_same_run(f"{out_dir}/whole", f"{out_dir}/broken")
    resumed = [row["step"] for row in lines(f"{out_dir}/broken", EVENTS) if row["event"] == "resume"]
    assert resumed[:2] == [6, 15] or resumed[:2] == [5, 15]
    assert resumed[2] >= 19 and json.loads(out.strip().split("\n")[-1])["step"] == 24


def test_compiled_run_resumes_bit_for_bit(data_dir, out_dir):
    """bug guarded: a compiled model draws its dropout from other random numbers after a resume"""
    how = dict(dropout=0.2, compile=True, sample_every=0, n_layer=1)
    train(data_dir, out_dir, "whole", **how)
    assert kill_at(data_dir, out_dir, 8, **how)[0] == -signal.SIGKILL
    train(data_dir, out_dir, "broken", resume="auto", **how)
    for left, right in zip(final(f"{out_dir}/whole"), final(f"{out_dir}/broken")):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(f"{out_dir}/whole") == rows(f"{out_dir}/broken")
    assert json.load(open(f"{out_dir}/whole/config.json"))["compile"] is True


KILL_IN_SAVE = """
import os, signal, checkpoint
real, count = os.{function}, [0]
def dying(*args):
    count[0] += 1
    if count[0] == {nth}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
checkpoint.os = type(os)('os'); checkpoint.os.__dict__.update(os.__dict__); checkpoint.os.{function} = dying
"""


@pytest.mark.parametrize("function, nth", [("fsync", 8), ("rename", 2)])
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
    assert "passed over step 16" in out and checkpoint.steps(f"{out_dir}/r")[0] == 16


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
    # a path with another run_id branches off; what may change is printed
    origin = checkpoint.step_dir(f"{out_dir}/a", 5)
    out, _ = train(data_dir, out_dir, "b", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "changed: grad_clip = 0.5, the checkpoint has 1.0" in out
    event = lines(f"{out_dir}/b", EVENTS)[0]
    assert event["event"] == "resume" and event["step"] == 5 and event["path"] == origin
    assert [row["step"] for row in lines(f"{out_dir}/b", SCALARS) if "loss" in row] == [6, 7, 8, 9, 10]
    # a path inside the run itself rewinds it; later steps are set aside
    out, _ = train(data_dir, out_dir, "a", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "set aside" in out and rows(f"{out_dir}/a")[-1] == rows(f"{out_dir}/b")[-1]
    assert [row["step"] for row in lines(f"{out_dir}/a", SCALARS) if "loss" in row] == list(range(1, 11))


def test_init_from_takes_weights_only(data_dir, out_dir):
    """bug guarded: init_from that continues the step, or resumes the optimizer; and float weights made
    ternary"""
    train(data_dir, out_dir, "float", max_steps=6, ternary=False, sample_every=0)
    train(
        data_dir,
        out_dir,
        "from",
        max_steps=6,
        init_from=f"{out_dir}/float",
        sample_every=0,
        learning_rate=0.0,
        stage2_lr=0.0,
        min_lr=0.0,
    )
    events = lines(f"{out_dir}/from", EVENTS)
    assert events[0]["event"] == "start" and events[0]["step"] == 0
    for key, value in final(f"{out_dir}/float", 6)[0].items():
        assert torch.equal(value, final(f"{out_dir}/from", 6)[0][key]) or "proj" not in key


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


NAN = """
import torch, model
real, count = model.Transformer.forward, [0]
def forward(self, idx, targets=None, cache=None):
    out = real(self, idx, targets, cache)
    if targets is not None and self.training:
        count[0] += 1
        if {bad}: out = out * float('nan')
    return out
model.Transformer.forward = forward
"""


def test_a_step_that_is_not_finite_is_skipped_and_told(data_dir, out_dir):
    """bug guarded: one NaN ends in NaN weights three days later"""
    patch = NAN.format(bad="count[0] in (4, 6)")
    train(data_dir, out_dir, "r", patch=patch, max_steps=12, save_every=0, sample_every=0)
    weights, _ = final(f"{out_dir}/r", 12)
    assert all(w.isfinite().all() for w in weights.values())
    told = [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert [(row["step"], row["steps"]) for row in told] == [(4, 1), (6, 1)]
    losses = {row["step"]: row["loss"] for row in lines(f"{out_dir}/r", SCALARS) if "loss" in row}
    assert losses[4] is None and losses[5] is not None and list(losses) == list(range(1, 13))


def test_a_gradient_that_is_not_finite_is_skipped_too(data_dir, out_dir):
    """bug guarded: an overflow in the backward only, which the loss does not show"""
    patch = "import torch, optim\nreal = optim.make_optimizer\ncount = [0]\n"
    patch += "def hook(grad):\n    count[0] += 1\n    return grad * float('inf') if count[0] == 4 else grad\n"
    patch += "def make(cfg, model):\n    model.norm.weight.register_hook(hook)\n    return real(cfg, model)\n"
    patch += "optim.make_optimizer = make"
    train(data_dir, out_dir, "r", patch=patch, max_steps=8, save_every=0, sample_every=0)
    told = [row for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    assert [(row["step"], row["steps"]) for row in told] == [(4, 1)]
    assert all(w.isfinite().all() for w in final(f"{out_dir}/r", 8)[0].values())


def test_a_run_that_overflows_ends_with_one_line(data_dir, out_dir):
    """bug guarded: infinities in the record of ternary health end the run with a traceback"""
    _, err = train(
        data_dir, out_dir, "r", code=1, learning_rate=1e30, stage2_lr=1e30, sample_every=0, eval_every=0
    )
    assert "5 steps in a row" in err


def test_a_validation_loss_that_is_not_a_number_is_not_the_best(data_dir, out_dir):
    """bug guarded: NaN takes the place of the best checkpoint, which is deleted"""
    patch = "import model\nreal = model.mean_loss\ncount = [0]\n"
    patch += (
        "def nan(*a, **k):\n    count[0] += 1\n    return float('nan') if count[0] == 4 else real(*a, **k)\n"
    )
    patch += "model.mean_loss = nan"
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
    from conftest import write_data

    train(data_dir, out_dir, "r", max_steps=6, sample_every=0)
    other = write_data(tmp_path / "other", n_train=501)
    _, err = train(other, out_dir, "r", code=2, resume="auto", sample_every=0)
    assert "its tokens are not those" in err


def test_without_a_whole_checkpoint_the_old_run_is_kept(data_dir, out_dir):
    """bug guarded: an unattended restart after disk damage that erases a month of curves"""
    train(data_dir, out_dir, "r", max_steps=6, save_every=0, eval_every=0, sample_every=0, schedule="linear")
    os.truncate(f"{checkpoint.step_dir(f'{out_dir}/r', 6)}/checkpoint.pt", 100)
    out, _ = train(data_dir, out_dir, "r", max_steps=6, resume="auto", sample_every=0)
    assert "starting anew" in out and len(lines(f"{out_dir}/r.aside", SCALARS)) == 6


def test_five_in_a_row_end_the_run(data_dir, out_dir):
    """bug guarded: a run that skips for days; the fifth in a row is found although the log comes every 6
    steps"""
    patch = NAN.format(bad="7 <= count[0] <= 11")
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, log_every=6, sample_every=0, eval_every=0)
    assert "5 steps in a row" in err and "checkpoints/step_000011" in err
    # what was saved among them has good weights, and a resumed run begins a new row
    train(data_dir, out_dir, "r", resume="auto", log_every=6, sample_every=0, eval_every=0)


FULL_DISK = """
import os, checkpoint
real, count = os.fsync, [0]
def full(*args):
    count[0] += 1
    if 5 <= count[0] <= {last}: raise OSError(28, 'No space left on device')
    return real(*args)
checkpoint.os = type(os)('os'); checkpoint.os.__dict__.update(os.__dict__); checkpoint.os.fsync = full
"""


def test_a_disk_that_fills_loses_nothing(data_dir, out_dir):
    """bug guarded: a save that fails ends the run, or takes the last good checkpoint with it"""
    how = dict(sample_every=0, eval_every=0, schedule="linear")
    _, err = train(data_dir, out_dir, "r", patch=FULL_DISK.format(last=8), **how)
    assert "was not saved" in err and checkpoint.steps(f"{out_dir}/r")[0] == 24
    assert [row["step"] for row in lines(f"{out_dir}/r", EVENTS) if row["event"] == "anomaly"]
    patch = FULL_DISK.format(last=10**9) + "\nimport time; time.sleep = lambda seconds: None"
    _, err = train(data_dir, out_dir, "s", patch=patch, code=1, **how)
    assert "error: " in err and checkpoint.newest(f"{out_dir}/s", True)[0] in (
        None,
        checkpoint.step_dir(f"{out_dir}/s", 5),
    )


def test_out_of_memory_is_one_line(data_dir, out_dir):
    """bug guarded: a screen of traceback instead of the remedy"""
    patch = NAN.replace(
        "if {bad}: out = out * float('nan')", "raise torch.OutOfMemoryError('CUDA out of memory')"
    )
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, sample_every=0)
    assert "--batch_size=2 --total_batch_size=64" in err and err.count("error: ") == 1


def test_signals_are_heard_in_evaluation_and_sampling(data_dir, out_dir):
    """bug guarded: Ctrl-C that waits for an evaluation of an hour; state lost with it"""
    for name, when in (("mean_loss", "evaluation"), ("generate", "sampling")):
        patch = f"""
import os, signal, model
real = model.{name}
def signalled(model_, *args, **options):
    if model_.training or {name == "generate"}: os.kill(os.getpid(), signal.SIGINT)
    return real(model_, *args, **options)
model.{name} = signalled
"""
        how = dict(eval_every=6 if name == "mean_loss" else 0, sample_every=6, sample_tokens=200000)
        _, err = train(data_dir, out_dir, when, patch=patch, code=128 + signal.SIGINT, **how)
        events = lines(f"{out_dir}/{when}", EVENTS)
        assert events[-1]["event"] == "interrupt" and events[-1]["step"] == (0 if name == "mean_loss" else 6)
        assert checkpoint.newest(f"{out_dir}/{when}", True)[0] and "--resume=auto" in err


def test_the_second_signal_exits_at_once(data_dir, out_dir):
    """bug guarded: a run that cannot be stopped while it saves to a dead disk"""
    patch = "import checkpoint, time\ncheckpoint.save = lambda *a: time.sleep(100)"
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


def test_max_minutes_and_patience_end_as_if_finished(data_dir, out_dir):
    """bugs guarded: a run ended by its time budget that is not saved; patience forgotten by a resume"""
    out, _ = train(
        data_dir, out_dir, "t", max_minutes=0.01, max_steps=10**6, save_every=0, log_every=50, sample_every=0
    )
    result = json.loads(out.strip().split("\n")[-1])
    assert 0 < result["step"] < 10**6 and os.path.exists(f"{result['checkpoint']}/manifest.json")
    assert result["val_loss"] is not None
    how = dict(
        patience=2,
        learning_rate=0.0,
        stage2_lr=0.0,
        min_lr=0.0,
        eval_every=2,
        sample_every=0,
        stage2_weight_decay=0.0,
        weight_decay=0.0,
    )
    out, _ = train(data_dir, out_dir, "p", **how)
    assert json.loads(out.strip().split("\n")[-1])["step"] == 6, "best at 2, none better at 4 and 6"
    out, _ = train(data_dir, out_dir, "p", resume="auto", **how)
    assert "is finished" in out
    out, _ = train(data_dir, out_dir, "p", resume="auto", **how | dict(patience=0))
    assert json.loads(out.strip().split("\n")[-1])["step"] == 24, "without patience it goes on"
    # an interrupt after an evaluation does not count that evaluation twice
    how |= dict(patience=4)
    assert kill_at(data_dir, out_dir, 5, signal.SIGTERM, **how)[0] == 128 + signal.SIGTERM
    assert (
        json.loads(train(data_dir, out_dir, "broken", resume="auto", **how)[0].strip().split("\n")[-1])[
            "step"
        ]
        == 10
    )


def test_accumulation_does_not_change_the_result(data_dir, out_dir):
    """bug guarded: a gradient summed instead of averaged over micro-steps; other tokens with another
    batch_size"""
    how = dict(ternary=False, total_batch_size=64, max_steps=8, sample_every=0)
    train(data_dir, out_dir, "one", batch_size=4, **how)
    train(data_dir, out_dir, "four", batch_size=1, **how)
    a, b = (
        [row["loss"] for row in lines(f"{out_dir}/{r}", SCALARS) if "loss" in row] for r in ("one", "four")
    )
    assert a == pytest.approx(b, abs=1e-4)


def test_bad_input_ends_with_one_line_and_no_traceback(data_dir, out_dir, tmp_path):
    """bug guarded: a traceback for what the user can mend"""
    (tmp_path / "file").write_text("")
    for changes, says in (
        (dict(out_dir=f"{tmp_path}/file/x"), "cannot write"),
        (dict(dataset="nowhere"), "data set"),
        (dict(resume=f"{tmp_path}/gone"), "resume ="),
        (dict(init_from=f"{tmp_path}/file"), "init_from ="),
        (dict(sample_prompts="['ABC']"), "sample_prompts"),
        (dict(device="cuda:7"), "device = 'cuda:7'"),
        (dict(seq_len=600), "seq_len = 600"),
    ):
        values = dict(data_dir=data_dir, out_dir=out_dir, run_id="x") | changes
        _, err = train(values.pop("data_dir"), values.pop("out_dir"), values.pop("run_id"), code=2, **values)
        assert says in err and err.count("error: ") == 1, err


def test_output_goes_where_programs_look(data_dir, out_dir):
    """bug guarded: progress on stdout, a bar in a log file, a last line that is not JSON"""
    out, err = train(data_dir, out_dir, "r", max_steps=6)
    result = json.loads(out.strip().split("\n")[-1])
    assert set(result) == set(
        "run_id step tokens loss val_loss val_bits_per_byte seconds tokens_per_sec "
        "peak_memory_gb checkpoint".split()
    )
    log = open(f"{out_dir}/r/train.log", encoding="utf-8").read()
    assert log == err and "\r" not in err and log.count("\nstep ") == 6
    row = next(row for row in lines(f"{out_dir}/r", SCALARS) if row["step"] == 1)
    assert (
        row["tokens"] == 64
        and row["epoch"] == 4 / 31
        and row["stage"] == 1
        and row["lr"] == pytest.approx(5e-4)
    )
    config = json.load(open(f"{out_dir}/r/config.json"))
    assert config["settings"]["max_steps"] == {"value": 6, "origin": "--max_steps=6"} and config["pid"]
    keys = "step epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu "
    keys += "memory_gb gpu_util time"
    assert set(row) == set(keys.split())
    health = lines(f"{out_dir}/r", "metrics/bitnet.jsonl")[0]
    assert set(health) == {"step", "total", "layers"} and len(health["layers"]) == 14
    folder = checkpoint.step_dir(f"{out_dir}/r", 6)
    assert set(checkpoint.load(folder)) == {"format", "step", "tokens", "config", "tokenizer", "model"}
    assert set(os.listdir(folder)) == {"checkpoint.pt", "trainer.pt", "manifest.json"}
    events = [event["event"] for event in lines(f"{out_dir}/r", EVENTS)]
    assert events[0] == "start" and events[-1] == "finish" and "save" in events
    samples = lines(f"{out_dir}/r", "samples/samples.jsonl")
    assert [s["mode"] for s in samples] == ["greedy", "top_k", "nucleus"]
    assert set(samples[0]) == {"step", "mode", "prompt", "generated_text", "repetition"}


def test_evaluate_and_sample_agree_with_training(data_dir, out_dir):
    """bug guarded: evaluation of other windows, or of another forward, than while training"""
    from conftest import run

    out, _ = train(data_dir, out_dir, "r", max_steps=6, eval_tokens=10**6, sample_every=0)
    trained = json.loads(out.strip().split("\n")[-1])
    where = [f"--ckpt={out_dir}/r", f"--data_dir={data_dir}"]
    out, _ = run("evaluate.py", *where, "--batch_size=4")
    result = json.loads(out.strip().split("\n")[-1])
    assert result["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-6) and result["dtype"] == "float32"
    assert result["bits_per_byte"] == pytest.approx(trained["val_bits_per_byte"], abs=1e-6)
    ask = [where[0], "--prompt=ab", "--max_new_tokens=20", "--num_samples=4"]
    texts = [run("sample.py", *ask, more) for more in ("--seed=3", "--seed=3", "--seed=4")]
    assert texts[0][0] == texts[1][0] != texts[2][0]
    assert texts[0][0].count("\nab") == 3 and "tokens/s" in texts[0][1]
    assert "tokenizer has no character 'Z'" in run("sample.py", where[0], "--prompt=Z", code=2)[1]
    assert "--prompt=... is missing" in run("sample.py", where[0], code=2)[1]
    assert "no split 'test'" in run("evaluate.py", *where, "--split=test", code=2)[1]


def test_a_terminal_gets_a_bar(data_dir, out_dir):
    """bug guarded: a bar that breaks, or plain lines that flood a terminal"""
    import pty

    values = dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id="r") | RUN | dict(max_steps=8)
    leader, follower = pty.openpty()
    import sys

    from conftest import ROOT

    child = subprocess.Popen(
        [sys.executable, "train.py", *flags(**values)], cwd=ROOT, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        shown += chunk
        if not chunk:
            break
    child.communicate()
    assert child.returncode == 0 and b"8/8" in shown and b"loss" in shown and b"\nstep 3" not in shown
