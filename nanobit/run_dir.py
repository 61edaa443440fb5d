"""
The record of a run: lines of JSON in runs/<run_id>/metrics and samples, plain lines in train.log.

A line is appended whole. A run that resumes from step k drops what is made again, so that each training line
beyond k, and each evaluation, sample and best from k on, is there once, whatever was killed.
"""

import atexit
import collections
import contextlib
import glob
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata

from config import settings_of
from nanobit import cli, files
from nanobit.cli import RANK, WORLD, fail
from nanobit.files import write_json
from nanobit.terminal import command_line

SCALARS, BITNET = os.path.join("metrics", "scalars.jsonl"), os.path.join("metrics", "bitnet.jsonl")
ROUTER = os.path.join("metrics", "router.jsonl")
EVENTS, SAMPLES = os.path.join("metrics", "events.jsonl"), os.path.join("samples", "samples.jsonl")
FILES = (SCALARS, BITNET, ROUTER, EVENTS, SAMPLES, "train.log")
lock = None  # that of the run's folder
counts = collections.Counter()  # of the run that this process writes: {base name of a file: its lines}


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


def step_dir(run_dir, step):
    return os.path.join(run_dir, "checkpoints", f"step_{step:06d}")


def has_manifest(run_dir, step):
    """Return whether the checkpoint of a step exists, without a look at its content."""
    return os.path.exists(os.path.join(step_dir(run_dir, step), "manifest.json"))


def step_folders(run_dir):
    """Return the steps of a run that have a folder, newest first. Raises OSError if that cannot be read."""
    folder = os.path.join(run_dir, "checkpoints")
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d{6,}", name)), reverse=True)


def steps(run_dir):
    """Return the steps of a run that have a manifest, newest first."""
    return [step for step in step_folders(run_dir) if has_manifest(run_dir, step)]


def append_text(run_dir, text, name="train.log"):
    """one whole line at the end of a file of the run. Where the disk is full the line is dropped, with a
    warning on stderr: a line is no reason to stop training."""
    if RANK:  # rank 0 writes for all
        return
    path = os.path.join(run_dir, name)
    size = None
    try:
        with open(path, "a", encoding="utf-8") as file:
            size = file.tell()
            file.write(text + "\n")
    except OSError as error:
        print(f"warning: a line of {path} is lost: {error.strerror}", file=sys.stderr)
        if size is not None:
            with contextlib.suppress(OSError):  # the whole disk may be gone, and come back
                os.truncate(path, size)  # no half line, onto which the next would be written
    else:
        counts[os.path.basename(name)] += 1


def append(run_dir, name, **fields):
    append_text(run_dir, to_json(fields), name)


def event(run_dir, kind, **fields):
    append(run_dir, EVENTS, event=kind, **fields, time=time.time())


def flush(run_dir):
    """put the record on the disk itself, so that a checkpoint that survives a power cut has its lines"""
    for name in FILES:
        path = os.path.join(run_dir, name)
        if os.path.exists(path):
            with open(path, "ab") as file:  # Windows flushes only what it may write
                os.fsync(file.fileno())


