"""trackers.py: what goes to TensorBoard, W&B and trackio, and that none of them can stop a run."""

import glob
import json
import math
import os
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import SCALARS, lines, settings, train

import config
from nanobit import cli, record, trackers
from nanobit import run_dir as run_dir_module
from nanobit.run_dir import RunDir

WANDB = """
import json
from nanobit import metrics
class Settings:
    def __init__(self, **how): pass
class Html:
    def __init__(self, text): self.text = text
class Run:
    url = ""
    def __init__(self, folder): self.file = folder + "/sent.jsonl"
    def define_metric(self, name, step_metric=None): self.log({"define": name, "by": step_metric})
    def log(self, row):
        row = {key: getattr(value, "text", value) for key, value in row.items()}
        print(json.dumps(row), file=open(self.file, "a"))
    def finish(self): self.log({"finished": True})
def setup(settings): pass
def init(**how):
    run = Run(how["dir"])
    run.log({"init": {key: how[key] for key in ("id", "resume", "project", "name", "config")}})
    return run
"""


def begin(tmp_path, name, how, step=0):
    """Return (mirrors, cfg, run_dir, warnings) of one tracker on a run that has begun."""
    cfg = settings(run_id="r", **{name: True}, **how)
    run_dir, warnings = str(tmp_path / "runs" / cfg.run_id), []
    run = RunDir(run_dir)
    run.open()
    run.lock.release()
    if not os.path.exists(os.path.join(run_dir, record.EVENTS)):
        record.event(run_dir, "start", step=0)
    return trackers.start(cfg, run_dir, step, warnings.append), cfg, run_dir, warnings


def fake_wandb(monkeypatch, **changes):
    module = SimpleNamespace()
    exec(WANDB, module.__dict__)
    module.__dict__.update(changes)
    monkeypatch.setitem(sys.modules, "wandb", module)


def scan(path):
    """Yield the records of a .wandb file: a LevelDB log of blocks of 32 KiB after a header of 7 bytes."""
    data, at, whole = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for another header: filled up
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_reported_before_the_run(name, monkeypatch, capsys):
    """A tracker that is on and not installed ends the program; one that is off is not looked for."""
    for other in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, other, None)
    cli.need_packages(config.trackers(settings()), "track")
    with pytest.raises(SystemExit) as end:
        cli.need_packages(config.trackers(settings(**{name: True})), "track")
    assert end.value.code == 2
    assert f"pip install {name}" in capsys.readouterr().err


def test_train_asks_before_it_makes_a_folder(data_dir, out_dir):
    """A tracker that is not installed is an error before the run has a folder."""
    _, err = train(data_dir, out_dir, "r", code=2, trackio=True, patch="sys.modules['trackio'] = None")
    assert err.count("error: ") == 1
    assert not os.path.exists(out_dir)


def test_a_run_is_mirrored_and_a_broken_tracker_does_not_stop_it(data_dir, out_dir, tmp_path):
    """A tracker gets every line of a run; one that fails costs one warning, which train.log keeps."""
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "trackio.py").write_text("def init(*args, **how): raise OSError('no space')")
    patch = f"sys.path.insert(0, {str(tmp_path)!r})"
    out, err = train(data_dir, out_dir, "r", patch=patch, wandb=True, trackio=True, wandb_project="p")
    run_dir = f"{out_dir}/r"
    warning = "warning: trackio is off for the rest of this run (OSError: no space)"
    assert err.count("warning") == 1
    assert warning in err
    assert open(f"{run_dir}/train.log", encoding="utf-8").read().count(warning) == 1
    assert json.loads(out.strip().split("\n")[-1])["step"] == 24
    first, *sent = lines(run_dir, "sent.jsonl")
    assert first["init"]["project"] == "p"
    assert first["init"]["name"] == "r"
    assert first["init"]["config"]["n_layer"] == 1
    assert "origin" not in first["init"]["config"]
    assert sent[:2] == [{"define": "step", "by": None}, {"define": "*", "by": "step"}]
    assert sent[-1] == {"finished": True}
    kept = [
        {k: v for k, v in row.items() if v is not None and k != "time"} for row in lines(run_dir, SCALARS)
    ]
    assert [row for row in sent if "loss" in row or "val_loss" in row] == kept
    assert [row["step"] for row in sent if "bitnet/zero" in row] == list(range(1, 25))
    assert [row["step"] for row in sent if "sample/0" in row] == [12, 24]


def test_only_finite_numbers_are_sent():
    """NaN, infinity and None are not sent, nor is what depends on the clock."""
    cfg = settings(sample_prompts=["a", "b"])
    row = dict(step=3, loss=math.nan, lr=0.5, grad_norm=math.inf, mfu=None, stage=1, time=9.0)
    assert trackers.mirrored(cfg, record.SCALARS, row) == (3, {"lr": 0.5, "stage": 1}, {})
    row = dict(step=4, total={"zero": 0.3, "flip_rate": None}, layers={"a": {"zero": 0.1}})
    assert trackers.mirrored(cfg, record.BITNET, row) == (4, {"bitnet/zero": 0.3}, {})
    row = dict(step=5, mode="greedy", prompt="b", generated_text="c\n", repetition=0.5)
    assert trackers.mirrored(cfg, record.SAMPLES, row) == (5, {}, {"sample/1": "bc\n"})
    assert trackers.mirrored(cfg, record.SAMPLES, row | {"mode": "top_k"}) == (5, {}, {})


