"""What the rows of results.jsonl show: paired differences with their errors; in tables, words, a picture."""

import math
import statistics

import config
from nanobit import cli
from nanobit.monitor import plots
from nanobit.monitor.trends import clock

BASE = "unchanged"  # the name of the config without a --try
MACHINE = ("cpu", "device", "torch", "commit")  # on these the last bits depend; device names the threads
VALIDATION = ("data_dir", "dataset", "seq_len", *config.VALIDATION)  # they select the text of an evaluation


def label_of(name, is_twin):
    """Return a variant in words."""
    if is_twin:
        return f"{name}, float twin"
    return name


def by_variant(rows):
    """Return {(variant, twin): {seed: row}}, with the runs that did not fail."""
    groups = {(row["variant"], row["twin"]): {} for row in rows}
    for row in rows:
        if not row["failed"]:
            groups[row["variant"], row["twin"]][row["seed"]] = row
    return groups


def pairs(group, others):
    """Return [(row, other row)] for the seeds that both {seed: row} hold."""
    return [(row, others[seed]) for seed, row in group.items() if seed in others]


def estimate(paired):
    """Return of paired losses: seeds, the number of pairs; difference, the mean; error, its standard error,
    None for one pair; and t, their ratio, None if the error is 0 or None."""
    values = [row["val_loss"] - other["val_loss"] for row, other in paired]
    result = dict(seeds=len(values), difference=None, error=None, t=None)
    if values:
        result["difference"] = statistics.fmean(values)
    if len(values) > 1:
        result["error"] = statistics.stdev(values) / math.sqrt(len(values))
    if result["error"]:
        result["t"] = result["difference"] / result["error"]
    return result


def mean_of(group, key):
    """Return the mean of a value of {seed: row}, None if it is not known."""
    values = [row[key] for row in group.values() if row[key] is not None]
    return statistics.fmean(values) if values else None


def results(rows):
    """Return {variants: the means of each and its difference from the unchanged config (a float twin's, from
    the twin of that); gaps: each variant's difference from its float twin; warnings: see mismatches}."""
    groups = by_variant(rows)
    result = dict(variants=[], gaps=[], warnings=[])
    for (name, is_twin), group in groups.items():
        paired = []
        if name != BASE:
            paired = pairs(group, groups[BASE, is_twin])
        row = dict(variant=name, twin=is_twin) | estimate(paired)
        if name == BASE:
            row["seeds"] = len(group)
        row |= {key: mean_of(group, key) for key in ("val_loss", "tokens_per_sec", "seconds")}
        result["variants"].append(row | dict(failed=failures(rows, name, is_twin)))
        result["warnings"] += mismatches(paired)
        if is_twin:
            with_twins = pairs(groups[name, False], group)
            result["gaps"].append(dict(variant=name) | estimate(with_twins))
            result["warnings"] += mismatches(with_twins)
    return result


def failures(rows, name, is_twin):
    """Return {seed: error} of the runs of a variant that failed."""
    own = [row for row in rows if (row["variant"], row["twin"]) == (name, is_twin)]
    return {row["seed"]: row["failed"] for row in own if row["failed"]}


def mismatches(paired):
    """Return a warning for each fact of MACHINE in which paired runs differ, with their seeds."""
    seeds = {}
    for row, other in paired:
        label, other_label = (label_of(run["variant"], run["twin"]) for run in (row, other))
        for key in MACHINE:
            if row[key] != other[key]:
                text = f"{key} of {label} is {row[key]}, but that of {other_label} is {other[key]}"
                seeds.setdefault(text, []).append(str(row["seed"]))
    return [f"{text}, on seeds {','.join(numbers)}" for text, numbers in seeds.items()]


def mismatched_settings(settings):
    """Return warnings on variants whose losses are not comparable with those of the unchanged config: they
    differ by one step's tokens or more, or are evaluated on different text. settings: {variant: cfg}."""
    base = settings[BASE]
    base_tokens = base.max_steps * base.total_batch_size
    warnings = []
    for name, cfg in settings.items():
        tokens = cfg.max_steps * cfg.total_batch_size
        if abs(tokens - base_tokens) >= max(cfg.total_batch_size, base.total_batch_size):
            warnings.append(f"{name} trains on {tokens:,} tokens, the unchanged config on {base_tokens:,}")
        for key in VALIDATION:
            value, base_value = getattr(cfg, key), getattr(base, key)
            if value != base_value:
                text = f"{key} of {name} is {value}, that of the unchanged config {base_value}"
                warnings.append(f"{text}: they are evaluated on different text")
    return warnings


