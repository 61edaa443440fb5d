"""nanobit/monitor/plots.py: the pictures of losses and of codes show what the files of a run hold."""

import os

import numpy as np
import pytest
import torch
from conftest import lines, train
from histories import noisy, write_run

import monitor
import quant
from nanobit import checkpoint, saving
from nanobit.monitor import plots
from nanobit.run_dir import step_dir, steps

NAME = "blocks.1.attn.q_proj"


def caught(monkeypatch, argv):
    """Return the figure that a command makes, in place of its file."""
    figures = []
    monkeypatch.setattr(plots, "write", lambda figure, path: figures.append(figure))
    monitor.main(argv)
    return figures[0]


def test_plot(twins, monkeypatch, tmp_path):
    """A picture holds each run with its float twin, the boundary of its stages, and the losses of its
    files."""
    figure = caught(monkeypatch, [f"{twins}/r", f"{twins}/f", "--plot=x.png"])
    loss, lr, codes, flips = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes][1:] == [
        "learning rate (1e-3)",
        "fraction of codes",
        "share of codes changed\nsince the last line",
    ]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["r: training, smoothed", "r: validation", "f: training, smoothed", "f: validation"]
    rows = lines(f"{twins}/r", "metrics/scalars.jsonl")
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
    assert len(caught(monkeypatch, [f"{twins}/f", "--plot=x.png"]).axes) == 2
    monkeypatch.undo()
    monitor.main([f"{twins}/r", "--plot", f"{tmp_path}/out.png"])
    with open(tmp_path / "out.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


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


@pytest.fixture(scope="module")
def codes_figure(twins):
    """Return (the steps, the axes of codes, of flips, of histograms) of --codes on the ternary run."""
    with pytest.MonkeyPatch.context() as patch:
        figure = caught(patch, [f"{twins}/r", "--codes=x.png", "--matrix", NAME])
    shown = sorted(steps(f"{twins}/r"))
    n = len(shown)
    return shown, figure.axes[:n], figure.axes[n : 2 * n], figure.axes[2 * n :]


def latent(twins, step):
    """Return the latent weights of the matrix of --codes."""
    return checkpoint.load(step_dir(f"{twins}/r", step))["model"][f"{NAME}.weight"]


def codes_of(twins, step):
    return quant.ternarize(latent(twins, step))[0].numpy()


def test_codes_shows_each_checkpoint_in_its_order(twins, codes_figure):
    """The upper panels show the corner of the matrix at each whole checkpoint, oldest first."""
    steps, top, _, _ = codes_figure
    assert len(steps) > 3
    assert [ax.get_title() for ax in top] == [f"step {step}" for step in steps]
    for step, ax in zip(steps, top):
        codes = codes_of(twins, step)
        assert codes.shape == (72, 72)
        assert (ax.images[0].get_array() == codes[:64, :64]).all()


def test_codes_shows_what_flipped(twins, codes_figure):
    """The lower panels show the codes that flipped, with the share of the whole matrix, not of its corner."""
    steps, _, bottom, _ = codes_figure
    assert len(bottom[0].images) == 0
    for before, step, ax in zip(steps, steps[1:], bottom[1:]):
        flipped = codes_of(twins, before) != codes_of(twins, step)
        assert flipped[:64, :64].any()
        assert ax.get_title() == f"{flipped.mean():.2%} flipped\nsince {before}"
        assert (ax.images[0].get_array() == flipped[:64, :64]).all()


def test_codes_shows_the_latent_weights_about_their_thresholds(twins, codes_figure):
    """Histograms of the first and the last checkpoint hold each weight once, in the bins of its code."""
    steps, _, _, histograms = codes_figure
    assert len(histograms) == 2
    for step, ax in zip((steps[0], steps[-1]), histograms):
        ratio = (latent(twins, step) / latent(twins, step).abs().mean()).numpy()
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


def test_more_checkpoints_than_panels(tmp_path, twins, monkeypatch, capsys):
    """If checkpoints do not fit the panels the number left out is printed; of the pair at a stage boundary
    one is shown."""
    part = checkpoint.load(step_dir(f"{twins}/r", 5))
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


def test_codes_needs_two_checkpoints_of_a_ternary_run(twins, tmp_path, capsys):
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

    assert "float run" in error(f"{twins}/f")
    assert "blocks.0.ffn.gate_proj" in error(f"{twins}/r", "--matrix=blocks.0.gate_proj")
    assert "no whole checkpoint" in error(write_run(tmp_path / "none", losses=[1.0]))
    os.makedirs(tmp_path / "one" / "metrics")
    part = checkpoint.load(step_dir(f"{twins}/r", 5))
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
