"""monitor.py: what it tells of a run, from runs that train.py made and from records written by hand."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import ROOT, lines, run, start, train, write_data

import checkpoint
import monitor
import quant
import status

SETTINGS = dict(max_steps=1000, learning_rate=1e-3, min_lr=1e-5, schedule="wsd", save_every=100, keep_last=3)
DEAD = 2**22 + 1  # above the largest pid of Linux
LATE = dict(lr=1e-4)


def child_pid():
    """the pid of a process that is there and is not this one"""
    return os.getppid()


def write_run(
    path,
    losses=(),
    evals=(),
    health=(),
    routers=(),
    greedy=(),
    events=(),
    age=0.0,
    pid=None,
    row=(),
    **settings,
):
    """a run folder as train.py leaves it, a line every 10 steps and 10 s, the newest `age` seconds old.
    health: dicts; greedy: repetitions, at 10, 20, ...; row: fields of every training line, row[key] may be
    a list"""
    now, row = time.time() - age, dict(row)
    began = now - 10 * len(losses)
    rows = [
        dict(step=10 * i + 10, loss=loss, lr=1e-3, stage=1, step_ms=100.0, tokens_per_sec=500.0)
        | {key: value[i] if isinstance(value, list) else value for key, value in row.items()}
        | dict(time=began + 10 * i + 10)
        for i, loss in enumerate(losses)
    ]
    text = {
        "scalars": rows + [dict(step=step, val_loss=loss) for step, loss in evals],
        "bitnet": [dict(step=10 * i + 10, total=total, layers={}) for i, total in enumerate(health)],
        "router": [dict(step=10 * i + 10, total=total, layers=[]) for i, total in enumerate(routers)],
        "events": [dict(event="start", step=0, time=began), *events],
    }
    os.makedirs(f"{path}/metrics")
    os.makedirs(f"{path}/samples")
    for name, content in text.items():
        with open(f"{path}/metrics/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in content)
    with open(f"{path}/samples/samples.jsonl", "w") as file:
        for i, value in enumerate(greedy):
            sample = dict(
                step=10 * i + 10, mode="greedy", prompt="a", generated_text="b\x1b[2J", repetition=value
            )
            file.write(json.dumps(sample) + "\n")
    found = {key: {"value": value, "origin": "default"} for key, value in (SETTINGS | settings).items()}
    with open(f"{path}/config.json", "w") as file:
        json.dump(dict(settings=found, pid=pid or child_pid(), params={"total": 1000}), file)
    return str(path)


def noisy(slope, n=60, start=2.0, noise=0.02):
    """n losses that fall by slope a line, with scatter"""
    return (start - slope * np.arange(n) + np.random.default_rng(0).normal(0, noise, n)).tolist()


def heads(status):
    """the first word of each warning"""
    return [text.split(":")[0] for text in status["warnings"]]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """a folder with a ternary run `r`, 72 wide so that a matrix is larger than the picture's corner, and
    its float twin `f`"""
    folder = tmp_path_factory.mktemp("real")
    data_dir = write_data(folder / "data")
    train(data_dir, f"{folder}/runs", "r", n_embd=72, learning_rate=0.02)
    write_run(folder / "runs" / "f", losses=noisy(0.01, n=24), evals=[(0, 2.5)], run_id="f", ternary=False)
    part = checkpoint.load(checkpoint.step_dir(f"{folder}/runs/r", 5))
    part["config"]["ternary"] = False
    checkpoint.save(f"{folder}/runs/f", 5, part, {"format": 1})
    return f"{folder}/runs"


def test_status_agrees_with_the_files_and_leaves_them(real):
    """bugs guarded: a name that train.py no longer writes and the monitor shows as unknown; a monitor that
    writes into a run"""

    def state():
        return {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(real)}

    before = state()
    out, _ = run("monitor.py", f"{real}/r", "--json")
    now = json.loads(out)
    assert state() == before and out.count("\n") == 1
    rows = [row for row in lines(f"{real}/r", "metrics/scalars.jsonl") if "loss" in row]
    for key in status.LOGGED:
        assert now[key] == rows[-1][key], key
    with open(f"{real}/r/best.json") as file:
        assert now["best"] == json.load(file)
    assert (now["state"], now["why"], now["step"], now["max_steps"]) == ("finished", "max_steps", 24, 24)
    assert now["progress"] == 1 and now["eta_seconds"] == 0 and now["checkpoint"]["step"] == 24
    assert now["bitnet"]["zero"] + now["bitnet"]["plus"] + now["bitnet"]["minus"] == pytest.approx(
        1, abs=1e-4
    )
    greedy = [row for row in lines(f"{real}/r", "samples/samples.jsonl") if row["mode"] == "greedy"]
    assert now["sample"]["generated_text"] == greedy[-1]["generated_text"]
    assert now["repetition"] == greedy[-1]["repetition"] and now["val_step"] == 24
    assert now["device"] and now["disk_need_gb"] == 0 and now["pid_alive"] is False
    # several runs, and the runs of a folder, are a list; a float run has no codes
    out, _ = run("monitor.py", f"{real}/r", f"{real}/f/", "--json")
    assert [(each["run_id"], each["bitnet"] is None) for each in json.loads(out)["runs"]] == [
        ("r", False),
        ("f", True),
    ]
    out, _ = run("monitor.py", "--out_dir", real)
    assert [line.split()[0] for line in out.splitlines()] == ["run_id", "f", "r"] and "24/24 100%" in out


@pytest.mark.parametrize("width", (60, 80))
def test_screen_fits(tmp_path, width):
    """bugs guarded: lines that a terminal wraps; the escape codes of a sample sent to the terminal"""
    odd = [dict(event="anomaly", step=s, what="not finite, skipped", steps=1) for s in range(400, 600, 10)]
    health = dict(zero=0.9, plus=0.05, minus=0.05, near_threshold=0.3, flip_rate=0.2)
    path = write_run(
        tmp_path / ("long_name" * 12),
        losses=noisy(0),
        evals=[(0, 2.5), (600, 2.0)],
        health=[health] * 60,
        greedy=[0.1, 0.9],
        events=odd,
        row=dict(mfu=0.5, gpu_util=0.9, memory_gb=70.0, weight_decay=0.1),
    )
    found = status.status(path)
    text = monitor.screen(found, width) + monitor.table([found], width)
    assert max(map(len, text)) <= width and "\x1b" not in "".join(text)
    shown = " ".join(" ".join(text).split())
    for part in (
        "training",
        "600 of 1,000, 60.0%",
        "best 2.0000 at step 600",
        "MFU 50.0%",
        "90% busy",
        "20;",
    ):
        assert part in shown, part


def test_damage_is_left_out(tmp_path):
    """bug guarded: a traceback for a half-written line, a missing file, a NaN, an empty folder"""
    path = write_run(tmp_path / "r", losses=noisy(0.01), evals=[(0, 2.5)], health=[dict(zero=0.33)] * 3)
    with open(f"{path}/metrics/scalars.jsonl", "ab") as file:
        file.write(b'{"step": 601, "lo\n\xff\xfe\x00\n[1]\n{"loss": 1.0}\n{"step": null, "loss": 3}\n')
        file.write(b'{"step": 610, "loss": NaN, "lr": "x", "time": Infinity}\n{"step": 620, "lo')
    with open(f"{path}/metrics/bitnet.jsonl", "a") as file:
        file.write('{"step": 610, "total": 7}\n{"step": 620, "total": {"zero": NaN}}\n{"st')
    found = status.status(path)
    assert found["step"] == 610 and found["loss"] is None and found["lr"] is None
    assert found["bitnet"]["zero"] is None and heads(found) == ["not finite"]
    for flag in ("--json", f"--plot={tmp_path}/out.png", "--window=6"):
        out, _ = run("monitor.py", path, flag)
        assert "NaN" not in out and "Infinity" not in out
    os.truncate(f"{path}/config.json", 100)
    assert status.status(path)["max_steps"] is None
    for name in ("config.json", "metrics/events.jsonl", "metrics/bitnet.jsonl", "samples/samples.jsonl"):
        os.remove(f"{path}/{name}")
        assert status.status(path)["step"] == 610
        run("monitor.py", path)
    os.makedirs(tmp_path / "empty" / "e")
    assert status.status(f"{tmp_path}/empty/e")["state"] == "empty"
    out, _ = run("monitor.py", f"--out_dir={tmp_path}/empty")
    assert "empty" in out


def test_state(tmp_path, monkeypatch):
    """bugs guarded: a dead run that seems to train; a run on another machine that seems dead; a pause for
    an evaluation taken for the end; the finish of a run that was lengthened; a zombie taken for a run"""
    finish, resume = (dict(event=kind, step=600, time=time.time()) for kind in ("finish", "resume"))
    interrupt = dict(event="interrupt", step=603, signal=15, time=time.time())

    def state(name, **how):
        found = status.status(write_run(tmp_path / name, losses=noisy(0.01), **how))
        assert [text for text in heads(found) if "dead" in text or "stopped" in text] == (
            [found["state"]] if found["state"] in ("dead process", "stopped writing") else []
        )
        return found["state"]

    assert state("training", age=30) == "training"
    assert state("evaluating", age=55) == "training", "under a minute"
    assert state("stopped", age=100) == "stopped writing"
    assert state("dead", age=5, pid=DEAD) == "dead process"
    assert state("own_pid", age=5, pid=os.getpid()) == "dead process", "pids begin anew in a container"
    assert state("finished", age=500, pid=DEAD, events=[finish]) == "finished"
    assert state("interrupted", age=500, pid=DEAD, events=[interrupt]) == "interrupted"
    assert status.status(f"{tmp_path}/interrupted")["step"] == 603, "it is past its last line"
    assert state("again", age=5, events=[finish, resume]) == "training"
    # a long pause is usual where there was one: 300 s at line 30
    path = write_run(tmp_path / "pauses", losses=noisy(0.01), age=400)
    with open(f"{path}/metrics/scalars.jsonl") as file:
        rows = [json.loads(line) for line in file]
    for row in rows[:30]:
        row["time"] -= 300
    with open(f"{path}/metrics/scalars.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(f"{path}/metrics/events.jsonl", "w") as file:
        file.write(json.dumps(dict(event="start", step=0, time=rows[0]["time"] - 10)) + "\n")
    assert status.status(path)["state"] == "training"
    with open(f"{tmp_path}/dead/config.json") as file:
        config = json.load(file)
    with open(f"{tmp_path}/dead/config.json", "w") as file:
        json.dump(config | {"host": "elsewhere"}, file)
    found = status.status(f"{tmp_path}/dead")
    assert found["state"] == "training" and found["pid_alive"] is None
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert status.is_alive({"pid": child.pid}) is False
    child.wait()


HEALTHY = dict(zero=0.33, plus=0.33, minus=0.34, near_threshold=0.06)
SKIP = dict(event="anomaly", step=590, what="not finite, skipped", steps=2)
RISE = [(0, 2.5), (200, 2.0), (400, 2.1), (600, 2.2)]


@pytest.mark.parametrize(
    "expected,how",
    (
        (
            "",
            dict(
                losses=noisy(0.01), evals=[(0, 2.5), (600, 1.5)], health=[HEALTHY | dict(flip_rate=0.1)] * 60
            ),
        ),
        ("", dict(losses=noisy(0.002))),  # falls by 0.05 over noise of 0.02
        ("plateau", dict(losses=noisy(0))),
        ("rising", dict(losses=noisy(-0.01))),
        ("plateau", dict(losses=noisy(0), row=LATE)),
        ("plateau", dict(losses=noisy(0), schedule="constant")),
        ("", dict(losses=noisy(0, n=49))),  # too few lines to tell
        ("", dict(losses=noisy(0), events=[dict(event="finish", step=600, why="max_steps")])),
        ("overfitting", dict(losses=noisy(0.01), evals=RISE)),
        ("", dict(losses=noisy(0.01), evals=RISE[:3])),  # one worse evaluation is chance
        ("rising", dict(losses=noisy(-0.01), evals=RISE)),  # both losses rise: no overfitting
        ("repetition", dict(losses=noisy(0.01), greedy=[0.1, 0.1, 0.5])),
        ("", dict(losses=noisy(0.01), greedy=[0.9, 0.5, 0.5])),
        ("throughput", dict(losses=noisy(0.01), row=dict(tokens_per_sec=[500.0] * 55 + [300.0] * 5))),
        ("", dict(losses=noisy(0.01), row=dict(tokens_per_sec=[500.0] * 59 + [10.0]))),  # one slow line
        ("not finite", dict(losses=noisy(0.01), events=[SKIP])),
        ("not finite", dict(losses=[*noisy(0.01), None])),
        ("", dict(losses=noisy(0.01), events=[SKIP | dict(step=20)])),  # long ago
        ("save failed", dict(losses=noisy(0.01), events=[SKIP | dict(what="save failed")])),
        ("disk", dict(losses=noisy(0.01), max_steps=10**13)),  # 1e11 checkpoints of 4,000 bytes
        ("ternary", dict(losses=noisy(0.01), health=[HEALTHY | dict(zero=0.8)])),
        ("dead experts", dict(losses=noisy(0.01), routers=[dict(load_max=3.0, entropy=1.0, dead=2)] * 3)),
        ("", dict(losses=noisy(0.01), routers=[dict(dead=2), dict(dead=0), dict(dead=2)])),  # not for long
        ("ternary", dict(losses=noisy(0.01), health=[HEALTHY | dict(near_threshold=0.4)])),
        ("ternary", dict(losses=noisy(0.01), health=[HEALTHY | dict(flip_rate=i / 100) for i in range(60)])),
        ("ternary", dict(losses=noisy(0.01), row=LATE, health=[HEALTHY | dict(flip_rate=0.1)] * 60)),
        # while it warms up the learning rate is low and the flip rate rises, as it should
        (
            "",
            dict(
                losses=noisy(0),
                warmup_steps=300,
                row=LATE,
                health=[HEALTHY | dict(flip_rate=i / 100) for i in range(60)],
            ),
        ),
        ("", dict(losses=noisy(0.01), row=LATE, health=[HEALTHY | dict(flip_rate=1e-4)] * 60)),
    ),
)
def test_warnings(tmp_path, expected, how):
    """bug guarded: a fault that is not told, or a healthy run that is"""
    assert heads(status.status(write_run(tmp_path / "r", **how))) == [expected][: bool(expected)]


def test_a_loss_that_climbs_is_no_plateau(tmp_path):
    """bug guarded: a diverging run told to wait for the decay"""
    found = status.status(write_run(tmp_path / "r", losses=[2 + 0.1 * i for i in range(60)]))
    assert found["warnings"][0].startswith("rising: ") and "lower learning_rate" in found["warnings"][0]


def test_a_plateau_before_the_decay_is_to_wait_for(tmp_path):
    """bug guarded: a run stopped on advice before the decay that would have brought the loss down"""
    early = status.status(write_run(tmp_path / "early", losses=noisy(0)))
    late = status.status(write_run(tmp_path / "late", losses=noisy(0), row=LATE))
    constant = status.status(write_run(tmp_path / "constant", losses=noisy(0), schedule="constant"))
    assert "wait for it" in early["warnings"][0]
    assert all("stop here" in found["warnings"][0] for found in (late, constant))
    os.remove(f"{tmp_path}/late/config.json")
    assert heads(status.status(f"{tmp_path}/late")) == [], "where the rate is bound is not known"
    # a fall too small for 50 lines shows in more of them
    path = write_run(tmp_path / "slow", losses=noisy(0.0001, n=1000))
    assert heads(status.status(path)) == ["plateau"] and heads(status.status(path, window=1000)) == []


def test_trend_knows_its_noise():
    """bug guarded: noise taken for a trend, or a trend that hides itself by inflating its own noise"""
    rng = np.random.default_rng(1)
    told = [status.trend(rng.normal(0, 1, 50).tolist(), 50) for _ in range(400)]
    assert np.mean([found["word"] != "flat" for found in told]) == pytest.approx(0.046, abs=0.035)
    assert np.std([found["change"] for found in told]) == pytest.approx(
        np.mean([found["error"] for found in told]), rel=0.15
    )
    steep = status.trend([10 - 0.1 * i for i in range(50)], 50)
    assert steep["word"] == "falling" and steep["change"] == pytest.approx(-2.5)
    assert steep["error"] == pytest.approx(0.1 / 25**0.5)
    assert status.trend([1.0] * 50, 50)["word"] == "flat" and status.trend([1.0] * 5, 50) is None


def test_time_to_go_leaves_out_warming_up(tmp_path):
    """bugs guarded: an ETA from the slow first step of a process; one beyond max_minutes; speed called
    falling after a resume because of it"""
    slow = [5000.0] + [100.0] * 29
    found = status.status(write_run(tmp_path / "r", losses=noisy(0.01, n=30), row=dict(step_ms=slow)))
    assert found["eta_seconds"] == pytest.approx(70.0)
    first = write_run(tmp_path / "first", losses=[2.0], row=dict(step_ms=5000.0))
    assert status.status(first)["eta_seconds"] is None
    found = status.status(write_run(tmp_path / "m", losses=noisy(0.01, n=30), max_minutes=5.5))
    assert found["eta_seconds"] == pytest.approx(30, abs=2), "300 of 330 s are over"
    # a process that began 25 s ago has written three lines, the first of them slow
    resume = dict(event="resume", step=570, time=time.time() - 25)
    path = write_run(tmp_path / "w", losses=noisy(0.01, n=60), events=[resume])
    run_lines = status.read_run(path)
    assert [row["step"] for row in run_lines["rows"] if row not in status.steady(run_lines)] == [10, 580]


def test_anomalies_are_counted_once(tmp_path):
    """bug guarded: a step made again after a resume counted as two anomalies; an event of steps that were
    dropped taken for the step of the run"""
    save, resume = dict(event="save", step=900), dict(event="resume", step=500, time=time.time() - 1)
    path = write_run(tmp_path / "r", losses=noisy(0.01), events=[SKIP, save, resume, SKIP])
    with open(f"{path}/metrics/events.jsonl") as file:
        text = file.read().replace('"save", "step": 900', f'"save", "step": 900, "time": {time.time() - 60}')
    with open(f"{path}/metrics/events.jsonl", "w") as file:
        file.write(text)
    found = status.status(path)
    assert found["anomalies"]["count"] == 1 and found["step"] == 600


def caught(monkeypatch, argv):
    """the figure that a command makes, instead of its file"""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path: figures.append(self))
    monitor.main(argv)
    return figures[0]


def test_codes_shows_what_flipped(real, monkeypatch):
    """bugs guarded: a share of the corner given for that of the matrix; panels out of order; a checkpoint
    that is damaged shown"""
    name = "blocks.1.attn.q_proj"
    figure = caught(monkeypatch, [f"{real}/r", "--codes=x.png", "--matrix", name])
    top, bottom = figure.axes[: len(figure.axes) // 2], figure.axes[len(figure.axes) // 2 :]
    steps = sorted(checkpoint.steps(f"{real}/r"))
    assert [ax.get_title() for ax in top] == [f"step {step}" for step in steps] and len(steps) > 3
    before = None
    for step, codes_ax, flips_ax in zip(steps, top, bottom):
        part = checkpoint.load(checkpoint.step_dir(f"{real}/r", step))
        codes = quant.ternarize(part["model"][f"{name}.weight"])[0].numpy()
        assert (codes_ax.images[0].get_array() == codes[:64, :64]).all() and codes.shape == (72, 72)
        if before is not None:
            share, corner = (codes != before).mean(), (codes != before)[:64, :64]
            assert flips_ax.get_title().startswith(f"{share:.2%} flipped") and corner.any()
            assert (flips_ax.images[0].get_array() == corner).all()
        before = codes
    assert len(bottom[0].images) == 0


def test_codes_of_experts(data_dir, out_dir, monkeypatch):
    """bug guarded: a stack of matrices ends in a traceback"""
    train(data_dir, out_dir, "r", n_expert=2, max_steps=10, sample_every=0, eval_every=0)
    figure = caught(monkeypatch, [f"{out_dir}/r", "--codes=x.png", "--matrix=blocks.0.ffn.up_proj"])
    weight = checkpoint.load(checkpoint.step_dir(f"{out_dir}/r", 10))["model"]["blocks.0.ffn.up_proj.weight"]
    codes = torch.cat([quant.ternarize(expert)[0] for expert in weight]).numpy()
    shown = figure.axes[len(figure.axes) // 2 - 1].images[0].get_array()
    assert codes.shape == (96, 32) and (shown == codes[:64, :64]).all()


def test_codes_needs_two_checkpoints_of_a_ternary_run(real, tmp_path, capsys):
    """bug guarded: a traceback, or a picture of the codes of a float model"""

    def error(*args):
        with pytest.raises(SystemExit, match="2"):
            monitor.main([*args, f"--codes={tmp_path}/x.png"])
        out, err = capsys.readouterr()
        assert err.count("error: ") == 1 and not out and not os.path.exists(f"{tmp_path}/x.png")
        return err

    assert "float run" in error(f"{real}/f")
    assert "blocks.0.ffn.gate_proj" in error(f"{real}/r", "--matrix=blocks.0.gate_proj")
    assert "no whole checkpoint" in error(write_run(tmp_path / "none", losses=[1.0]))
    os.makedirs(tmp_path / "one" / "metrics")
    part = checkpoint.load(checkpoint.step_dir(f"{real}/r", 5))
    checkpoint.save(f"{tmp_path}/one", 5, part, {"format": 1})
    assert "only one" in error(f"{tmp_path}/one", "--matrix=blocks.0.attn.q_proj")
    # a flipped bit: torch.load would not notice
    checkpoint.save(f"{tmp_path}/one", 6, part, {"format": 1})
    with open(f"{tmp_path}/one/checkpoints/step_000006/checkpoint.pt", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    err = error(f"{tmp_path}/one")
    assert "only one" in err and "passed over" in err


def test_plot(real, monkeypatch, tmp_path):
    """bugs guarded: a float twin that breaks the picture or is left out of it; a boundary at another step;
    a picture that is not written"""
    figure = caught(monkeypatch, [f"{real}/r", f"{real}/f", "--plot=x.png"])
    loss, lr, codes, flips = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes][2:] == ["fraction of codes", "flip rate"]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["r: training, smoothed", "r: validation", "f: training, smoothed", "f: validation"]
    rows = lines(f"{real}/r", "metrics/scalars.jsonl")
    drawn = loss.lines[0]
    assert drawn.get_ydata().tolist() == [row["loss"] for row in rows if "loss" in row]
    assert drawn.get_xdata().tolist() == list(range(1, 25))
    assert [line.get_xdata() for line in lr.lines if line.get_linestyle() == ":"][0] == [12, 12]
    assert len(flips.lines) == 2 and len(codes.lines) == 4, "codes and a boundary of one run only"
    assert len(caught(monkeypatch, [f"{real}/f", "--plot=x.png"]).axes) == 2
    monkeypatch.undo()
    monitor.main([f"{real}/r", "--plot", f"{tmp_path}/out.png"])
    with open(tmp_path / "out.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_bad_commands_end_with_one_line(real, tmp_path):
    """bug guarded: a traceback for what the user can mend"""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    for args, says in (
        ([f"{tmp_path}/gone"], "gone is no run"),
        ([f"{tmp_path}/other"], "no config.json"),
        ([f"{tmp_path}/other/file"], "is no run"),
        ([f"--out_dir={tmp_path}/gone"], "out_dir ="),
        ([f"{real}/r", f"--plot={tmp_path}/gone/x.png"], "make it first"),
        ([f"{real}/r", f"--plot={tmp_path}/x.txt"], "must end in"),
        ([f"{real}/r", f"--plot={tmp_path}/dir.png"], "dir.png: Is a directory"),
        ([f"--plot={tmp_path}/x.png", f"--out_dir={real}"], "needs a run"),
        ([f"{real}/r", f"{real}/f", f"--codes={tmp_path}/x.png"], "needs one run"),
        ([f"{real}/r", "--every=0"], "every ="),
        ([f"{real}/r", "--window", "3"], "window ="),
        ([f"{real}/r", "--wach"], "did you mean watch"),
    ):
        out, err = run("monitor.py", *args, code=2)
        assert says in err and err.count("error: ") == 1 and not out, err
    gone = "import sys; sys.modules['matplotlib.figure'] = None"
    _, err = run("monitor.py", f"{real}/r", f"--plot={tmp_path}/x.png", code=2, patch=gone)
    assert "pip install matplotlib" in err and err.count("error: ") == 1


def test_no_torch_and_no_matplotlib_for_text(real):
    """bug guarded: seconds of start-up, or a library that is not there, for a few lines of text"""
    gone = "import sys; sys.modules |= dict(torch=None, matplotlib=None)"
    run("monitor.py", f"{real}/r", patch=gone)
    run("monitor.py", f"--out_dir={real}", "--json", patch=gone)


def test_watch_ends_quietly(real):
    """bugs guarded: a traceback at Ctrl-C; a screen that scrolls; escape codes in a file"""
    child = start("monitor.py", f"{real}/r", "--watch", "--every=0.1")
    text = "".join(child.stdout.readline() for _ in range(30))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and not err and "\x1b" not in text and text.count("state  ") >= 2
    child = start("monitor.py", f"{real}/r", f"{real}/f", "--watch", "--json", "--every=0.1")
    assert len([json.loads(child.stdout.readline())["runs"] for _ in range(3)]) == 3
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    master, slave = pty.openpty()
    command = [sys.executable, f"{ROOT}/monitor.py", f"{real}/r", "--watch", "--every=0.1"]
    child = subprocess.Popen(command, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    shown, deadline = b"", time.time() + 20
    while shown.count(b"\x1b[H") < 3 and time.time() < deadline:
        shown += os.read(master, 4096)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) == 130 and b"Traceback" not in shown and shown.count(b"\x1b[J") >= 2
