"""
The record of a run: lines of JSON in runs/<run_id>/metrics and samples, plain lines in train.log.

A line is appended and flushed whole. A run that resumes from step k drops what is made again, so that each training line
beyond k, and each evaluation, sample and best from k on, is there once, whatever was killed.
"""

import json
import math
import os
import time

try:
    import fcntl
except ImportError:  # Windows: two processes on one run are not noticed there
    fcntl = None

from config import fail
from data import write_json

SCALARS, BITNET = os.path.join("metrics", "scalars.jsonl"), os.path.join("metrics", "bitnet.jsonl")
EVENTS, SAMPLES = os.path.join("metrics", "events.jsonl"), os.path.join("samples", "samples.jsonl")


def to_json(fields):
    """one line of JSON, floats to the last bit; JSON has no NaN and no infinity: they become null"""
    plain = {key: None if type(value) is float and not math.isfinite(value) else value for key, value in fields.items()}
    return json.dumps(plain, allow_nan=False)


def append(run_dir, name, **fields):
    with open(os.path.join(run_dir, name), "a", encoding="utf-8") as file:
        file.write(to_json(fields) + "\n")


def event(run_dir, kind, **fields):
    append(run_dir, EVENTS, event=kind, **fields, time=round(time.time(), 3))


def read(run_dir, name):
    """the whole lines of a JSONL file, oldest first; a half-written last line is left out"""
    path = os.path.join(run_dir, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")[:-1]
    return [json.loads(line) for line in lines if is_whole(line)]


def is_whole(line):
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def rewind(run_dir, step):
    """drop what a run that goes on from `step` (None: from the start) makes again; half-written lines go too"""

    def keep_json(name, line):
        if not is_whole(line):
            return False
        fields = json.loads(line)
        if name == EVENTS:
            return True
        if step is None:
            return False
        made_at_step = name == SAMPLES or "val_loss" in fields  # before the update, so it is made again at `step` itself
        return fields["step"] < step or (fields["step"] == step and not made_at_step)

    def keep_log(name, line):  # "step 100/2000 ..." describes an update, "eval 100/2000 ..." is made again
        kind, _, rest = line.partition(" ")
        number = rest.partition("/")[0]
        if step is None or kind not in ("step", "eval") or not number.isdigit():
            return step is not None
        return int(number) < step or (int(number) == step and kind == "step")

    for name, keep in ((SCALARS, keep_json), (BITNET, keep_json), (EVENTS, keep_json), (SAMPLES, keep_json), ("train.log", keep_log)):
        path = os.path.join(run_dir, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read().split("\n")[:-1]
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines if keep(name, line))
            os.replace(path + ".tmp", path)


def write_best(run_dir, best):
    """best.json: {step, val_loss} of the best evaluation, or no file where there is none yet"""
    path = os.path.join(run_dir, "best.json")
    if best:
        write_json(path, best)
    elif os.path.exists(path):
        os.remove(path)


def open_run(run_dir):
    """make the folders of a run and lock it for this process; returns the lock, to be held. Exits with 2 where the
    folder cannot be written or another process trains this run."""
    try:
        for name in ("metrics", "samples", "checkpoints"):
            os.makedirs(os.path.join(run_dir, name), exist_ok=True)
        lock = open(os.path.join(run_dir, ".lock"), "w")
    except OSError as error:
        fail(f"out_dir: cannot write {run_dir} ({error.strerror}); choose another folder with --out_dir=")
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{run_dir} is being trained by another process; wait for it, or choose another --run_id=")
    return lock
