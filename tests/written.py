"""What a run has written, and whether two runs are the same."""

import json

import torch
from conftest import (
    EVENTS,
    SCALARS,
    final,
    lines,
    rows,
)

NO_EXTRAS = dict(sample_every=0, eval_every=0, schedule="linear")  # settings of a run that only trains
ROUTER, SAMPLES = "metrics/router.jsonl", "samples/samples.jsonl"


def best_of(run_dir):
    """Return the content of best.json."""
    with open(f"{run_dir}/best.json", encoding="utf-8") as file:
        return json.load(file)


def events(run_dir, name):
    """Return the events of one kind."""
    return [row for row in lines(run_dir, EVENTS) if row["event"] == name]


def trained_steps(run_dir):
    """Return the steps that have a training line, in the order of the file."""
    return [row["step"] for row in lines(run_dir, SCALARS) if "loss" in row]


def values_of(run_dir, key):
    """Return a value of each training line."""
    return [row[key] for row in lines(run_dir, SCALARS) if key in row]


def val_losses(run_dir):
    """Return {step: validation loss}."""
    return {row["step"]: row["val_loss"] for row in lines(run_dir, SCALARS) if "val_loss" in row}


def rewrite(path, change):
    """Replace the text of a file by change(text)."""
    with open(path, encoding="utf-8") as file:
        text = change(file.read())
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def assert_same_end(a, b):
    """Two runs end with the same weights and optimizer state, and have logged the same."""
    for left, right in zip(final(a), final(b)):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(a) == rows(b)


def assert_same_run(a, b):
    """Two runs are the same in all that they wrote, but for what depends on the clock."""
    assert_same_end(a, b)
    assert lines(a, SAMPLES) == lines(b, SAMPLES)
    assert best_of(a) == best_of(b)
    health = [[row["total"] for row in lines(run_dir, "metrics/bitnet.jsonl")] for run_dir in (a, b)]
    for total in health[0] + health[1]:
        del total["flip_rate"]  # of the first line after a resume it is not known
    assert health[0] == health[1]