def whole_lines(run_dir, name):
    """Return the lines of a file of the run, oldest first; a half-written last line is left out."""
    path = os.path.join(run_dir, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().split("\n")[:-1]


def read(run_dir, name):
    """Return the undamaged lines of a JSONL file, oldest first; see parsed."""
    rows = (parsed(line, name) for line in whole_lines(run_dir, name))
    return [row for row in rows if row is not None]


def last(run_dir, name, has="step", **fields):
    """the newest line of a JSONL file that has a key and these fields, or {}"""
    found = (line for line in reversed(read(run_dir, name)) if has in line and fields.items() <= line.items())
    return next(found, {})


def is_number(value):
    """Return whether value is a number with which the arithmetic of a reader cannot overflow."""
    return type(value) in (int, float) and abs(value) < 1e100  # which is false for NaN


# what the values are that readers rely on, by their names in all files
NUMBERS = (
    "epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util "
    "val_loss val_perplexity loss_scale repetition steps signal time"
).split()
CHECKS = dict.fromkeys(NUMBERS, is_number)
CHECKS |= dict.fromkeys(("total", "result", "changed"), lambda value: type(value) is dict)
CHECKS |= dict.fromkeys("event what why mode prompt generated_text".split(), lambda value: type(value) is str)
NEEDED = {  # without which a line says nothing
    BITNET: ["total"],
    ROUTER: ["total"],
    EVENTS: ["event"],
    SAMPLES: ["mode", "prompt", "generated_text"],
}


def parsed(line, name):
    """Return the object in a line of the file `name`, or None if the line is damaged: it is not JSON, has no
    step, or lacks what its file needs. A value of another type than its name wants becomes None, unknown.

    This is the one place that checks, so that a reader may rely on what it gets.
    """
    if not line.isascii():  # to_json escapes what is not
        return None
    try:
        row = json.loads(line, parse_constant=lambda constant: None)  # NaN and infinity
    except (ValueError, RecursionError):
        return None
    if type(row) is not dict or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
        return None
    for key in CHECKS.keys() & row.keys():
        row[key] = row[key] if CHECKS[key](row[key]) else None
    if row.get("total"):
        row["total"] = {key: value if is_number(value) else None for key, value in row["total"].items()}
    needed = ["why", "result"] if row.get("event") == "finish" else NEEDED.get(name, [])
    is_whole = "loss" in row or "val_loss" in row if name == SCALARS else None not in map(row.get, needed)
    return row if is_whole else None


def rewind(run_dir, step, before=None):
    """Drop what a run that resumes from `step` (None: from the start) writes again, with damaged lines, and
    the temporary files of killed processes.

    before: {base name of a file: number of its lines} at that step, from the checkpoint, as far as it has
    them. Return a sentence for each file that has lost lines of earlier steps.
    """

    def is_kept(name, line):
        """whether a line stays; None if it is damaged"""
        if name == "train.log":  # "step 100/2000 ..." is about an update, "eval 100/2000 ..." is made again
            found = re.match(r"(step|eval) (\d{1,15})/", line, re.ASCII)
            if not found:
                return step is not None
            number, again = int(found[2]), found[1] == "eval"
        elif (fields := parsed(line, name)) is None:
            return None
        elif name == EVENTS:
            return True
        else:
            number, again = fields["step"], name == SAMPLES or "val_loss" in fields
        return step is not None and number < step + (not again)

    lost = []
    for name in FILES:
        path, base = os.path.join(run_dir, name), os.path.basename(name)
        found = whole_lines(run_dir, name)
        fates = [is_kept(name, line) for line in found]
        kept = [line for line, fate in zip(found, fates) if fate]
        if os.path.exists(path):
            files.write_bytes(path, "".join(line + "\n" for line in kept).encode())
        counts[base] = len(kept)
        while fates and not fates[-1]:  # a damaged line behind the last kept one may be of a later step
            fates.pop()
        count = max(fates.count(None), (before or {}).get(base, 0) - len(kept))
        if step is not None and count:
            of_all = f" of {max(count, before[base])}" if before and base in before else ""
            lost.append(f"{name}: {count}{of_all} lines before step {step} are missing or damaged")
    for name in (*FILES, "config.json", "best.json"):
        path = os.path.join(run_dir, name)
        for partial in glob.glob(glob.escape(path) + ".tmp*"):
            if re.fullmatch(r"\.tmp(-\d+)?", partial[len(path) :]) and os.path.isfile(partial):
                os.remove(partial)
    return lost


def note_failures(run_dir, step):
    """From now on, record an event `failed` with the error if this process ends by one; step() is the step
    that the run has reached."""
    former = sys.excepthook

    def note(what):
        if last(run_dir, EVENTS).get("event") not in ("interrupt", "finish"):  # what follows costs nothing
            event(run_dir, "failed", step=step(), what=" ".join(what.split()))

    def hook(kind, error, trace):
        former(kind, error, trace)
        note(f"{kind.__name__}: {error}")

    sys.excepthook = hook
    cli.on_fail.append(note)


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
    """Return the command that resumes a run with the settings of its config.json, quoted for the shell; it
    works without an active virtual environment. Of several nodes it leaves out how they meet: "..."."""
    python = [sys.executable.removeprefix(os.getcwd() + os.sep)]
    if WORLD > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
        python += ["-m", "torch.distributed.run", f"--nproc_per_node={here}"]
        python += ["..."] if here < WORLD else []
    script = os.path.join(os.path.dirname(sys.argv[0]), "train.py")
    return command_line([*python, script, f"--resume={run_dir}"])


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
