"""
Checkpoints: written beside their place, flushed, renamed; verified before they are used; pruned only behind
newer ones.

runs/<run_id>/checkpoints/step_000500/
    checkpoint.pt    format, step, tokens, config, tokenizer, model: all that using the model needs
    trainer.pt       optimizer, best, counters: all that resuming needs besides
    manifest.json    bytes and sha256 of each file, written last: without it the folder is no checkpoint

A checkpoint is usable when checkpoint.pt agrees with the manifest, resumable when trainer.pt does too.
torch.load itself notices a truncated file but not a flipped bit, which would load as one wrong weight: hence
the sums.
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
from types import SimpleNamespace

import torch

import config
from nanobit.cli import fail
from nanobit.files import set_aside, sync_folder, write_json
from nanobit.run_dir import has_manifest, step_dir, step_folders, steps
from nanobit.terminal import printable
from nanobit.tokenizer import bos_of

FORMAT = 2  # 1: one optimizer in trainer.pt, no scaler; its weights are read, it is not resumed
MODEL, TRAINER = "checkpoint.pt", "trainer.pt"


class HashedFile:
    """what torch.save writes into: counts and hashes the bytes on their way to the disk"""

    def __init__(self, path):
        self.file, self.sha, self.bytes = open(path, "wb"), hashlib.sha256(), 0

    def write(self, data):
        self.sha.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save(run_dir, step, model_part, trainer_part):
    """write both parts (dicts of tensors and plain values) as the checkpoint of `step`; returns its folder.

    On any failure (OSError, or RuntimeError from inside torch.save) the partial is removed, and what was
    there stays.
    """
    final = step_dir(run_dir, step)
    partial = f"{final}.tmp-{os.getpid()}"
    try:
        os.makedirs(partial)
        manifest = {"format": FORMAT, "step": step, "files": {}}
        for name, part in ((MODEL, model_part), (TRAINER, trainer_part)):
            out = HashedFile(os.path.join(partial, name))
            with out.file:
                torch.save(part, out)
                out.file.flush()
                os.fsync(out.file.fileno())
            manifest["files"][name] = {"bytes": out.bytes, "sha256": out.sha.hexdigest()}
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


@contextlib.contextmanager
def reading():
    """Exit with 1 if a file cannot be read now: to take an older checkpoint would lose what was trained."""
    try:
        yield
    except OSError as error:
        fail(
            f"{error.filename} cannot be read now ({error.strerror}); repair that and run the same command "
            "again, or name the folder of another checkpoint",
            code=1,
        )


def newest(run_dir, resumable):
    """(folder or None, [(step, fault)] of the newer ones skipped): the newest checkpoint that verifies.
    Raises OSError if a newer one cannot be read now: it may be whole."""
    passed = []
    for step in step_folders(run_dir):
        folder = step_dir(run_dir, step)
        wrong = fault(folder, MODEL) or (resumable and fault(folder, TRAINER)) or None
        if not wrong:
            return folder, passed
        passed.append((step, wrong))
    return None, passed


def best_step(run_dir):
    """Return the step of the best evaluation of a run by its best.json, or None if there is none, or no
    checkpoint of it. Raises OSError if that cannot be read."""
    try:
        with open(os.path.join(run_dir, "best.json"), encoding="utf-8") as file:
            step = json.load(file)["step"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and has_manifest(run_dir, step) else None


def locate(path, resumable=False, setting="ckpt", also=""):
    """the verified step folder that a run folder, RUN/best, a step folder or checkpoint.pt stands for. Exits
    with 2 where there is none, naming what `also` could be given; says on stderr which newer ones of a run
    were skipped."""
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
    kind = "resumable" if resumable else "usable"
    if os.path.isfile(path) and os.path.basename(path) != MODEL:
        fail(f"{setting} = {path!r} is no checkpoint; {wanted}")
    folder = os.path.dirname(path) or "." if os.path.isfile(path) else path
    if os.path.isdir(os.path.join(folder, "checkpoints")):
        with reading():
            folder, passed = newest(folder, resumable)
        for step, wrong in passed:
            print(f"skipped step {step}: {wrong}", file=sys.stderr)
        if folder is None:
            if passed:
                fail(f"{setting} = {path!r}: none of its {len(passed)} checkpoints is {kind}, see above")
            how = "if its training has ended, start it again: it ended before its first save"
            fail(f"{setting} = {path!r} has no checkpoint yet; {how}")
        return folder
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        lacks = "has no manifest.json, without which its files cannot be trusted"
        fail(f"{setting} = {path!r} is no checkpoint: {folder} {lacks}; {wanted}")
    if resumable and not os.path.exists(os.path.join(folder, TRAINER)):
        fail(
            f"{setting} = {path!r} has no {TRAINER} any more (keep_last); --init_from= takes its weights only"
        )
    with reading():
        wrong = fault(folder, MODEL) or (resumable and fault(folder, TRAINER)) or None
    if wrong:
        fail(f"{setting} = {path!r} is no {kind} checkpoint: {wrong}")
    return folder


def kept_bytes(cfg, params, steps):
    """disk that the checkpoints of so many steps take: the weights are kept of all; what resumes a run of the
    newest, and of four more: two at the boundary, the best, the end"""
    saves = steps // cfg.save_every if cfg.save_every else 0
    resumable = min(saves, cfg.keep_last or saves) + 4
    return 4 * params * (saves + 4) + 8 * params * resumable  # fp32, and AdamW holds two numbers for each


def check_disk(cfg, run_dir, params, steps_left):
    """exit with 2 where the disk has no room for two checkpoints; print where it has none for all that will
    be kept"""
    free, two = shutil.disk_usage(run_dir).free, 2.2 * 12 * params
    if free < two:
        fail(
            f"out_dir = {cfg.out_dir!r}: {free / 1e9:.2f} GB are free, two checkpoints of this model need "
            f"{two / 1e9:.2f} GB; free some, or choose another with --out_dir="
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
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file that is damaged or hostile can make it raise whatever there is
        what = printable(f"{type(error).__name__}: {' '.join(str(error).split())}")[:200]
        if isinstance(error, MemoryError) or re.search("allocate memory|not enough memory", what):
            fail(f"{path} cannot be loaded ({what}); the memory does not suffice: free some", code=1)
        if isinstance(error, pickle.UnpicklingError):  # its text advises to run the code in the file
            what = type(error).__name__
        holds = "it is damaged, or holds more than tensors and plain values, none of which was run"
        fail(f"{path} cannot be loaded ({what}): {holds}; use another step folder")
    try:
        number = found["format"]
        if number > FORMAT or (name == TRAINER and number != FORMAT):
            fail(f"{path} has checkpoint format {number}, this version reads {FORMAT}")
        check_model(found) if name == MODEL else check_trainer(found)
    except ValueError as error:
        fail(f"{path}: {printable(error)}; use another step folder, or RUN/best")
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {printable(error)}); use another step folder")
    return found


def check_model(part):
    """Give the config of a checkpoint.pt the settings that an older one lacks. Raises an error unless the
    part holds what its users rely on, and sizes of which a model can be made on the device "meta", to compare
    the shapes."""
    defaults, weights, spec = config.assignments(config.DEFAULT), part["model"], part["tokenizer"]
    part["config"] = defaults | config.with_ratios(part["config"])
    cfg = SimpleNamespace(**part["config"])
    for key, default in defaults.items():
        config.coerce(key, getattr(cfg, key), type(default))
    for key, value, least, most in (
        ("n_layer", cfg.n_layer, 1, len(weights)),
        ("n_head", cfg.n_head, 1, cfg.n_embd),
        ("n_kv_head", cfg.n_kv_head, 1, cfg.n_head),
        ("n_expert_active", cfg.n_expert_active if cfg.n_expert else 1, 1, cfg.n_expert or 1),
        ("vocab_multiple", cfg.vocab_multiple, 1, 2**20),
        ("seq_len", cfg.seq_len, 1, 2**20),
        ("vocab_size", cfg.vocab_size, 1, 2**31),
        ("eot", spec["eot"], 0, cfg.vocab_size - 1),
        ("bos", bos_of(spec), 0, cfg.vocab_size - 1),
    ):
        if not least <= value <= most:
            raise ValueError(f"{key} = {value}, expected {least} to {most:,}")
    if cfg.n_embd % (2 * cfg.n_head) or cfg.n_head % cfg.n_kv_head:
        raise ValueError(f"n_embd = {cfg.n_embd}, n_head = {cfg.n_head}, n_kv_head = {cfg.n_kv_head}")
    if not (0 <= cfg.dropout < 1 and cfg.norm_eps >= 0 and cfg.rope_theta > 0):
        raise ValueError(f"dropout = {cfg.dropout}, norm_eps = {cfg.norm_eps}, rope_theta = {cfg.rope_theta}")
    if type(part["step"]) is not int or type(spec["kind"]) is not str or type(spec["sha256"]) is not str:
        raise ValueError(f"step = {part['step']!r}, tokenizer {spec['kind']!r} {spec['sha256']!r}")
    for name, w in weights.items():
        is_stored = w.device.type == "cpu" and w.untyped_storage().nbytes() >= w.nbytes
        if not (w.is_floating_point() and is_stored):
            raise ValueError(f"{name} is {w.dtype} on {w.device}, expected floats with a place in the file")
    check_finite(weights)


def check_shapes(path, weights, needed, remedy="use another step folder, or the model.py of that run"):
    """Exit with 2 unless the tensors of a model have the names and shapes of `needed`, a state dict."""
    for name in sorted(weights.keys() | needed.keys()):
        has, asked = (tuple(found[name].shape) if name in found else "none" for found in (weights, needed))
        if has != asked:
            shapes = f"shape {has} in the file, {asked} by its settings and model.py"
            fail(f"{path}: {printable(name)}: {shapes}; {remedy}")


def check_trainer(part):
    """Raise an error unless a trainer.pt holds what resume relies on."""
    for key, kind in dict(step=int, data=dict, optimizer=list, best=dict, stale_evals=int).items():
        if type(part[key]) is not kind:
            raise ValueError(f"{key} is {type(part[key]).__name__}, expected {kind.__name__}")
    for state in part["optimizer"]:
        state["state"].items(), state["param_groups"]


def check_finite(weights):
    """Raise ValueError if a weight is NaN or infinite."""
    for name, w in weights.items():
        if not w.sum().isfinite() and not w.isfinite().all():  # a sum takes a tenth of the time
            raise ValueError(f"{name} holds NaN or infinity: the run has diverged")


def remove(folder):
    """Delete a checkpoint under the name of a temporary, which a kill may leave half deleted."""
    partial = f"{folder}.tmp-{os.getpid()}"
    try:
        os.rename(folder, partial)
        shutil.rmtree(partial)
    except OSError as error:
        print(f"warning: {folder} was not removed: {error.strerror}", file=sys.stderr)


def prune(run_dir, keep_last, keep_steps):
    """delete trainer.pt beyond the newest keep_last (0 = all) resumable checkpoints, but of none in
    keep_steps"""
    try:
        held = [s for s in steps(run_dir) if os.path.exists(os.path.join(step_dir(run_dir, s), TRAINER))]
        for step in held[keep_last:] if keep_last else []:
            if step not in keep_steps and not os.path.islink(step_dir(run_dir, step)):
                os.remove(os.path.join(step_dir(run_dir, step), TRAINER))
    except OSError as error:
        print(f"warning: older checkpoints were not pruned: {error.strerror}", file=sys.stderr)


def clean(run_dir, after):
    """Make room for a run that continues from step `after`, and print what is renamed.

    Deleted are only the temporaries of killed processes. Checkpoints of later steps, which belong to another
    course of the run, and step folders without a manifest are renamed. Other folders stay as they are.
    """
    folder = os.path.join(run_dir, "checkpoints")
    for name in os.listdir(folder):
        if re.fullmatch(r"step_\d{6,}\.tmp-\d+", name):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for step in step_folders(run_dir):
        if step > after or not has_manifest(run_dir, step):
            why = "is later than the step this run continues from"
            if not has_manifest(run_dir, step):
                why = "has no manifest.json"
            path = step_dir(run_dir, step)
            print(f"renamed: {path}, which {why}, to {os.path.basename(set_aside(path))}")
