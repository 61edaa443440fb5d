"""monitor.py: the screen, pictures and commands, and that it only reads."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, lines, run, start, train, write_data
from histories import noisy, write_run

import monitor
import quant
from nanobit import checkpoint, saving
from nanobit.monitor import plots, status
from nanobit.run_dir import step_dir, steps


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return a folder with a ternary run `r`, 72 wide so that a matrix is larger than the picture's corner,
    and its float twin `f`."""
    folder = tmp_path_factory.mktemp("real")
    data_dir = write_data(folder / "data")
    train(data_dir, f"{folder}/runs", "r", n_layer=2, n_embd=72, learning_rate=0.02)
    write_run(folder / "runs" / "f", losses=noisy(0.01, n=24), evals=[(0, 2.5)], run_id="f", ternary=False)
    part = checkpoint.load(step_dir(f"{folder}/runs/r", 5))
    part["config"]["ternary"] = False
    saving.save(f"{folder}/runs/f", 5, part, {"format": 1})
    return f"{folder}/runs"


def test_status_agrees_with_the_files_and_leaves_them(real):
    """The status of a run is what its files hold, and the monitor writes nothing."""

    def state():
        return {path: os.stat(path).st_mtime_ns for path, _, _ in os.walk(real)}

    before = state()
    out, _ = run("monitor.py", f"{real}/r", "--json")
    now = json.loads(out)
    assert state() == before
    assert out.count("\n") == 1
    rows = [row for row in lines(f"{real}/r", "metrics/scalars.jsonl") if "loss" in row]
    for key in status.LOGGED:
        assert now[key] == rows[-1][key], key
    with open(f"{real}/r/best.json") as file:
        assert now["best"] == json.load(file)
    assert (now["state"], now["why"], now["step"], now["max_steps"]) == ("finished", "max_steps", 24, 24)
    assert now["progress"] == 1
    assert now["eta_seconds"] == 0
    assert now["checkpoint"]["step"] == 24
    assert now["bitnet"]["zero"] + now["bitnet"]["plus"] + now["bitnet"]["minus"] == pytest.approx(
        1, abs=1e-4
    )
    greedy = [row for row in lines(f"{real}/r", "samples/samples.jsonl") if row["mode"] == "greedy"]
    assert now["sample"]["generated_text"] == greedy[-1]["generated_text"]
    assert now["repetition"] == greedy[-1]["repetition"]
    assert now["val_step"] == 24
    assert now["device"]
    assert now["disk_need_gb"] == 0
    assert now["pid_alive"] is False
    # several runs, and the runs of a folder, are a list; a float run has no codes
    out, _ = run("monitor.py", f"{real}/r", f"{real}/f/", "--json")
    assert [(each["run_id"], each["bitnet"] is None) for each in json.loads(out)["runs"]] == [
        ("r", False),
        ("f", True),
    ]
    out, _ = run("monitor.py", "--out_dir", real)
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


def caught(monkeypatch, argv):
    """Return the figure that a command makes, in place of its file."""
    figures = []
    monkeypatch.setattr(plots, "write", lambda figure, path: figures.append(figure))
    monitor.main(argv)
    return figures[0]


NAME = "blocks.1.attn.q_proj"


@pytest.fixture(scope="module")
def codes_figure(real):
    """Return (the steps, the axes of codes, of flips, of histograms) of --codes on the ternary run."""
    with pytest.MonkeyPatch.context() as patch:
        figure = caught(patch, [f"{real}/r", "--codes=x.png", "--matrix", NAME])
    shown = sorted(steps(f"{real}/r"))
    n = len(shown)
    return shown, figure.axes[:n], figure.axes[n : 2 * n], figure.axes[2 * n :]


def latent(real, step):
    """Return the latent weights of the matrix of --codes."""
    return checkpoint.load(step_dir(f"{real}/r", step))["model"][f"{NAME}.weight"]


def codes_of(real, step):
    return quant.ternarize(latent(real, step))[0].numpy()


