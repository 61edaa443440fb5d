"""
The record of a run: lines of JSON in runs/<run_id>/metrics and samples, plain lines in train.log.

A line is appended whole. A run that resumes from step k drops what is made again, so that each training line
beyond k, and each evaluation, sample and best from k on, is there once, whatever was killed.
"""

import atexit
import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata

import files
from config import RANK, WORLD, fail, settings_of
from files import write_json

SCALARS, BITNET = os.path.join("metrics", "scalars.jsonl"), os.path.join("metrics", "bitnet.jsonl")
ROUTER = os.path.join("metrics", "router.jsonl")
EVENTS, SAMPLES = os.path.join("metrics", "events.jsonl"), os.path.join("samples", "samples.jsonl")
lock = None  # that of the run's folder


def plain(value):
    """value as JSON can hold it: JSON has no NaN and no infinity, they become null"""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(fields):
    """one line of JSON, floats to the last bit"""
    return json.dumps(plain(fields), allow_nan=False)


def append_text(run_dir, text, name="train.log"):
    """one whole line at the end of a file of the run. Where the disk is full the line is dropped, with a
    warning on stderr: a line is no reason to stop training."""
    if RANK:  # rank 0 writes for all
        return
    path = os.path.join(run_dir, name)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        print(f"warning: a line of {path} is lost: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):  # the whole disk may be gone, and come back
            os.truncate(path, size)  # no half line, onto which the next would be written


def append(run_dir, name, **fields):
    append_text(run_dir, to_json(fields), name)


def event(run_dir, kind, **fields):
    append(run_dir, EVENTS, event=kind, **fields, time=time.time())


def flush(run_dir):
    """put the record on the disk itself, so that a checkpoint that survives a power cut has its lines"""
    for name in (SCALARS, BITNET, ROUTER, EVENTS, SAMPLES, "train.log"):
        path = os.path.join(run_dir, name)
        if os.path.exists(path):
            with open(path, "ab") as file:  # Windows flushes only what it may write
                os.fsync(file.fileno())


def read(run_dir, name):
    """the whole lines of a JSONL file, oldest first; a half-written last line is left out"""
    path = os.path.join(run_dir, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")[:-1]
    return [row for row in map(parsed, lines) if row is not None]


def last(run_dir, name, has="step", **fields):
    """the newest line of a JSONL file that has a key and these fields, or {}"""
    found = (line for line in reversed(read(run_dir, name)) if has in line and fields.items() <= line.items())
    return next(found, {})


def parsed(line):
    """the object that a line of JSON holds, or None where it is damaged"""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def rewind(run_dir, step):
    """drop what a run that goes on from `step` (None: from the start) makes again; half-written lines go
    too"""

    def is_kept(name, line):
        if name == "train.log":  # "step 100/2000 ..." tells of an update, "eval 100/2000 ..." is made again
            kind, _, rest = line.partition(" ")
            number, again = rest.partition("/")[0], kind == "eval"
            if kind not in ("step", "eval") or not number.isdigit():
                return step is not None
        elif (fields := parsed(line)) is None:
            return False
        elif name == EVENTS:
            return True
        else:
            number, again = fields["step"], name == SAMPLES or "val_loss" in fields
        return step is not None and int(number) < step + (not again)

    for name in (SCALARS, BITNET, ROUTER, EVENTS, SAMPLES, "train.log"):
        path = os.path.join(run_dir, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read().split("\n")[:-1]
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines if is_kept(name, line))
            os.replace(path + ".tmp", path)


def write_best(run_dir, best):
    """best.json: {step, val_loss} of the best evaluation, or no file where there is none yet. Returns
    whether it is written: a full disk costs a warning and leaves the former one."""
    path = os.path.join(run_dir, "best.json")
    try:
        if best:
            write_json(path, best)
        elif os.path.exists(path):
            os.remove(path)
    except OSError as error:
        print(f"warning: {path} is not written: {error.strerror}", file=sys.stderr)
        return False
    return True


def write_config(run_dir, cfg, facts):
    """config.json: every setting with where it came from, versions, git commit, pid, and the facts of
    train.py"""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    settings = settings_of(cfg).items()
    found = {
        "settings": {k: {"value": v, "origin": cfg.origin.get(k, "derived")} for k, v in settings},
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")}
        | {"python": sys.version.split()[0]},
        "git_commit": commit or None,
        "pid": os.getpid(),
        "host": platform.node(),
    }
    write_json(os.path.join(run_dir, "config.json"), found | facts)


def opening(cfg, facts):
    """what a run prints first: every setting with where it came from, model, device, length; facts as for
    write_config"""
    values = settings_of(cfg).items()
    lines = [f"{name:20} {value!r:24} {cfg.origin.get(name, 'derived')}" for name, value in values]
    params, several = facts["params"], f"{WORLD} x " if WORLD > 1 else ""
    active = f"{params['active']:,} of them active for a token, " if cfg.n_expert else ""
    compiled = "on: the first step waits for the compiler" if facts["compile"] else "off"
    lines += [
        f"model: {params['total']:,} parameters, {active}{params['ternary']:,} ternary; "
        f"{several}{facts['device']}, {facts['dtype']}, compile {compiled}",
        f"step: {cfg.total_batch_size:,} tokens = "
        f"{several}{cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}; "
        f"{cfg.max_steps:,} steps, {cfg.max_steps * cfg.total_batch_size:,} tokens",
    ]
    return "\n".join(lines)


def resume_command(run_dir):
    """Return the command that resumes a run with the settings of its config.json, quoted for the shell"""
    python = ["torchrun", f"--nproc_per_node={WORLD}"] if WORLD > 1 else ["python"]
    command = [*python, sys.argv[0], f"--resume={run_dir}"]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def finished(run_dir, cfg, step, patience):
    """why the run is at its end, at this step and with these settings, or ''; patience: the setting then"""
    end = last(run_dir, EVENTS)
    if end.get("event") != "finish" or end["step"] != step:
        return ""
    out_of_patience = end["why"] == "patience" and cfg.patience == patience
    return end["why"] if step >= cfg.max_steps or out_of_patience else ""


def forget(run_dir):
    """remove the folder of a run that ended before it began; where there is a file in it, it stays"""
    if any(not name.startswith(".lock") for _, _, names in os.walk(run_dir) for name in names):
        return
    lock.release()  # Windows deletes nothing that is open
    with contextlib.suppress(OSError):
        shutil.rmtree(run_dir)


def open_run(run_dir):
    """make the folders of a run and lock it, until this process ends. Exits with 2 where it cannot be written
    or another process trains this run."""
    global lock
    is_new = not os.path.isdir(run_dir)
    try:
        for name in ("metrics", "samples", "checkpoints"):
            os.makedirs(os.path.join(run_dir, name), exist_ok=True)
        lock = files.lock(os.path.join(run_dir, ".lock"))
    except BlockingIOError as error:
        fail(f"{run_dir} is being trained by {error.strerror}; wait for it, or choose another --run_id=")
    except OSError as error:
        fail(f"out_dir: cannot write {run_dir} ({error.strerror}); choose another folder with --out_dir=")
    if is_new:
        atexit.register(forget, run_dir)
