"""Pictures of runs, by matplotlib: their curves, and a ternary matrix that settles."""

import difflib
import io
import os
import re
import statistics
import sys

from nanobit import cli, files
from nanobit.cli import fail
from nanobit.monitor.run_files import column, number, read_run
from nanobit.terminal import printable

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
CODE_COLORS = {-1: "#0072B2", 0: "#F0F0F0", 1: "#D55E00"}
CORNER = 64  # rows and columns of a matrix that a picture shows
PANELS = 8
BINS = [i / 20 for i in range(-80, 81)]  # of W / mean|W|; both thresholds are borders of bins


def smooth(values):
    """Return the running mean over a fiftieth of the values, at least 5, fewer at both ends."""
    reach = [min(max(2, len(values) // 100), i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.mean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def write(figure, path):
    """Write a figure as a whole file: a full disk leaves no part of one."""
    content = io.BytesIO()
    figure.savefig(content, format=path.rpartition(".")[2])
    files.write_bytes(path, content.getvalue())


def label_of(name):
    """Return the name of a run as matplotlib shows it: letters that its font lacks as \\uXXXX, and signs
    that it would read as a formula, or as a label to leave out, as they are."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    text = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in printable(name))
    return re.sub("^_", " _", text).replace("$", r"\$")


def draw(ax, rows, key, line="-", **style):
    """Draw the numbers under a key over their steps; a single one as a sign, since it makes no line."""
    rows = [row for row in rows if number(row.get(key)) is not None]
    if len(rows) == 1:
        line = {"--": "^", ":": "v"}.get(line, "o")
    ax.plot([row["step"] for row in rows], column(rows, key), line, **style)


def draw_run(axes, name, run, start, color, val_color, width):
    """Draw the curves of a run. start: the step from which evaluations lie within the frame."""
    losses = [row for row in run["rows"] if number(row["loss"]) is not None]
    means = [row | {"loss": mean} for row, mean in zip(losses, smooth(column(losses, "loss")))]
    draw(axes[0], losses, "loss", color=color, alpha=0.35, linewidth=0.8)
    draw(axes[0], means, "loss", color=color, label=f"{name}: training, smoothed")
    if run["evals"]:
        # the first one, of a model that has learned nothing, lies above the frame
        evals = [row for row in run["evals"] if row["step"] > start] or run["evals"]
        style = dict(color=val_color, markersize=6, linewidth=1, markeredgecolor="white")
        draw(axes[0], evals, "val_loss", "o--", label=f"{name}: validation", **style)
    rates = [row | {"lr": 1e3 * row["lr"]} for row in run["rows"] if number(row.get("lr")) is not None]
    draw(axes[1], rates, "lr", color=color, linewidth=width)
    if run["health"]:
        for key, code, line in (("zero", "0", "-"), ("plus", "+1", "--"), ("minus", "-1", ":")):
            draw(axes[2], run["health"], key, line, color=color, label=f"{name}: {code}")
        draw(axes[3], run["health"], "flip_rate", color=color)
    stages = [row.get("stage") for row in run["rows"]]
    if 1 in stages and 2 in stages:
        boundary = run["rows"][stages.index(2) - 1]["step"]
        for ax in axes:
            ax.axvline(boundary, color="gray", linestyle=":")
        axes[1].annotate("stage 2", (boundary, 0), (4, 4), textcoords="offset points", color="dimgray")


def plot(run_dirs, path):
    """Write a picture of runs over their steps. Exits with 2 if a run has no training line yet."""
    figures = cli.library("matplotlib.figure", "matplotlib")
    names = [os.path.basename(os.path.abspath(run_dir)) for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = run_dirs
    runs = {label_of(name): read_run(run_dir) for name, run_dir in zip(names, run_dirs)}
    if empty := [name for name, run in runs.items() if not run["rows"]]:
        fail(f"{empty[0]} has no training line yet: there is nothing to plot; wait for its first")
    labels = ["loss (nats per token)", "learning rate (1e-3)"]
    if any(run["health"] for run in runs.values()):
        labels += ["fraction of codes", "share of codes changed\nsince the last line"]
    figure = figures.Figure(figsize=(10, 2.2 + 2 * len(labels)), layout="constrained")
    axes = figure.subplots(len(labels), sharex=True, height_ratios=[2, *[1] * (len(labels) - 1)])
    # the fall of the first 2 % of the steps would press the rest of a long run into a flat line
    lines = [row for run in runs.values() for row in run["rows"]]
    last = lines[-1]
    start = max(row["step"] for row in lines) / 50
    title = ", ".join(runs)
    for i, (name, run) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        if len(runs) > 1:  # what comes later is thinner, so that equal lines all show
            draw_run(axes, name, run, start, color, val_color=color, width=max(1.2, 3 - i))
            continue
        draw_run(axes, name, run, start, color, val_color="black", width=1.8)
        if size := run["config"].get("params", {}).get("total"):
            title += f": {size:,} parameters"
        if data_set := run["config"]["settings"].get("dataset"):
            title += f", {label_of(data_set)}"
    figure.suptitle(title, wrap=True)
    if later := column([row for row in lines if row["step"] > start], "loss"):
        axes[0].set_ylim(top=max(later) + 0.1 * (max(later) - min(later)) + 0.01)
    for ax, label in zip(axes, labels):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    for ax in axes[1::2]:  # the rate and the share of changes have no legend
        ax.set_ylim(bottom=0)
    axes[0].legend()
    if len(axes) > 2:
        axes[2].legend(ncols=3)
    axes[-1].set_xlabel("step")
    if len(runs) == 1 and last["step"] and number(last.get("epoch")):
        ratio = last["epoch"] / last["step"]
        epochs = axes[0].secondary_xaxis("top", functions=(lambda x: x * ratio, lambda x: x / ratio))
        epochs.set_xlabel("epoch")
    write(figure, path)


def shown_checkpoints(run_dir):
    """Return {step: folder} of the whole checkpoints, and of those to show. Print the damaged ones."""
    from nanobit import checkpoint

    whole = {}
    for step, folder in read_run(run_dir)["checkpoints"].items():
        if fault := checkpoint.fault(folder, checkpoint.MODEL):
            print(printable(f"skipped {folder}: {fault}"), file=sys.stderr)
        else:
            whole[step] = folder
    if len(whole) <= PANELS:
        return whole, whole
    # even distances, so that the pair at a stage boundary takes one place
    first = min(whole)
    marks = [first + i * (max(whole) - first) / (PANELS - 1) for i in range(PANELS)]
    steps = sorted({min(whole, key=lambda step: abs(step - mark)) for mark in marks})
    return whole, {step: whole[step] for step in steps}


def check_matrix(run_dir, part, matrix):
    """Exit with 2 if the model of a checkpoint has no ternary matrix of this name."""
    from nanobit.export.hf import is_ternary

    names = [name.removesuffix(".weight") for name in part["model"] if is_ternary(part, name)]
    if not names:
        fail(f"{run_dir} is a float run (ternary = False), its weights have no codes; choose another")
    if matrix not in names:
        near = difflib.get_close_matches(matrix, names, n=3, cutoff=0.3) or names[:3]
        fail(f"matrix = {matrix!r} is not in {run_dir}; near it are {', '.join(near)}")


def draw_histogram(ax, step, ratio, codes):
    """Draw how the latent weights W / mean|W| lie about the thresholds between the codes, at -0.5 and 0.5.
    Weights beyond the frame count in its last bins."""
    values = [ratio[codes == code].clip(BINS[0], BINS[-1]) for code in CODE_COLORS]
    weights = [[1 / ratio.size] * group.size for group in values]
    colors = CODE_COLORS.values()
    ax.hist(values, BINS, weights=weights, stacked=True, color=colors, edgecolor="gray", linewidth=0.3)
    for threshold in (-0.5, 0.5):
        ax.axvline(threshold, color="black", linestyle="--", linewidth=1)
    minus, zero, plus = ((codes == code).mean() for code in CODE_COLORS)
    ax.set_title(f"step {step:,}: {minus:.1%} are -1, {zero:.1%} are 0, {plus:.1%} are +1", fontsize=11)
    ax.set_xlabel("latent weight W / mean|W|")
    ax.set_ylabel("share of the weights")


def plot_codes(run_dir, matrix, path):
    """Write a picture of one ternary matrix at up to 8 checkpoints: a corner of its codes, those that flipped
    from each checkpoint to the next, and histograms of its latent weights at the first and the last one.
    Return in words how many are shown. Exits with 2 for a float run, an unknown matrix, or one checkpoint."""
    figures = cli.library("matplotlib.figure", "matplotlib")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    import quant
    from nanobit import checkpoint

    whole, folders = shown_checkpoints(run_dir)
    steps = list(folders)
    if steps:
        check_matrix(run_dir, checkpoint.load(folders[steps[0]]), matrix)
    if len(steps) < 2:
        number_of = {0: "no whole checkpoint", 1: "only one whole checkpoint"}[len(steps)]
        fail(f"{run_dir} has {number_of}, codes flip between two; train on, with a smaller save_every")
    figure = figures.Figure(figsize=(max(8, 2.1 * len(steps)), 8), dpi=120, layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[5, 3])
    axes = upper.subplots(2, len(steps))
    histograms = dict(zip((steps[0], steps[-1]), lower.subplots(1, 2, sharey=True)))
    before = None
    for i, step in enumerate(steps):
        top, bottom = axes[:, i]
        w = checkpoint.load(folders[step])["model"][f"{matrix}.weight"]
        codes, scale = quant.ternarize(w)
        ratio = (w.float() * scale).flatten(0, -2).numpy()
        codes = codes.flatten(0, -2).numpy()  # experts one below the other
        style = dict(cmap=ListedColormap(list(CODE_COLORS.values())), vmin=-1, vmax=1)
        top.imshow(codes[:CORNER, :CORNER], interpolation="nearest", **style)
        top.set_title(f"step {step:,}", fontsize=11)
        if before is None:
            bottom.axis("off")
        else:
            flipped = codes != before
            corner = flipped[:CORNER, :CORNER]
            bottom.imshow(corner, interpolation="nearest", cmap="Greys", vmin=0, vmax=1)
            bottom.set_title(f"{flipped.mean():.2%} flipped\nsince {steps[i - 1]:,}", fontsize=11)
        if step in histograms:
            draw_histogram(histograms[step], step, ratio, codes)
        before = codes
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    rows, columns = before.shape
    shown = f"{len(steps)} of {len(whole)} checkpoints"
    corner = f"{min(CORNER, rows)} x {min(CORNER, columns)} of its {rows} x {columns} codes, at {shown}"
    name = label_of(os.path.basename(os.path.abspath(run_dir)))
    figure.suptitle(f"{name}, {matrix}: {corner}; below, what flipped, of the whole matrix", wrap=True)
    names = ("-1", "0", "+1")
    patches = [Patch(fc=color, ec="gray", label=name) for color, name in zip(CODE_COLORS.values(), names)]
    upper.legend(handles=patches, ncols=3, loc="outside lower center")
    write(figure, path)
    return shown
