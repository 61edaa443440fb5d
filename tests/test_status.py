"""nanobit/monitor/: the state of a run by its files, and what is wrong with it."""

import json
import os
import subprocess
import time

import numpy as np
import pytest
from histories import noisy, write_run

import monitor
from nanobit.monitor import run_files, status, trends

DEAD = 2**22 + 1  # above the largest pid of Linux
LATE = dict(lr=1e-4)


def heads(status):
    """Return the first word of each warning."""
    return [text.split(":")[0] for text in status["warnings"]]


@pytest.fixture
def damaged(tmp_path):
    """Return a run whose files hold half lines, other types, NaN and infinity."""
    path = write_run(tmp_path / "r", losses=noisy(0.01), evals=[(0, 2.5)], health=[dict(zero=0.33)] * 3)
    with open(f"{path}/metrics/scalars.jsonl", "ab") as file:
        file.write(b'{"step": 601, "lo\n\xff\xfe\x00\n[1]\n{"loss": 1.0}\n{"step": null, "loss": 3}\n')
        file.write(b'{"step": 610, "loss": NaN, "lr": "x", "time": Infinity}\n{"step": 620, "lo')
    with open(f"{path}/metrics/bitnet.jsonl", "a") as file:
        file.write('{"step": 610, "total": 7}\n{"step": 620, "total": {"zero": NaN}}\n{"st')
    return path


def test_damaged_lines_are_left_out(damaged):
    """A half-written line is left out, a value of another type than its name wants is unknown."""
    found = status.status(damaged)
    assert found["step"] == 610
    assert found["loss"] is None
    assert found["lr"] is None
    assert found["bitnet"]["zero"] is None
    assert heads(found) == ["not finite"]


@pytest.mark.parametrize("flag", ["--json", "--plot=out.png", "--window=6"])
def test_every_view_of_a_damaged_run_is_shown(flag, damaged, tmp_path, monkeypatch, capsys):
    """No view ends in a traceback, or prints what JSON does not have."""
    monkeypatch.chdir(tmp_path)
    monitor.main([damaged, flag])
    out = capsys.readouterr().out
    assert out
    assert "NaN" not in out
    assert "Infinity" not in out


def test_missing_files_are_left_out(damaged):
    """Each file of a run may be missing or cut off, one after the other."""
    os.truncate(f"{damaged}/config.json", 100)
    assert status.status(damaged)["max_steps"] is None
    for name in ("config.json", "metrics/events.jsonl", "metrics/bitnet.jsonl", "samples/samples.jsonl"):
        os.remove(f"{damaged}/{name}")
        assert status.status(damaged)["step"] == 610
        monitor.main([damaged])


def test_an_empty_folder_is_a_run_to_come(tmp_path, capsys):
    """An empty folder is shown as empty, by itself and among others."""
    os.makedirs(tmp_path / "empty" / "e")
    assert status.status(f"{tmp_path}/empty/e")["state"] == "empty"
    monitor.main([f"--out_dir={tmp_path}/empty"])
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["e", "empty"]


FINISH = dict(event="finish", step=600, why="max_steps", result={})
RESUME = dict(event="resume", step=600)
INTERRUPT = dict(event="interrupt", step=603, signal=15)


def now():
    return dict(time=time.time())


@pytest.mark.parametrize(
    "state, how",
    [
        ("training", dict(age=30)),
        ("training", dict(age=55)),  # an evaluation may take a minute
        ("stopped writing", dict(age=100)),
        ("dead process", dict(age=5, pid=DEAD)),
        ("dead process", dict(age=5, pid=os.getpid())),  # a new container counts pids from 1 again
        ("finished", dict(age=500, pid=DEAD, events=[FINISH | now()])),
        ("interrupted", dict(age=500, pid=DEAD, events=[INTERRUPT | now()])),
        ("training", dict(age=5, events=[FINISH | now(), RESUME | now()])),  # lengthened
    ],
)
def test_state(state, how, tmp_path):
    """The state follows from the last event of a process, its life and its silence; two of them are warned
    about."""
    found = status.status(write_run(tmp_path / "r", losses=noisy(0.01), **how))
    assert found["state"] == state
    warned = [text for text in heads(found) if "dead" in text or "stopped" in text]
    assert warned == [text for text in ("dead process", "stopped writing") if text == state]


