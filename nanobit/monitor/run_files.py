"""What a run has written, by its files only. What is missing or damaged is left out: it may still train."""

import os

import config
from nanobit import record
from nanobit.run_dir import step_dir, steps

DEFAULTS = config.assignments(config.DEFAULT)


def number(value):
    """Return value if it is a finite number, else None."""
    return value if record.is_number(value) else None


def column(rows, key):
    """Return the finite numbers under a key, oldest first."""
    return [row[key] for row in rows if number(row.get(key)) is not None]


def is_setting(name, value):
    """Return whether a setting may have this value. A name that this version lacks may have any plain one."""
    wanted = type(DEFAULTS.get(name, value))
    if wanted in (int, float):
        return record.is_number(value)
    return type(value) is wanted and wanted in (str, bool, list)


def read_config(run_dir):
    """Return what config.json holds: settings, {name: value}; pid, host and device; params, {which: number}.
    What is missing, damaged or of another type is left out."""
    try:
        content, settings = config.saved(os.path.join(run_dir, "config.json"))
    except ValueError:
        return {"settings": {}}
    types = dict(pid=int, host=str, device=str, params=dict)
    facts = {name: content[name] for name, wanted in types.items() if type(content.get(name)) is wanted}
    facts["params"] = {name: number(value) for name, value in facts.get("params", {}).items()}
    return facts | {"settings": {name: value for name, value in settings.items() if is_setting(name, value)}}


def read_run(run_dir):
    """Return what a run has written, as a dict of lists, oldest first: rows (of training), evals, health,
    routers, events, greedy (samples), starts (times at which a process began); and config, and checkpoints
    with a manifest, {step: folder}."""
    scalars = record.read(run_dir, record.SCALARS)
    events = record.read(run_dir, record.EVENTS)
    return dict(
        config=read_config(run_dir),
        rows=[row for row in scalars if "loss" in row],
        evals=[row for row in scalars if row.get("val_loss") is not None],
        health=[{"step": row["step"]} | row["total"] for row in record.read(run_dir, record.BITNET)],
        routers=[row["total"] for row in record.read(run_dir, record.ROUTER)],
        events=events,
        greedy=[row for row in record.read(run_dir, record.SAMPLES) if row["mode"] == "greedy"],
        starts=column([row for row in events if row.get("event") in ("start", "resume")], "time"),
        checkpoints={step: step_dir(run_dir, step) for step in reversed(steps(run_dir))},
    )