def test_codes_shows_each_checkpoint_in_its_order(real, codes_figure):
    """The upper panels show the corner of the matrix at each whole checkpoint, oldest first."""
    steps, top, _, _ = codes_figure
    assert len(steps) > 3
    assert [ax.get_title() for ax in top] == [f"step {step}" for step in steps]
    for step, ax in zip(steps, top):
        codes = codes_of(real, step)
        assert codes.shape == (72, 72)
        assert (ax.images[0].get_array() == codes[:64, :64]).all()


def test_codes_shows_what_flipped(real, codes_figure):
    """The lower panels show the codes that flipped, with the share of the whole matrix, not of its corner."""
    steps, _, bottom, _ = codes_figure
    assert len(bottom[0].images) == 0
    for before, step, ax in zip(steps, steps[1:], bottom[1:]):
        flipped = codes_of(real, before) != codes_of(real, step)
        assert flipped[:64, :64].any()
        assert ax.get_title() == f"{flipped.mean():.2%} flipped\nsince {before}"
        assert (ax.images[0].get_array() == flipped[:64, :64]).all()


def test_codes_shows_the_latent_weights_about_their_thresholds(real, codes_figure):
    """Histograms of the first and the last checkpoint hold each weight once, in the bins of its code."""
    steps, _, _, histograms = codes_figure
    assert len(histograms) == 2
    for step, ax in zip((steps[0], steps[-1]), histograms):
        ratio = (latent(real, step) / latent(real, step).abs().mean()).numpy()
        shares = [(ratio < -0.5).mean(), (abs(ratio) <= 0.5).mean(), (ratio > 0.5).mean()]
        minus, zero, plus = (f"{share:.1%}" for share in shares)
        assert ax.get_title() == f"step {step}: {minus} are -1, {zero} are 0, {plus} are +1"
        assert [line.get_xdata()[0] for line in ax.lines] == [-0.5, 0.5]
        bars = [[bar.get_height() for bar in group] for group in ax.containers]
        assert [sum(heights) for heights in bars] == pytest.approx(shares)
        counted, _ = np.histogram(ratio.clip(-4, 4), 160, (-4, 4))
        assert [sum(heights) for heights in zip(*bars)] == pytest.approx(counted / ratio.size, abs=2e-4)