def test_an_interrupted_run_is_past_its_last_line(tmp_path):
    """The step of a run is that of its newest record, an event too."""
    how = dict(age=500, pid=DEAD, events=[INTERRUPT | now()])
    assert status.status(write_run(tmp_path / "r", losses=noisy(0.01), **how))["step"] == 603


def test_a_long_pause_is_usual_where_there_was_one(tmp_path):
    """A run that once paused for 300 s, as for an evaluation, may be silent for 400 s."""
    path = write_run(tmp_path / "r", losses=noisy(0.01), age=400)
    with open(f"{path}/metrics/scalars.jsonl") as file:
        rows = [json.loads(line) for line in file]
    for row in rows[:30]:
        row["time"] -= 300
    with open(f"{path}/metrics/scalars.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(f"{path}/metrics/events.jsonl", "w") as file:
        file.write(json.dumps(dict(event="start", step=0, time=rows[0]["time"] - 10)) + "\n")
    assert status.status(path)["state"] == "training"


def test_a_process_of_another_machine_may_live(tmp_path):
    """Nothing is known of the process of another host, so it is not called dead."""
    path = write_run(tmp_path / "r", losses=noisy(0.01), age=5, pid=DEAD)
    with open(f"{path}/config.json") as file:
        config = json.load(file)
    with open(f"{path}/config.json", "w") as file:
        json.dump(config | {"host": "elsewhere"}, file)
    found = status.status(path)
    assert found["state"] == "training"
    assert found["pid_alive"] is None


def test_a_zombie_is_dead():
    """A process that has ended, and for which nobody waited, is not alive."""
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
        ("", dict(losses=noisy(0), events=[dict(event="finish", step=600, why="max_steps", result={})])),
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
    """Each fault of a run is warned about, and a healthy run is not."""
    assert heads(status.status(write_run(tmp_path / "r", **how))) == [expected][: bool(expected)]


def test_a_loss_that_climbs_is_no_plateau(tmp_path):
    """A run whose loss climbs is advised to lower the learning rate, not to wait."""
    found = status.status(write_run(tmp_path / "r", losses=[2 + 0.1 * i for i in range(60)]))
    assert found["warnings"][0].startswith("rising: ")
    assert "lower learning_rate" in found["warnings"][0]


def test_a_plateau_before_the_decay_is_to_wait_for(tmp_path):
    """A plateau is to be waited for before the decay of the learning rate, and to stop at after it."""
    early = status.status(write_run(tmp_path / "early", losses=noisy(0)))
    late = status.status(write_run(tmp_path / "late", losses=noisy(0), row=LATE))
    constant = status.status(write_run(tmp_path / "constant", losses=noisy(0), schedule="constant"))
    assert "wait for it" in early["warnings"][0]
    assert all("stop here" in found["warnings"][0] for found in (late, constant))
    os.remove(f"{tmp_path}/late/config.json")
    assert heads(status.status(f"{tmp_path}/late")) == [], "where the rate is bound is not known"
    # a fall too small for 50 lines shows in more of them
    path = write_run(tmp_path / "slow", losses=noisy(0.0001, n=1000))
    assert heads(status.status(path)) == ["plateau"]
    assert heads(status.status(path, window=1000)) == []


def test_trend_knows_its_noise():
    """Noise is reported as a trend in about 5 % of cases, and a trend does not count as its own noise."""
    rng = np.random.default_rng(1)
    noise = [trends.trend(rng.normal(0, 1, 50).tolist(), 50) for _ in range(400)]
    assert np.mean([found["word"] != "flat" for found in noise]) == pytest.approx(0.046, abs=0.035)
    assert np.std([found["change"] for found in noise]) == pytest.approx(
        np.mean([found["error"] for found in noise]), rel=0.15
    )
    steep = trends.trend([10 - 0.1 * i for i in range(50)], 50)
    assert steep["word"] == "falling"
    assert steep["change"] == pytest.approx(-2.5)
    assert steep["error"] == pytest.approx(0.1 / 25**0.5)
    assert trends.trend([1.0] * 50, 50)["word"] == "flat"
    assert trends.trend([1.0] * 5, 50) is None


def test_time_to_go_leaves_out_warming_up(tmp_path):
    """The time to go leaves out the slow first step of a process, and ends at max_minutes."""
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
    run_lines = run_files.read_run(path)
    assert [row["step"] for row in run_lines["rows"] if row not in trends.steady(run_lines)] == [10, 580]


def test_anomalies_are_counted_once(tmp_path):
    """An anomaly of a step that was repeated counts once, and events of dropped steps do not move the run."""
    save, resume = dict(event="save", step=900), dict(event="resume", step=500, time=time.time() - 1)
    path = write_run(tmp_path / "r", losses=noisy(0.01), events=[SKIP, save, resume, SKIP])
    with open(f"{path}/metrics/events.jsonl") as file:
        text = file.read().replace('"save", "step": 900', f'"save", "step": 900, "time": {time.time() - 60}')
    with open(f"{path}/metrics/events.jsonl", "w") as file:
        file.write(text)
    found = status.status(path)
    assert found["anomalies"]["count"] == 1
    assert found["step"] == 600


def test_a_loss_that_has_jumped_is_not_falling():
    """A loss that jumped is rising, though the newer half of its lines is lower."""
    losses = noisy(0.05, n=50, start=6.5) + noisy(0, n=6, start=5.0)
    found = trends.trend(losses, 50)
    assert found["change"] < 0
    assert found["word"] == "rising"
    assert found["jump"] == pytest.approx(0.9, abs=0.2)
    assert trends.moves(found).startswith("rising: the last 5 lines average 0.")
    assert trends.trend(losses[:50], 50)["jump"] == 0


def test_noise_is_no_jump():
    """Noise is not a jump."""
    rng = np.random.default_rng(2)
    jumps = [trends.trend(rng.normal(2, 0.1, 50).tolist(), 50)["jump"] for _ in range(300)]
    assert sum(map(bool, jumps)) <= 2
    assert trends.trend([1.0] * 25 + [1.001] * 25, 50)["jump"] == 0, "without noise, less than 1 %"


def test_the_beginning_of_a_short_run_is_left_out(tmp_path):
    """The trend of a short run leaves out its beginning."""
    losses = [2.8, 2.4, 2.0, 1.7, 1.5, 1.4, 1.3, 1.25, 1.2, 1.15] + noisy(0, n=30, start=1.08)
    found = status.status(write_run(tmp_path / "r", losses=losses))["loss_trend"]
    assert found["word"] == "flat"
    assert found["lines"] == 10


@pytest.mark.parametrize(
    "what, says",
    [
        ("9 steps in a row were not finite; start again with a lower learning_rate", "not finite"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GB", "with --total_batch_size=512, and"),
        ("KeyError: 'x'", "once its cause is gone, repeat the command with --resume=auto"),
    ],
)
def test_a_run_that_ended_itself_gets_the_advice_of_its_error(tmp_path, what, says):
    """The advice after a failed run is that of its error: not to resume what would end the same way."""
    failed = dict(event="failed", step=600, what=what, time=time.time())
    how = dict(events=[failed], pid=DEAD, total_batch_size=512)
    found = status.status(write_run(tmp_path / "r", losses=noisy(0.01), **how))
    assert (found["state"], found["why"], heads(found)) == ("failed", what, ["failed"])
    assert says in found["warnings"][0]
    assert "row" not in what or "--resume" not in found["warnings"][0]
    assert "no step is saved" in found["warnings"][0] or "row" in what


def test_config_values_of_other_types_are_left_out(tmp_path):
    """A value of another type in config.json is unknown, and a damaged config.json is as none."""
    path = write_run(
        tmp_path / "r", losses=noisy(0.01), max_steps="x", min_lr_ratio=[1], save_every=None, n_expert={}
    )
    found = status.status(path)
    assert found["max_steps"] is None
    assert found["n_expert"] is None
    assert found["step"] == 600
    for facts in (dict(params=3, pid=-1, host=[], device={}), dict(settings=3)):
        with open(f"{path}/config.json", "w", encoding="utf-8") as file:
            json.dump(dict(settings={}) | facts, file)
        assert status.status(path)["device"] is None
    with open(f"{path}/config.json", "w", encoding="utf-8") as file:
        file.write("[" * 100000)
    assert status.status(path)["max_steps"] is None
