"""Runs written by hand, for the tests of what is reported of a run."""

import json
import os
import time

import numpy as np

SETTINGS = dict(
    max_steps=1000, learning_rate=1e-3, min_lr_ratio=0.01, schedule="wsd", save_every=100, keep_last=3
)


def child_pid():
    """Return the pid of a process that exists and is not this one."""
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
    """Write a run folder as train.py leaves it, a line every 10 steps and 10 s, the newest `age` seconds old.
    health: dicts; greedy: repetitions, at 10, 20, ...; row: fields of every training line, row[key] may be
    a list."""
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
    """Return n losses that fall by slope a line, with scatter."""
    return (start - slope * np.arange(n) + np.random.default_rng(0).normal(0, noise, n)).tolist()
