"""What the lines of a run show: whether values rise or fall, anomalies, repetition; and numbers in words."""

import math
import statistics

from nanobit.monitor.run_files import column, number

JUMP = 8  # standard errors that noise rarely reaches: in 1 to 4 of 1,000 windows of 50 lines


def trend(values, window):
    """Return how the newest values move: {word, lines, change, error, jump}, or None for fewer than 6.

    change: the mean of the newest `lines` = window // 2 values less that of as many before, significant
    beyond twice its standard error. The variance of single values is half the mean square of the differences
    between neighbours, which a trend does not inflate (von Neumann et al., "The mean square successive
    difference", 1941). jump: see jump_of."""
    k = min(window, len(values)) // 2
    if k < 3:
        return None
    old = values[-2 * k : -k]
    new = values[-k:]
    squares = [(b - a) ** 2 for half in (old, new) for a, b in zip(half, half[1:])]
    change = statistics.mean(new) - statistics.mean(old)
    error = math.sqrt(statistics.mean(squares) / k)
    jump = jump_of(old + new)
    word = "flat"
    if jump or change > 2 * error:
        word = "rising"
    elif change < -2 * error:
        word = "falling"
    return dict(word=word, lines=k, change=change, error=error, jump=jump)


def jump_of(values):
    """Return how far the mean of the newest 5 values lies above the lowest mean of 5; 0.0 if noise may do so.
    A jump inflates the mean square of the differences: their median is 0.954 of the standard deviation."""
    means = [sum(values[i : i + 5]) / 5 for i in range(len(values) - 4)]
    noise = statistics.median(abs(b - a) for a, b in zip(values, values[1:])) / 0.954 / math.sqrt(5)
    jump = means[-1] - min(means)
    return jump if jump > max(JUMP * noise, 0.01 * abs(min(means))) else 0.0


def moves(loss):
    """Return a trend() in words."""
    if loss["jump"]:
        return f"rising: the last 5 lines average {loss['jump']:.4f} more than the lowest 5 before"
    lines = loss["lines"]
    direction = "more" if loss["change"] > 0 else "less"
    change = f"the last {lines} lines average {abs(loss['change']):.4f} {direction} than the {lines} before"
    return f"{loss['word']}: {change}, with a standard error of {loss['error']:.4f}"


def clock(seconds):
    """Return seconds in words: 12 s, 5 min, 3 h 12 min, 2 d 4 h; - if they are not known."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def newest(rows):
    """Return the newest of some rows, or {}."""
    return next(reversed(rows), {})


def steady(run):
    """Return the training lines without the first of each process, which warms up."""
    times = [number(row.get("time")) or 0 for row in run["rows"]]
    first = {next((i for i, t in enumerate(times) if t > start), None) for start in run["starts"]}
    return [row for i, row in enumerate(run["rows"]) if i not in first]


def anomalies(run):
    """Return the anomaly events, one of each step and description: steps that were repeated report twice."""
    events = [row for row in run["events"] if row.get("event") == "anomaly"]
    return list({(row["step"], row.get("what")): row for row in events}.values())


def repetition(run):
    """Return the mean repetition of the greedy samples of each step that has some, oldest first."""
    by_step = {}
    for row in sorted(run["greedy"], key=lambda row: row["step"]):
        by_step.setdefault(row["step"], []).extend(column([row], "repetition"))
    return [statistics.mean(values) for values in by_step.values() if values]
