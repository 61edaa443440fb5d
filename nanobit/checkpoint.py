"""The reader of checkpoints: it finds them, verifies them against their manifest, and loads them.

A checkpoint is usable if checkpoint.pt agrees with the manifest, resumable if trainer.pt does too. torch.load
itself notices a truncated file, but not a flipped bit, which would load as one wrong weight."""

import contextlib
import json
import os
import pickle
import re
import sys
import warnings

import torch

from nanobit.cli import fail
from nanobit.files import sha256
from nanobit.parts import check_model, check_trainer
from nanobit.run_dir import FORMAT, MODEL, TRAINER, has_manifest, reading, step_dir, step_folders
from nanobit.terminal import printable


def fault(folder, name):
    """Return what is wrong with one file of a checkpoint, or None: it agrees with the manifest. Raises
    OSError if it exists and cannot be read now: then nothing is known about it."""
    path = os.path.join(folder, name)
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            want = json.load(file)["files"][name]
        if os.path.getsize(path) != want["bytes"]:
            return f"{name} has {os.path.getsize(path):,} bytes, the manifest says {want['bytes']:,}"
        if sha256(path) != want["sha256"]:
            return f"{name} does not have the sha256 of the manifest: its content changed on disk"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"manifest.json is damaged ({type(error).__name__}), {name} cannot be checked"
    return None


def checkpoint_fault(folder, resumable):
    """Return what is wrong with the files that using, or resuming, a checkpoint needs, or None."""
    return fault(folder, MODEL) or (fault(folder, TRAINER) if resumable else None)


def newest(run_dir, resumable):
    """Return (folder or None, [(step, fault)] of newer ones that were skipped): the newest checkpoint that
    verifies. Raises OSError if a newer one cannot be read now: it may be whole."""
    skipped = []
    for step in step_folders(run_dir):
        folder = step_dir(run_dir, step)
        problem = checkpoint_fault(folder, resumable)
        if not problem:
            return folder, skipped
        skipped.append((step, problem))
    return None, skipped


def best_step(run_dir):
    """Return the step that best.json names, or None without a checkpoint of it. Raises OSError."""
    try:
        with open(os.path.join(run_dir, "best.json"), encoding="utf-8") as file:
            step = json.load(file)["step"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and has_manifest(run_dir, step) else None


def locate(path, resumable=False, setting="ckpt", also=""):
    """Return the verified step folder that a run folder, RUN/best, a step folder or checkpoint.pt stands for.
    Exits with 2 if there is none, naming what `also` could be given; prints which newer ones were skipped."""
    wanted = f"give a run folder, RUN/best, a step folder or its checkpoint.pt{also}"
    run_dir, name = os.path.split(os.path.normpath(path))
    if name == "best" and not os.path.exists(path) and os.path.isdir(run_dir):
        with reading():
            step = best_step(run_dir)
        if step is None:
            no_best = f"{run_dir} has no best.json that names a checkpoint (eval_every = 0 writes none)"
            fail(f"{setting} = {path!r}: {no_best}; {wanted}")
        path = step_dir(run_dir, step)
    if not os.path.exists(path):
        fail(f"{setting} = {path!r} does not exist; {wanted}")
    needs = "can be resumed" if resumable else "can be used"
    folder = path
    if os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        if os.path.basename(path) != MODEL:
            fail(f"{setting} = {path!r} is not a checkpoint; {wanted}")
    if os.path.isdir(os.path.join(folder, "checkpoints")):
        with reading():
            folder, skipped = newest(folder, resumable)
        for step, problem in skipped:
            print(f"skipped step {step}: {problem}", file=sys.stderr)
        if not folder and skipped:
            fail(f"{setting} = {path!r}: none of its {len(skipped)} checkpoints {needs}, see above")
        if not folder:
            remedy = "if its training has ended, start it again: it ended before its first save"
            fail(f"{setting} = {path!r} has no checkpoint yet; {remedy}")
        return folder
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        problem = "has no manifest.json, without which its files cannot be trusted"
        fail(f"{setting} = {path!r} is not a checkpoint: {folder} {problem}; {wanted}")
    if resumable and not os.path.exists(os.path.join(folder, TRAINER)):
        fail(
            f"{setting} = {path!r} has no {TRAINER} any more (keep_last); --init_from= takes its weights only"
        )
    with reading():
        problem = checkpoint_fault(folder, resumable)
    if problem:
        fail(f"{setting} = {path!r} is not a checkpoint that {needs}: {problem}")
    return folder


def load(folder, name=MODEL, mmap=False):
    """Return one file of a verified checkpoint, on the CPU; with mmap its tensors are read when they are
    used, and the processes of a machine share them. Exits with 2 if it does not hold what it should, whoever
    wrote it, and with 1 if the memory does not suffice; no code in it is run."""
    path = os.path.join(folder, name)
    try:
        with reading(), warnings.catch_warnings(action="ignore"):
            part = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file that is damaged or hostile can make it raise any error
        problem = printable(f"{type(error).__name__}: {' '.join(str(error).split())}")[:200]
        if isinstance(error, MemoryError) or re.search("allocate memory|not enough memory", problem):
            fail(f"{path} cannot be loaded ({problem}); the memory does not suffice: free some", code=1)
        if isinstance(error, pickle.UnpicklingError):  # its text advises to run the code in the file
            problem = type(error).__name__
        reason = "it is damaged, or holds more than tensors and plain values, none of which was run"
        fail(f"{path} cannot be loaded ({problem}): {reason}; use another step folder")
    with checking(path):
        number = part["format"]
        if number > FORMAT or (name == TRAINER and number != FORMAT):
            fail(f"{path} has checkpoint format {number}, this version reads {FORMAT}")
        check = {MODEL: check_model, TRAINER: check_trainer}[name]
        check(part)
    return part


@contextlib.contextmanager
def checking(path):
    """Exit with 2 and one line if a check of what this file holds raises an error."""
    try:
        yield
    except ValueError as error:
        fail(f"{path}: {printable(error)}; use another step folder, or RUN/best")
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {printable(error)}); use another step folder")
