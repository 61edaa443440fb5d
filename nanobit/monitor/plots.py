"""Pictures of runs, by matplotlib: their curves, and a ternary matrix settling."""

import difflib
import io
import os
import statistics
import sys

from nanobit import cli, files
from nanobit.cli import fail
from nanobit.monitor.status import checkpoints, column, number, read_run
from nanobit.terminal import printable

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
CODE_COLORS = ("#0072B2", "#F0F0F0", "#D55E00")  # of -1, 0, +1


def smooth(values):
    """the running mean over a fiftieth of the values, at least 5, fewer at both ends"""
    reach = [min(max(2, len(values) // 100), i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.mean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def write(figure, path):
    """write a figure as a whole file: a full disk leaves no part of one"""
    content = io.BytesIO()
    figure.savefig(content, format=path.rpartition(".")[2])
    files.write_bytes(path, content.getvalue())


def label_of(name):
    """Return the name of a run as matplotlib shows it: letters that its font lacks as \\uXXXX, and signs
    that it would read as a formula, or as a label to leave out, as they are."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    has = get_font(findfont(FontProperties())).get_charmap()
    text = "".join(c if ord(c) in has else c.encode("unicode_escape").decode() for c in printable(name))
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def plot(run_dirs, path):
    """write a picture of runs over their steps: losses, learning rate, fractions of the codes, how many
    change"""
    names = [os.path.basename(os.path.abspath(each)) for each in run_dirs]
    names = names if len(set(names)) == len(names) else run_dirs
    figures = cli.library("matplotlib.figure", "matplotlib")
    runs = {label_of(name): read_run(each) for name, each in zip(names, run_dirs)}
    for name, run in runs.items():
        if not run["rows"]:
            fail(f"{name} has no training line yet: there is nothing to plot; wait for its first")
    labels = ["loss (nats per token)", "learning rate (1e-3)", "fraction of codes"]
    labels += ["share of codes changed\nsince the last line"]
    labels = labels if any(run["health"] for run in runs.values()) else labels[:2]
    figure = figures.Figure(figsize=(10, 2.2 + 2 * len(labels)), layout="constrained")
    title = ", ".join(runs)
    if len(runs) == 1:
        facts = runs[title]["config"]
        size, data_set = facts.get("params", {}).get("total"), facts["settings"].get("dataset")
        title += f": {size:,} parameters" if size else ""
        title += f", {label_of(data_set)}" if data_set else ""
    figure.suptitle(title, wrap=True)
    axes = figure.subplots(len(labels), sharex=True, height_ratios=[2, *[1] * (len(labels) - 1)])
    # the fall of the first 2 % of the steps would press the rest of a long run into a flat line
    lines = [row for run in runs.values() for row in run["rows"]]
    start = max(row["step"] for row in lines) / 50

    def draw(ax, rows, key, line="-", **how):
        rows = [row for row in rows if number(row.get(key)) is not None]
        if len(rows) == 1:  # one point makes no line
            line = {"--": "^", ":": "v"}.get(line, "o")
        ax.plot([row["step"] for row in rows], column(rows, key), line, **how)

    for i, (name, run) in enumerate(runs.items()):
        # what comes later is thinner, so that equal lines all show
        color, width = COLORS[i % len(COLORS)], max(1.2, 3 - i) if len(runs) > 1 else 1.8
        losses = [row for row in run["rows"] if number(row["loss"]) is not None]
        means = [row | {"loss": mean} for row, mean in zip(losses, smooth(column(losses, "loss")))]
        draw(axes[0], losses, "loss", color=color, alpha=0.35, linewidth=0.8)
        draw(axes[0], means, "loss", color=color, label=f"{name}: training, smoothed")
        how = dict(markersize=6, linewidth=1, markeredgecolor="white")
        val_color = color if len(runs) > 1 else "black"
        if run["evals"]:
            label = f"{name}: validation"
            # the first one, of a model that has learned nothing, lies above the frame
            evals = [row for row in run["evals"] if row["step"] > start] or run["evals"]
            draw(axes[0], evals, "val_loss", "o--", color=val_color, label=label, **how)
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
            at = dict(xytext=(4, 4), textcoords="offset points", color="dimgray")
            axes[1].annotate("stage 2", (boundary, 0), **at)
    later = column([row for row in lines if row["step"] > start], "loss")
    if later:
        axes[0].set_ylim(top=max(later) + 0.1 * (max(later) - min(later)) + 0.01)
    for ax, label in zip(axes, labels):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        if label.startswith(("learning rate", "share")):
            ax.set_ylim(bottom=0)
        else:
            ax.legend(ncols=3 if label == "fraction of codes" else 1)
    axes[-1].set_xlabel("step")
    last = lines[-1]
    if len(runs) == 1 and last["step"] and number(last.get("epoch")):
        ratio = last["epoch"] / last["step"]
        epochs = axes[0].secondary_xaxis("top", functions=(lambda x: x * ratio, lambda x: x / ratio))
        epochs.set_xlabel("epoch")
    write(figure, path)


def plot_codes(run_dir, matrix, path):
    """write a picture of a corner of one ternary matrix at up to 8 checkpoints, and of the codes that
    flipped from each to the next; returns in words how many are shown. Exits with 2 for a float run, an
    unknown matrix, fewer than two checkpoints."""
    figures = cli.library("matplotlib.figure", "matplotlib")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    import quant
    from nanobit import checkpoint
    from nanobit.experts import bit_layers
    from nanobit.infer import restore

    whole = {}
    for step, folder in checkpoints(run_dir).items():
        wrong = checkpoint.fault(folder, checkpoint.MODEL)
        if wrong:
            print(printable(f"skipped {folder}: {wrong}"), file=sys.stderr)
        else:
            whole[step] = folder
    steps = list(whole)
    if len(steps) > 8:  # even distances, so that the pair at a stage boundary takes one place
        marks = [steps[0] + i * (steps[-1] - steps[0]) / 7 for i in range(8)]
        steps = sorted({min(whole, key=lambda step: abs(step - mark)) for mark in marks})
    n, shown = len(steps), f"{len(steps)} of {len(whole)} checkpoints"
    if n:
        part = checkpoint.load(whole[steps[0]])
        if not part["config"]["ternary"]:
            fail(f"{run_dir} is a float run (ternary = False), its weights have no codes; choose another")
        names = list(bit_layers(restore.restore(part, "cpu")))
        if matrix not in names:
            near = difflib.get_close_matches(matrix, names, n=3, cutoff=0.3) or names[:3]
            fail(f"matrix = {matrix!r} is not in {run_dir}; near it are {', '.join(near)}")
    if n < 2:
        found = "only one whole checkpoint" if n else "no whole checkpoint"
        fail(f"{run_dir} has {found}, codes flip between two; train on, with a smaller save_every")
    figure = figures.Figure(figsize=(2.1 * n, 5), dpi=120, layout="constrained")
    axes, before, former = figure.subplots(2, n), None, None
    for (top, bottom), step in zip(axes.T, steps):
        part = checkpoint.load(whole[step])
        # experts one below the other
        codes = quant.ternarize(part["model"][f"{matrix}.weight"])[0].flatten(0, -2).numpy()
        top.imshow(
            codes[:64, :64], cmap=ListedColormap(CODE_COLORS), vmin=-1, vmax=1, interpolation="nearest"
        )
        top.set_title(f"step {part['step']:,}", fontsize=11)
        bottom.axis("off" if before is None else "on")
        if before is not None:
            flipped = codes != before
            bottom.imshow(flipped[:64, :64], cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            bottom.set_title(f"{flipped.mean():.2%} flipped\nsince {former:,}", fontsize=11)
        before, former = codes, part["step"]
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    out, into = before.shape
    corner = f"{matrix}: {min(64, out)} x {min(64, into)} of its {out} x {into} codes"
    corner += f", at {shown}; below, what flipped, with the share of the whole matrix"
    figure.suptitle(f"{label_of(os.path.basename(os.path.abspath(run_dir)))}, {corner}", wrap=True)
    names = zip(CODE_COLORS, ("-1", "0", "+1"))
    patches = [Patch(facecolor=color, edgecolor="gray", label=name) for color, name in names]
    figure.legend(handles=patches, ncols=3, loc="outside lower center")
    write(figure, path)
    return shown
