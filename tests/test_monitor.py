"""monitor.py: its screen, table and commands, and that it only reads."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, lines, run, start
from histories import noisy, write_run

import monitor
from nanobit.monitor import status


def test_status_agrees_with_the_files_and_leaves_them(twins):
    """The status of a run is what its files hold, and the monitor writes nothing."""

    def state():
        return {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(twins)}

    before = state()
    out, _ = run("monitor.py", f"{twins}/r", "--json")
    now = json.loads(out)
    assert state() == before
    assert out.count("\n") == 1
    rows = [row for row in lines(f"{twins}/r", "metrics/scalars.jsonl") if "loss" in row]
    for key in status.LOGGED:
        assert now[key] == rows[-1][key], key
    with open(f"{twins}/r/best.json") as file:
        assert now["best"] == json.load(file)
    assert (now["state"], now["why"], now["step"], now["max_steps"]) == ("finished", "max_steps", 24, 24)
    assert now["progress"] == 1
    assert now["eta_seconds"] == 0
    assert now["checkpoint"]["step"] == 24
    assert now["bitnet"]["zero"] + now["bitnet"]["plus"] + now["bitnet"]["minus"] == pytest.approx(
        1, abs=1e-4
    )
    greedy = [row for row in lines(f"{twins}/r", "samples/samples.jsonl") if row["mode"] == "greedy"]
    assert now["sample"]["generated_text"] == greedy[-1]["generated_text"]
    assert now["repetition"] == greedy[-1]["repetition"]
    assert now["val_step"] == 24
    assert now["device"]
    assert now["disk_need_gb"] == 0
    assert now["pid_alive"] is False
    # several runs, and the runs of a folder, are a list; a float run has no codes
    out, _ = run("monitor.py", f"{twins}/r", f"{twins}/f/", "--json")
    assert [(each["run_id"], each["bitnet"] is None) for each in json.loads(out)["runs"]] == [
        ("r", False),
        ("f", True),
    ]
    out, _ = run("monitor.py", "--out_dir", twins)
    assert [line.split()[0] for line in out.splitlines()] == ["run_id", "f", "r"]
    assert "24/24 100%" in out


@pytest.mark.parametrize("width", (60, 80))
def test_screen_fits(tmp_path, width):
    """Lines are at most as wide as the terminal, and hold no escape codes."""
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
    assert max(map(len, text)) <= width
    assert "\x1b" not in "".join(text)
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


def test_a_screen_shows_only_what_is_known(tmp_path):
    """A value that is not known is left out of the screen, with the words about it."""
    os.makedirs(tmp_path / "empty")
    for path in (
        write_run(tmp_path / "none", pid=2**22 + 1),
        write_run(tmp_path / "first", losses=[1.0], health=[dict(zero=0.33)], max_steps="x"),
        f"{tmp_path}/empty",
    ):
        text = "\n".join(monitor.screen(status.status(path), 80))
        assert "- " not in text.replace("-1 ", ""), text
        assert "for -" not in text, text
        assert "None" not in text, text
    assert "epoch 1.50" in "\n".join(
        monitor.screen(status.status(write_run(tmp_path / "e", losses=[1.0], row=dict(epoch=1.5))), 80)
    )


def test_a_narrow_table_keeps_names(tmp_path):
    """A narrow table keeps the names of runs whole, and its rows do not wrap."""
    path = write_run(tmp_path / "train_tinystories_300m_twin", losses=[1.0], max_steps=10**6)
    for width in (60, 80):
        rows = monitor.table([status.status(path)] * 2, width)
        assert all(len(row) <= width for row in rows)
        assert rows[1].startswith("train_tinystories_300m_twin ")


def test_text_from_files_is_safe_to_print(tmp_path, capsys):
    """Control characters of names, settings and events are printed as escapes."""
    bad = "\x1b]52;c;eA==\x07\x1b[2J\n"
    events = [dict(event="anomaly", step=1, what=bad), dict(event="finish", step=1, why=bad, result={})]
    path = write_run(tmp_path / f"r{bad}", losses=[1.0], events=events, run_id=bad, device=bad)
    for args in ([path], [f"--out_dir={tmp_path}"], [path, f"--plot={tmp_path}/x.png"]):
        monitor.main(args)
        out, err = capsys.readouterr()
        assert r"\x1b" in out
        assert all(c.isprintable() or c == "\n" for c in out + err.replace(path, ""))


def test_a_run_is_found_by_its_name(twins, monkeypatch, capsys):
    """A run is found by its name in out_dir, and a copy has the name of its folder."""
    monitor.main(["r", f"--out_dir={twins}"])
    assert capsys.readouterr().out.startswith("r\n")
    shutil.copytree(f"{twins}/r", f"{twins}/../copy")
    assert status.status(f"{twins}/../copy")["run_id"] == "copy"


def test_watch_ends_quietly(twins):
    """Ctrl-C ends --watch without a traceback; a terminal is redrawn in place, a file gets no escape
    codes."""
    child = start("monitor.py", f"{twins}/r", "--watch", "--every=0.1")
    text = "".join(child.stdout.readline() for _ in range(30))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT  # for a shell 130
    assert not err
    assert "\x1b" not in text
    assert text.count("state  ") >= 2
    child = start("monitor.py", f"{twins}/r", f"{twins}/f", "--watch", "--json", "--every=0.1")
    assert len([json.loads(child.stdout.readline())["runs"] for _ in range(3)]) == 3
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    master, slave = pty.openpty()
    command = [sys.executable, f"{ROOT}/monitor.py", f"{twins}/r", "--watch", "--every=0.1"]
    child = subprocess.Popen(command, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    shown, deadline = b"", time.time() + 20
    while shown.count(b"\x1b[H") < 3 and time.time() < deadline:
        shown += os.read(master, 4096)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) == -signal.SIGINT
    assert b"Traceback" not in shown
    assert shown.count(b"\x1b[J") >= 2


def test_bad_commands_end_with_one_line(twins, tmp_path):
    """What the user can mend is one line that names the remedy."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    for args, says in (
        ([f"{tmp_path}/gone"], "gone is not a run"),
        ([f"{tmp_path}/other"], "no config.json"),
        ([f"{tmp_path}/other/file"], "is not a run"),
        ([f"--out_dir={tmp_path}/gone"], "out_dir ="),
        ([f"{twins}/r", f"--plot={tmp_path}/gone/x.png"], "make it first"),
        ([f"{twins}/r", f"--plot={tmp_path}/x.txt"], "must end in"),
        ([f"{twins}/r", f"--plot={tmp_path}/dir.png"], "dir.png: Is a directory"),
        ([f"--plot={tmp_path}/x.png", f"--out_dir={twins}"], "needs a run"),
        ([f"{twins}/r", f"{twins}/f", f"--codes={tmp_path}/x.png"], "needs one run"),
        ([f"{twins}/r", "--watch", "--every=0"], "every ="),
        ([f"{twins}/r", "--window", "3"], "window ="),
        ([f"{twins}/r", "--wach"], "did you mean watch"),
    ):
        out, err = run("monitor.py", *args, code=2)
        assert says in err, err
        assert err.count("error: ") == 1, err
        assert not out, err
    gone = "import sys; sys.modules['matplotlib.figure'] = None"
    _, err = run("monitor.py", f"{twins}/r", f"--plot={tmp_path}/x.png", code=2, patch=gone)
    assert "pip install matplotlib" in err
    assert err.count("error: ") == 1


def test_no_torch_and_no_matplotlib_for_text(twins):
    """Text needs neither torch nor matplotlib."""
    gone = "import sys; sys.modules |= dict(torch=None, matplotlib=None)"
    run("monitor.py", f"{twins}/r", patch=gone)
    run("monitor.py", f"--out_dir={twins}", "--json", patch=gone)
