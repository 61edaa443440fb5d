"""What a checkpoint holds, and how it is written: beside its place, flushed, renamed, older ones pruned."""

import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass, field

import torch

import config
from nanobit import data, distributed, record
from nanobit.cli import fail
from nanobit.files import set_aside, sync_folder, write_json
from nanobit.run_dir import FORMAT, MODEL, TRAINER, has_manifest, step_dir, step_folders, steps


@dataclass
class State:
    """What training changes besides weights, optimizers and scaler; trainer.pt holds it."""

    step: int = 0  # updates, skipped ones included
    best: dict = field(default_factory=dict)  # step and val_loss of the best evaluation
    stale_evals: int = 0  # evaluations since the best one
    skipped: int = 0  # steps whose loss or gradient was not finite
    skips_reported: int = 0  # those of them that the log has reported
    # what the routers did since the last log line: a sum, over so many micro-steps of all ranks
    routers: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    n_router_samples: int = 0
    counts: dict = field(default_factory=dict)  # lines in each file of the record


def contents(cfg, state, skipped, tokenizer_spec, meta, model, optimizers, scaler):
    """Return the contents of checkpoint.pt and trainer.pt, which resume.restore reads; every rank must ask.
    skipped: the number of skipped steps until now."""
    tensors = distributed.gather(model.state_dict())
    if cfg.tie_embeddings:  # gathered from shards they would be two
        tensors["head.weight"] = tensors["embed.weight"]
    both = dict(format=FORMAT, step=state.step)
    tokens = state.step * cfg.total_batch_size
    settings = config.settings_of(cfg)
    model_part = both | dict(tokens=tokens, config=settings, tokenizer=tokenizer_spec, model=tensors)
    optimizer_states = [distributed.gather(optimizer.state_dict()) for optimizer in optimizers]
    trainer_part = both | dict(data=data.digest(meta), optimizer=optimizer_states, scaler=scaler.state_dict())
    trainer_part["skipped"] = [skipped, state.skips_reported]
    trainer_part |= dict(best=state.best, stale_evals=state.stale_evals, counts=state.counts)
    if cfg.n_expert:
        trainer_part["routers"] = [distributed.total(state.routers.clone()), state.n_router_samples]
    return model_part, trainer_part


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


def remove(folder):
    """Delete a checkpoint under the name of a temporary, which a kill may leave half deleted."""
    partial = f"{folder}.tmp-{os.getpid()}"
    try:
        os.rename(folder, partial)
        shutil.rmtree(partial)
    except OSError as error:
        print(f"warning: {folder} was not removed: {error.strerror}", file=sys.stderr)


def remove_former_best(run_dir, step):
    """Delete the checkpoint of a beaten best evaluation, if that was the only reason to save it."""
    saved = record.last(run_dir, record.EVENTS, "why", event="save", step=step)
    if saved.get("why") == "best":
        remove(step_dir(run_dir, step))


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


def remove_partials(run_dir):
    """Delete the temporaries of processes that were killed while they saved."""
    folder = os.path.join(run_dir, "checkpoints")
    for name in os.listdir(folder):
        if re.fullmatch(r"step_\d{6,}\.tmp-\d+", name):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def rename_later(run_dir, after):
    """Make room for a run that continues from step `after`, and print what is renamed.

    Checkpoints of later steps, which belong to another course of the run, and step folders without a manifest
    are renamed. Nothing is deleted."""
    for step in step_folders(run_dir):
        if step > after or not has_manifest(run_dir, step):
            is_later = has_manifest(run_dir, step)
            reason = "is later than the step this run continues from" if is_later else "has no manifest.json"
            path = step_dir(run_dir, step)
            print(f"renamed: {path}, which {reason}, to {os.path.basename(set_aside(path))}")