@pytest.mark.parametrize("where", ["init", "log", "finish", "exit"])
def test_one_warning_wherever_a_tracker_fails(where, tmp_path, monkeypatch):
    """An exception in the thread of a tracker costs one warning, and does not reach training."""

    def fail(*args, **how):
        raise SystemExit(3) if where == "exit" else ValueError("two\nlines")

    fake_wandb(monkeypatch)
    module = sys.modules["wandb"]
    owner = module if where in ("init", "exit") else module.Run
    monkeypatch.setattr(owner, "init" if where == "exit" else where, fail)
    mirrors, cfg, _, warnings = begin(tmp_path, "wandb", {})
    for step in range(3):
        trackers.mirror(mirrors, cfg, record.SCALARS, dict(step=step, loss=1.0))
        time.sleep(0.05)
    trackers.finish(mirrors)
    fault = "SystemExit: 3" if where == "exit" else "ValueError: two lines"
    assert warnings == [f"warning: wandb is off for the rest of this run ({fault})"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_keeps_nobody_waiting(where, tmp_path, monkeypatch):
    """Training does not wait for a tracker, at its start, in the middle or at its end."""
    fake_wandb(monkeypatch)
    monkeypatch.setattr(trackers, "HANGS", 1.0)
    owner = sys.modules["wandb"] if where == "init" else sys.modules["wandb"].Run
    monkeypatch.setattr(owner, where, lambda *args, **how: time.sleep(30))
    began = time.monotonic()
    mirrors, cfg, _, warnings = begin(tmp_path, "wandb", {})
    for step in range(3):
        trackers.mirror(mirrors, cfg, record.SCALARS, dict(step=step, loss=1.0))
    assert time.monotonic() - began < 0.9
    assert not warnings
    if where != "finish":  # noticed on the way, and then no longer fed
        time.sleep(1.1)
        trackers.mirror(mirrors, cfg, record.SCALARS, dict(step=3, loss=1.0))
        assert len(warnings) == 1
    trackers.finish(mirrors)
    assert warnings == ["warning: wandb is off for the rest of this run (no answer for 1.0 seconds)"]
    assert time.monotonic() - began < 20


def test_wandb_id_stays_with_the_run(tmp_path, monkeypatch):
    """A resumed run continues its W&B run; another run does not write into it."""
    fake_wandb(monkeypatch)

    def wandb_id(folder, step):
        mirrors, _, run_dir, warnings = begin(tmp_path / folder, "wandb", {}, step=step)
        trackers.finish(mirrors)
        assert not warnings
        return [row["init"] for row in lines(run_dir, "sent.jsonl") if "init" in row][-1]

    first, resumed, other = wandb_id("a", 0), wandb_id("a", 10), wandb_id("b", 10)
    assert first["id"] == resumed["id"] != other["id"]
    assert resumed["resume"] == "allow"


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    """The curves of a resumed run hold each step once, that of the checkpoint included."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end, loss in ((0, 12, 1.0), (10, 14, 2.0)):
        mirrors, cfg, run_dir, warnings = begin(tmp_path, "tensorboard", {}, step=start)
        for step in range(start, end + 1):
            if step > start:
                row = dict(step=step, loss=loss, time=1.0)
                record.append(run_dir, record.SCALARS, **row)
                trackers.mirror(mirrors, cfg, record.SCALARS, row)
            if step % 5 == 0:
                trackers.mirror(mirrors, cfg, record.SCALARS, dict(step=step, val_loss=loss))
        sample = dict(step=end, mode="greedy", prompt="a", generated_text="<b>\n")
        trackers.mirror(mirrors, settings(sample_prompts=["a"]), record.SAMPLES, sample)
        trackers.finish(mirrors)
        assert not warnings
        record.rewind(run_dir, 10)
    events = EventAccumulator(os.path.join(run_dir, "tensorboard")).Reload()
    drawn = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in ("loss", "val_loss")}
    assert drawn["loss"] == [(step, 1.0 if step <= 10 else 2.0) for step in range(1, 15)]
    assert drawn["val_loss"] == [(0, 1.0), (5, 1.0), (10, 2.0)]
    texts = {
        name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        for name in events.Tags()["tensors"]
    }
    assert texts["sample/0/text_summary"] == "    a<b>\n"
    assert "    n_layer = 2\n" in texts["settings/text_summary"]


def test_wandb_offline_for_real(data_dir, out_dir, monkeypatch):
    """W&B itself takes each line, by the calls that the stubs above take."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    out, err = train(data_dir, out_dir, "r", wandb=True, max_steps=12, save_every=0)
    assert "warning" not in err
    assert json.loads(out.strip().split("\n")[-1])["step"] == 12
    (path,) = glob.glob(f"{out_dir}/r/wandb/offline-run-*/*.wandb")
    rows, metrics = [], []
    for data in scan(path):
        part = wandb_internal_pb2.Record.FromString(data)
        items = [("/".join(item.nested_key) or item.key, item.value_json) for item in part.history.item]
        rows.append({key: json.loads(value) for key, value in items})
        metrics.append((part.metric.glob_name, part.metric.step_metric))
    kept = [
        {k: v for k, v in row.items() if v is not None and k != "time"}
        for row in lines(f"{out_dir}/r", SCALARS)
    ]
    sent = [
        {k: v for k, v in row.items() if k[0] != "_"} for row in rows if "loss" in row or "val_loss" in row
    ]
    assert sent == kept
    assert ("*", "step") in metrics
    assert [row["step"] for row in rows if any(key.startswith("sample/0") for key in row)] == [12]


def test_only_rank_0_starts_trackers(tmp_path, monkeypatch):
    """Of several ranks only the first one sends lines to the trackers."""
    monkeypatch.setattr(run_dir_module, "RANK", 1)
    run = RunDir(str(tmp_path))
    run.start_log(settings(wandb=True, max_steps=3), 0)
    assert run.trackers is None