def table(rows, first, forms):
    """Return the lines of a table of variants or gaps, aligned. forms: {heading: (key, format)}."""
    cells = [[first, *forms]]
    for row in rows:
        values = [(row[key], form) for key, form in forms.values()]
        cells.append([row["label"], *("-" if value is None else form(value) for value, form in values)])
    sizes = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])]) for row in cells]


def tables(result):
    """Return the lines of the table of variants, and of that of gaps if there are any."""
    difference = dict(difference=("difference", "{:+.4f}".format), error=("error", "{:.4f}".format))
    forms = dict(val_loss=("val_loss", "{:.4f}".format)) | difference
    forms |= {"t": ("t", "{:.1f}".format), "seeds": ("seeds", str)}
    forms |= {"tokens/s": ("tokens_per_sec", "{:,.0f}".format), "time": ("seconds", clock)}
    rows = [row | dict(label=label_of(row["variant"], row["twin"])) for row in result["variants"]]
    lines = table(rows, "variant", forms)
    if result["gaps"]:
        rows = [row | dict(label=row["variant"]) for row in result["gaps"]]
        lines += ["", *table(rows, "ternary minus float", difference | dict(seeds=("seeds", str)))]
    return lines


def verdict(row):
    """Return in words what the difference of a variant shows."""
    seeds = f"{row['seeds']} seeds"
    if row["difference"] is None:
        return "no pair of finished runs"
    if row["error"] is None:
        return "one pair gives no error, so that its difference may be noise; use more --seeds"
    if row["difference"] == row["error"] == 0:
        return f"exactly the same losses on all {seeds}"
    if abs(row["difference"]) <= 3 * row["error"]:
        return f"within three standard errors: {seeds} do not show a difference"
    side = "lower" if row["difference"] < 0 else "higher"
    return f"{side} by more than three standard errors ({seeds})"


def notes(result):
    """Return the lines below the tables: a verdict on each variant, failures, and how far to trust that."""
    tried = []
    failed = []
    lines = []
    for row in result["variants"]:
        label = label_of(row["variant"], row["twin"])
        failed += [f"{label}, seed {seed} failed: {error}" for seed, error in row["failed"].items()]
        if row["variant"] != BASE:
            tried.append(row["variant"])
            lines.append(f"{label}: {verdict(row)}")
    lines += failed
    if any(row["variant"] != BASE and 1 < row["seeds"] < 5 for row in result["variants"]):
        lines.append("An error from fewer than five seeds is itself uncertain: five are better.")
    if len(set(tried)) > 1:
        fresh = ",".join(str(max(result["seeds"]) + i) for i in range(1, 6))
        lines.append(
            "The best of several tries looks better than it is, since these seeds chose it: confirm it alone "
            f"on fresh seeds, with --seeds={fresh}"
        )
    return lines + [f"warning: {text}" for text in result["warnings"]]


def curves(rows):
    """Return {(variant, twin): {step of the unchanged config: [paired differences]}}, at equal tokens."""
    groups = by_variant(rows)
    result = {}
    for (name, is_twin), group in groups.items():
        curve = result[name, is_twin] = {}
        for row, other in pairs(group, groups[BASE, is_twin]):
            scale = row["tokens_per_step"] / other["tokens_per_step"]
            theirs = dict(other["curve"])
            for step, loss in row["curve"]:
                if loss is not None and theirs.get(step * scale) is not None:
                    curve.setdefault(step * scale, []).append(loss - theirs[step * scale])
    return result


def draw(rows, path):
    """Write a picture of the paired differences over the steps, with bands of one standard error."""
    figure = cli.library("matplotlib.figure", "matplotlib").Figure(figsize=(10, 6), layout="constrained")
    ax = figure.subplots()
    ax.axhline(0, color="black", linewidth=1)
    drawn = [(key, curve) for key, curve in curves(rows).items() if key[0] != BASE and curve]
    names = list(dict.fromkeys(name for (name, _), _ in drawn))
    for (name, is_twin), curve in drawn:
        color = plots.COLORS[names.index(name) % len(plots.COLORS)]
        label = plots.label_of(label_of(name, is_twin))
        steps = sorted(curve)
        means = [statistics.fmean(curve[step]) for step in steps]
        ax.plot(steps, means, "o--" if is_twin else "o-", color=color, label=label)
        if min(map(len, curve.values())) > 1:
            errors = [statistics.stdev(curve[step]) / math.sqrt(len(curve[step])) for step in steps]
            low = [mean - error for mean, error in zip(means, errors)]
            high = [mean + error for mean, error in zip(means, errors)]
            ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_xlabel("step of the unchanged config")
    ax.set_ylabel("validation loss minus that of the unchanged config (nats per token)")
    ax.grid(alpha=0.3)
    if drawn:
        ax.legend()
    plots.write(figure, path)
