"""
Checkpoints: written beside their place, flushed, renamed; verified before they are used; pruned only if there
are newer ones.

runs/<run_id>/checkpoints/step_000500/
    checkpoint.pt    format, step, tokens, config, tokenizer, model: all that using the model needs
    trainer.pt       optimizer, best, counters: all that resuming needs besides
    manifest.json    bytes and sha256 of each file, written last: without it the folder is not a checkpoint

A checkpoint is usable if checkpoint.pt agrees with the manifest, resumable if trainer.pt does too. torch.load
itself notices a truncated file, but not a flipped bit, which would load as one wrong weight.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import warnings

import torch

from nanobit import record
from nanobit.cli import fail
from nanobit.files import set_aside, sync_folder, write_json
from nanobit.parts import check_model, check_trainer
from nanobit.run_dir import has_manifest, step_dir, step_folders, steps
from nanobit.terminal import printable

FORMAT = 2  # 1: one optimizer in trainer.pt, no scaler; its weights are read, it is not resumed
MODEL = "checkpoint.pt"
TRAINER = "trainer.pt"


def save(run_dir, step, model_part, trainer_part):
    """Write both parts (dicts of tensors and plain values) as the checkpoint of `step`. Return its folder.

    On any failure (OSError, or RuntimeError from inside torch.save) the partial is removed; older files stay.
    """
    final = step_dir(run_dir, step)
    partial = f"{final}.tmp-{os.getpid()}"
    try:
        os.makedirs(partial)
        manifest = {"format": FORMAT, "step": step, "files": {}}
        for name, part in ((MODEL, model_part), (TRAINER, trainer_part)):
            with open(os.path.join(partial, name), "w+b") as file:
                torch.save(part, file)
                size = file.tell()
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            manifest["files"][name] = {"bytes": size, "sha256": sha256}
        write_json(os.path.join(partial, "manifest.json"), manifest)
        sync_folder(partial)
        if os.path.isdir(final):  # without a manifest, perhaps with good weights
            set_aside(final)
        os.rename(partial, final)
        sync_folder(os.path.dirname(final))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def try_save(cfg, run, step, contents, reason, keep_steps):
    """Save a checkpoint of the run and prune older ones. contents: those of checkpoint.pt and trainer.pt.
    Return whether it is on disk: a failure is logged, and leaves what was there."""
    try:
        record.flush(run.path)
        folder = save(run.path, step, *contents)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a failed write
        run.log(f"warning: step {step} was not saved ({error}); its partial is removed, earlier ones stay")
        run.event("anomaly", step=step, what="save failed", error=str(error))
        return False
    run.event("save", step=step, path=folder, why=reason)
    prune(run.path, cfg.keep_last, keep_steps)
    return True


def fault(folder, name):
    """Return what is wrong with one file of a checkpoint, or None: it agrees with the manifest. Raises
    OSError if it exists and cannot be read now: then nothing is known about it."""
    path = os.path.join(folder, name)
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            want = json.load(file)["files"][name]
        if os.path.getsize(path) != want["bytes"]:
            return f"{name} has {os.path.getsize(path):,} bytes, the manifest says {want['bytes']:,}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != want["sha256"]:
                return f"{name} does not have the sha256 of the manifest: its content changed on disk"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"manifest.json is damaged ({type(error).__name__}), {name} cannot be checked"
    return None


def checkpoint_fault(folder, resumable):
    """Return what is wrong with the files that using, or resuming, a checkpoint needs, or None."""
    return fault(folder, MODEL) or (fault(folder, TRAINER) if resumable else None)


@contextlib.contextmanager
def reading():
    """Exit with 1 if a file cannot be read now: using an older checkpoint would lose what was trained."""
    try:
        yield
    except OSError as error:
        fail(
            f"{error.filename} cannot be read now ({error.strerror}); repair that and run the same command "
            "again, or name the folder of another checkpoint",
            code=1,
        )


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
    """Return the step that best.json names, or None if there is none, or no checkpoint of it. Raises OSError
    if that cannot be read."""
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
    run_dir, name = os.path.split(path)
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


def kept_bytes(cfg, params, steps):
    """Return the bytes that the checkpoints of so many steps take: the weights of all, and what resumes a run
    of the newest and of four more (two at the boundary, the best, the end)."""
    saves = steps // cfg.save_every if cfg.save_every else 0
    resumable = min(saves, cfg.keep_last or saves) + 4
    return 4 * params * (saves + 4) + 8 * params * resumable  # fp32, and AdamW holds two numbers for each


def check_disk(cfg, run_dir, params, steps_left):
    """Exit with 2 if the disk has no room for two checkpoints; warn if it has none for all that are kept."""
    free = shutil.disk_usage(run_dir).free
    least = 2.2 * 12 * params
    if free < least:
        fail(
            f"out_dir = {cfg.out_dir!r}: {free / 1e9:.2f} GB are free, two checkpoints of this model need "
            f"{least / 1e9:.2f} GB; free some, or choose another folder with --out_dir="
        )
    need = kept_bytes(cfg, params, steps_left)
    if need > free:
        print(
            f"warning: the checkpoints of this run take about {need / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; raise save_every"
        )


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
    try:
        number = part["format"]
        if number > FORMAT or (name == TRAINER and number != FORMAT):
            fail(f"{path} has checkpoint format {number}, this version reads {FORMAT}")
        check = {MODEL: check_model, TRAINER: check_trainer}[name]
        check(part)
    except ValueError as error:
        fail(f"{path}: {printable(error)}; use another step folder, or RUN/best")
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {printable(error)}); use another step folder")
    return part


def remove(folder):
    """Delete a checkpoint under the name of a temporary, which a kill may leave half deleted."""
    partial = f"{folder}.tmp-{os.getpid()}"
    try:
        os.rename(folder, partial)
        shutil.rmtree(partial)
    except OSError as error:
        print(f"warning: {folder} was not removed: {error.strerror}", file=sys.stderr)


def prune(run_dir, keep_last, keep_steps):
    """Delete trainer.pt beyond the newest keep_last (0 = all) resumable checkpoints, except in keep_steps."""
    try:
        folders = {step: step_dir(run_dir, step) for step in steps(run_dir)}
        resumable = [s for s, folder in folders.items() if os.path.exists(os.path.join(folder, TRAINER))]
        for step in resumable[keep_last:]:
            if keep_last and step not in keep_steps and not os.path.islink(folders[step]):
                os.remove(os.path.join(folders[step], TRAINER))
    except OSError as error:
        print(f"warning: older checkpoints were not pruned: {error.strerror}", file=sys.stderr)


def clean(run_dir, after):
    """Make room for a run that continues from step `after`, and print what is renamed.

    Only the temporaries of killed processes are deleted. Checkpoints of later steps, which belong to another
    course of the run, and step folders without a manifest are renamed. Other folders stay as they are.
    """
    folder = os.path.join(run_dir, "checkpoints")
    for name in os.listdir(folder):
        if re.fullmatch(r"step_\d{6,}\.tmp-\d+", name):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for step in step_folders(run_dir):
        if step > after or not has_manifest(run_dir, step):
            is_later = has_manifest(run_dir, step)
            reason = "is later than the step this run continues from" if is_later else "has no manifest.json"
            path = step_dir(run_dir, step)
            print(f"renamed: {path}, which {reason}, to {os.path.basename(set_aside(path))}")