def test_codes_of_experts(data_dir, out_dir, monkeypatch):
    """The experts of a mixture are shown one below the other, each with its own scale."""
    train(data_dir, out_dir, "r", n_expert=2, max_steps=10, sample_every=0, eval_every=0)
    figure = caught(monkeypatch, [f"{out_dir}/r", "--codes=x.png", "--matrix=blocks.0.ffn.up_proj"])
    weight = checkpoint.load(step_dir(f"{out_dir}/r", 10))["model"]["blocks.0.ffn.up_proj.weight"]
    codes = torch.cat([quant.ternarize(expert)[0] for expert in weight]).numpy()
    shown = figure.axes[len(figure.axes) // 2 - 2].images[0].get_array()
    assert codes.shape == (96, 32)
    assert (shown == codes[:64, :64]).all()
    assert f"{(codes == 0).mean():.1%} are 0" in figure.axes[-1].get_title()


def test_codes_needs_two_checkpoints_of_a_ternary_run(real, tmp_path, capsys):
    """--codes exits with 2 if the run is float, the matrix unknown, or fewer than two checkpoints are
    whole."""

    def error(*args):
        with pytest.raises(SystemExit, match="2"):
            monitor.main([*args, f"--codes={tmp_path}/x.png"])
        out, err = capsys.readouterr()
        assert err.count("error: ") == 1
        assert not out
        assert not os.path.exists(f"{tmp_path}/x.png")
        return err

    assert "float run" in error(f"{real}/f")
    assert "blocks.0.ffn.gate_proj" in error(f"{real}/r", "--matrix=blocks.0.gate_proj")
    assert "no whole checkpoint" in error(write_run(tmp_path / "none", losses=[1.0]))
    os.makedirs(tmp_path / "one" / "metrics")
    part = checkpoint.load(step_dir(f"{real}/r", 5))
    saving.save(f"{tmp_path}/one", 5, part, {"format": 1})
    assert "only one" in error(f"{tmp_path}/one", "--matrix=blocks.0.attn.q_proj")
    # a flipped bit: torch.load would not notice
    saving.save(f"{tmp_path}/one", 6, part, {"format": 1})
    with open(f"{tmp_path}/one/checkpoints/step_000006/checkpoint.pt", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    err = error(f"{tmp_path}/one")
    assert "only one" in err
    assert "skipped" in err


def test_plot(real, monkeypatch, tmp_path):
    """A picture holds each run with its float twin, the boundary of its stages, and the losses of its
    files."""
    figure = caught(monkeypatch, [f"{real}/r", f"{real}/f", "--plot=x.png"])
    loss, lr, codes, flips = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes][1:] == [
        "learning rate (1e-3)",
        "fraction of codes",
        "share of codes changed\nsince the last line",
    ]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["r: training, smoothed", "r: validation", "f: training, smoothed", "f: validation"]
    rows = lines(f"{real}/r", "metrics/scalars.jsonl")
    drawn = loss.lines[0]
    assert drawn.get_ydata().tolist() == [row["loss"] for row in rows if "loss" in row]
    assert drawn.get_xdata().tolist() == list(range(1, 25))
    assert [line.get_xdata() for line in lr.lines if line.get_linestyle() == ":"][0] == [12, 12]
    rates = [1e3 * row["lr"] for row in rows if "loss" in row]
    assert lr.lines[0].get_ydata().tolist() == pytest.approx(rates)
    assert figure.get_suptitle() == "r, f"
    assert 0 not in loss.lines[2].get_xdata(), "the evaluation of step 0 is above the frame"
    assert len(flips.lines) == 2, "codes and a boundary of one run only"
    assert len(codes.lines) == 4, "codes and a boundary of one run only"
    assert len(caught(monkeypatch, [f"{real}/f", "--plot=x.png"]).axes) == 2
    monkeypatch.undo()
    monitor.main([f"{real}/r", "--plot", f"{tmp_path}/out.png"])
    with open(tmp_path / "out.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_bad_commands_end_with_one_line(real, tmp_path):
    """What the user can mend is one line that names the remedy."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    for args, says in (
        ([f"{tmp_path}/gone"], "gone is not a run"),
        ([f"{tmp_path}/other"], "no config.json"),
        ([f"{tmp_path}/other/file"], "is not a run"),
        ([f"--out_dir={tmp_path}/gone"], "out_dir ="),
        ([f"{real}/r", f"--plot={tmp_path}/gone/x.png"], "make it first"),
        ([f"{real}/r", f"--plot={tmp_path}/x.txt"], "must end in"),
        ([f"{real}/r", f"--plot={tmp_path}/dir.png"], "dir.png: Is a directory"),
        ([f"--plot={tmp_path}/x.png", f"--out_dir={real}"], "needs a run"),
        ([f"{real}/r", f"{real}/f", f"--codes={tmp_path}/x.png"], "needs one run"),
        ([f"{real}/r", "--watch", "--every=0"], "every ="),
        ([f"{real}/r", "--window", "3"], "window ="),
        ([f"{real}/r", "--wach"], "did you mean watch"),
    ):
        out, err = run("monitor.py", *args, code=2)
        assert says in err, err
        assert err.count("error: ") == 1, err
        assert not out, err
    gone = "import sys; sys.modules['matplotlib.figure'] = None"
    _, err = run("monitor.py", f"{real}/r", f"--plot={tmp_path}/x.png", code=2, patch=gone)
    assert "pip install matplotlib" in err
    assert err.count("error: ") == 1


def test_no_torch_and_no_matplotlib_for_text(real):
    """Text needs neither torch nor matplotlib."""
    gone = "import sys; sys.modules |= dict(torch=None, matplotlib=None)"
    run("monitor.py", f"{real}/r", patch=gone)
    run("monitor.py", f"--out_dir={real}", "--json", patch=gone)


def test_watch_ends_quietly(real):
    """Ctrl-C ends --watch without a traceback; a terminal is redrawn in place, a file gets no escape
    codes."""
    child = start("monitor.py", f"{real}/r", "--watch", "--every=0.1")
    text = "".join(child.stdout.readline() for _ in range(30))
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT  # for a shell 130
    assert not err
    assert "\x1b" not in text
    assert text.count("state  ") >= 2
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
    assert child.wait(timeout=20) == -signal.SIGINT
    assert b"Traceback" not in shown
    assert shown.count(b"\x1b[J") >= 2


def test_one_line_is_seen_in_a_picture(tmp_path, monkeypatch):
    """A run of one line is drawn with markers, of another shape for each code."""
    health = dict(zero=0.33, plus=0.33, minus=0.34, flip_rate=0.1)
    path = write_run(tmp_path / "one", losses=[2.0], evals=[(10, 2.1)], health=[health])
    figure = caught(monkeypatch, [path, "--plot=x.png"])
    shown = [line.get_marker() for ax in figure.axes for line in ax.lines]
    assert "None" not in shown
    assert len(set(shown[-4:-1])) == 3, "the three codes differ"


def test_names_of_runs_in_pictures(tmp_path, monkeypatch, recwarn):
    """Names are drawn as text: letters that the font lacks as escapes, no formulas, and none left out of the
    legend."""
    names = ["\u65e5\u672c", "$\\frac$", "_y", "a\x1b[2J"]
    runs = [write_run(tmp_path / name, losses=noisy(0.01), evals=[(10, 2.1)]) for name in names]
    figure = caught(monkeypatch, [*runs, "--plot=x.png"])
    figure.savefig(tmp_path / "out.png")
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(shown) == 2 * len(names)
    assert shown[0].startswith("\\u65e5\\u672c: ")
    drawing = [warning for warning in recwarn if warning.category is not ResourceWarning]  # of other tests
    assert drawing == []
    assert "\x1b" not in figure.get_suptitle()


def test_a_picture_is_whole_or_missing(tmp_path, monkeypatch):
    """A full disk leaves the former picture."""
    path = write_run(tmp_path / "r", losses=noisy(0.01))
    (tmp_path / "x.png").write_bytes(b"former")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        monitor.main([path, f"--plot={tmp_path}/x.png"])
    assert (tmp_path / "x.png").read_bytes() == b"former"
    assert len(os.listdir(tmp_path)) == 2


def test_more_checkpoints_than_panels(tmp_path, real, monkeypatch, capsys):
    """If checkpoints do not fit the panels the number left out is printed; of the pair at a stage boundary
    one is shown."""
    part = checkpoint.load(step_dir(f"{real}/r", 5))
    os.makedirs(tmp_path / "r" / "metrics")
    for step in (500, 1000, 1500, 1999, 2000, 2500, 3000, 3500, 4000):
        saving.save(f"{tmp_path}/r", step, part | {"step": step}, {"format": 1})
    figure = caught(monkeypatch, [f"{tmp_path}/r", "--codes=x.png"])
    steps = [int(ax.get_title()[5:].replace(",", "")) for ax in figure.axes[:8]]
    assert steps == list(range(500, 4001, 500))
    out, err = capsys.readouterr()
    assert "wrote x.png, with 8 of 9 checkpoints" in err
    assert "8 of 9" in figure.get_suptitle()
    assert out.count("\n") == 2, "a heading and a line, not the whole screen"


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


def test_a_run_is_found_by_its_name(real, monkeypatch, capsys):
    """A run is found by its name in out_dir, and a copy has the name of its folder."""
    monitor.main(["r", f"--out_dir={real}"])
    assert capsys.readouterr().out.startswith("r\n")
    shutil.copytree(f"{real}/r", f"{real}/../copy")
    assert status.status(f"{real}/../copy")["run_id"] == "copy"
