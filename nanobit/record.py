"""The record of a run: lines of JSON in runs/<run_id>/metrics and samples, plain lines in train.log.

A line is appended whole. A run that resumes from step k drops what is made again, so that each training line
beyond k, and each evaluation, sample and best from k on, is there once, whatever was killed."""

import collections
import contextlib
import glob
import json
import math
import os
import re
import sys
import time

from nanobit import files
from nanobit.cli import RANK

SCALARS = os.path.join("metrics", "scalars.jsonl")
BITNET = os.path.join("metrics", "bitnet.jsonl")
ROUTER = os.path.join("metrics", "router.jsonl")
EVENTS = os.path.join("metrics", "events.jsonl")
SAMPLES = os.path.join("samples", "samples.jsonl")
FILES = (SCALARS, BITNET, ROUTER, EVENTS, SAMPLES, "train.log")
counts = collections.Counter()  # of the run that this process writes: {base name of a file: its lines}


def plain(value):
    """Return value as JSON can hold it: JSON has no NaN and no infinity, they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(fields):
    """Return one line of JSON, with floats to the last bit."""
    return json.dumps(plain(fields), allow_nan=False)


def print_result(result, as_json, summary=""):
    """Print the result of a command on stdout: one JSON line, or on a terminal, unless as_json, a summary."""
    if as_json or not sys.stdout.isatty():
        print(to_json(result))
    elif summary:
        print(summary)


def append_text(run_dir, text, name="train.log"):
    """Append one whole line to a file of the run, on rank 0 only. On a full disk the line is dropped with a
    warning: a line is not a reason to stop training."""
    if RANK:
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
    """Append a line of JSON to a file of the run."""
    append_text(run_dir, to_json(fields), name)


def event(run_dir, kind, **fields):
    """Append an event, with the time."""
    append(run_dir, EVENTS, event=kind, **fields, time=time.time())


def flush(run_dir):
    """Write the record to the disk itself, so that a checkpoint that survives a power cut has its lines. A
    file that cannot be flushed costs a warning, never a checkpoint."""
    for name in FILES:
        path = os.path.join(run_dir, name)
        try:
            if os.path.exists(path):
                with open(path, "ab") as file:  # Windows flushes only what it may write
                    os.fsync(file.fileno())
        except OSError as error:
            text = f"{path} cannot be flushed to the disk ({error.strerror})"
            files.warn_once(f"flush {name}", f"{text}; a power cut may cost its last lines")


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
    """Return the newest line of a JSONL file that has a key and these fields, or {}."""
    rows = (row for row in reversed(read(run_dir, name)) if has in row and fields.items() <= row.items())
    return next(rows, {})


def is_number(value):
    """Return whether value is a number with which the arithmetic of a reader cannot overflow."""
    return type(value) in (int, float) and abs(value) < 1e100  # which is false for NaN


# the type of the values that readers rely on, by their names in all files
NUMBERS = (
    "epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util "
    "val_loss val_perplexity loss_scale repetition steps signal time"
).split()
CHECKS = dict.fromkeys(NUMBERS, is_number)
CHECKS |= dict.fromkeys(("total", "result", "changed"), lambda value: type(value) is dict)
CHECKS |= dict.fromkeys("event what why mode prompt generated_text".split(), lambda value: type(value) is str)
NEEDED = {  # the keys without which a line has no meaning
    BITNET: ["total"],
    ROUTER: ["total"],
    EVENTS: ["event"],
    SAMPLES: ["mode", "prompt", "generated_text"],
}


def parsed(line, name):
    """Return the object in a line of the file `name`, or None if the line is damaged: it is not JSON, has no
    step, or lacks what its file needs. A value of another type than its name wants becomes None, unknown.

    This is the one place that checks, so that a reader may rely on what it gets."""
    if not line.isascii():  # to_json escapes what is not
        return None
    try:
        row = json.loads(line, parse_constant=lambda constant: None)  # NaN and infinity
    except (ValueError, RecursionError):
        return None
    if type(row) is not dict or type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
        return None
    for key in CHECKS.keys() & row.keys():
        if not CHECKS[key](row[key]):
            row[key] = None
    for key, value in (row.get("total") or {}).items():
        if not is_number(value):
            row["total"][key] = None
    if name == SCALARS:
        is_whole = "loss" in row or "val_loss" in row
    elif row.get("event") == "finish":
        is_whole = None not in (row.get("why"), row.get("result"))
    else:
        is_whole = None not in map(row.get, NEEDED.get(name, []))
    return row if is_whole else None


def is_kept(name, line, step):
    """Return whether a line stays if the run resumes from `step` (None: starts over); None: it is damaged."""
    if name == "train.log":
        # "step 100/2000 ..." is about an update, "eval 100/2000 ..." is made again
        number = re.match(r"(step|eval) (\d{1,15})/", line, re.ASCII)
        if not number:
            return step is not None
        line_step = int(number[2])
        is_made_again = number[1] == "eval"
    else:
        row = parsed(line, name)
        if row is None:
            return None
        if name == EVENTS:
            return True
        line_step = row["step"]
        is_made_again = name == SAMPLES or "val_loss" in row
    return step is not None and line_step < step + (not is_made_again)


def rewind(run_dir, step, counts_then=None):
    """Drop what a run that resumes from `step` (None: from the start) writes again, with damaged lines, and
    the temporary files of killed processes.

    counts_then: {base name of a file: number of its lines} at that step, from the checkpoint, as far as it
    has them. Return a sentence for each file that has lost lines of earlier steps."""
    counts_then = counts_then or {}
    lost = []
    for name in FILES:
        path = os.path.join(run_dir, name)
        base = os.path.basename(name)
        present = whole_lines(run_dir, name)
        fates = [is_kept(name, line, step) for line in present]
        kept = [line for line, fate in zip(present, fates) if fate]
        if os.path.exists(path):
            files.write_bytes(path, "".join(line + "\n" for line in kept).encode())
        counts[base] = len(kept)
        while fates and not fates[-1]:  # a damaged line behind the last kept one may be of a later step
            fates.pop()
        n_lost = max(fates.count(None), counts_then.get(base, 0) - len(kept))
        if step is not None and n_lost:
            of_all = f" of {max(n_lost, counts_then[base])}" if base in counts_then else ""
            lost.append(f"{name}: {n_lost}{of_all} lines before step {step} are missing or damaged")
    for name in (*FILES, "config.json", "best.json"):
        path = os.path.join(run_dir, name)
        for partial in glob.glob(glob.escape(path) + ".tmp*"):
            if re.fullmatch(r"\.tmp(-\d+)?", partial[len(path) :]) and os.path.isfile(partial):
                os.remove(partial)
    return lost
