"""How a run continues: the checkpoint it continues from, what must agree with it, the state it gives back."""

import math
import os
from types import SimpleNamespace

import config
from nanobit import checkpoint, data, distributed, schedule
from nanobit import run_dir as record
from nanobit.cli import fail
from nanobit.files import set_aside
from nanobit.tokenizer import bos_of

SHAPE = (
    "n_layer n_head n_kv_head n_embd ffn_dim n_expert n_expert_active vocab_size vocab_multiple "
    "rope_theta norm_eps tie_embeddings"
).split()
VALIDATION = ("tokenize_on_fly", "eval_tokens")  # what says on which windows a loss was measured
# what a resumed run must share with its origin
RUN = SHAPE + "ternary optimizer dataset seed seq_len total_batch_size".split()


def newest_resumable(run_dir):
    """Return (step folder or None, [(step, fault)] of newer ones), what resume = 'auto' continues from. A run
    of which nothing is whole is renamed, to start over.

    Exits with 1, and the choices, if a checkpoint cannot be read now, if weights are whole but nothing can be
    resumed, or if there are weights that no manifest verifies: an unattended restart must not throw away what
    was trained.
    """
    with checkpoint.reading():
        folder, passed = checkpoint.newest(run_dir, resumable=True)
        usable = checkpoint.newest(run_dir, resumable=False)[0] if passed and not folder else None
    for step, wrong in passed:
        print(f"resume: skipped step {step}: {wrong}")
    if usable:
        fail(
            f"{run_dir} has no checkpoint to resume from, see above, but the weights of {usable} are whole; "
            f"--init_from={usable} with another --run_id= starts a new run from them; to start this run "
            f"over, rename or delete {run_dir}",
            code=1,
        )
    held = [checkpoint.step_dir(run_dir, step) for step, _ in passed if not folder]
    unverified = [path for path in held if os.path.exists(os.path.join(path, checkpoint.MODEL))]
    unverified = [path for path in unverified if not os.path.exists(os.path.join(path, "manifest.json"))]
    if unverified:
        fail(
            f"{run_dir} has no checkpoint to resume from, see above; {unverified[0]} holds weights, but no "
            f"manifest.json that verifies them: restore it from a copy; to start this run over, rename or "
            f"delete {run_dir}",
            code=1,
        )
    if passed and not folder:
        record.lock.release()  # Windows does not rename a folder with an open file
        print(f"resume: no checkpoint is whole, starting over; the old run is now {set_aside(run_dir)}")
        record.open_run(run_dir)
    return folder, passed


def origin(cfg, run_dir):
    """Return (step folder that a run continues from or None, whether it is this run's own, what was skipped),
    by cfg.resume; the run's folder is locked from now on. Exits with 2 where it already holds a run that this
    one would overwrite."""
    record.open_run(run_dir)  # before anything is chosen from it: its former process may still be saving
    if cfg.resume == "auto":
        folder, passed = newest_resumable(run_dir)
        return folder, True, passed
    folder = checkpoint.locate(cfg.resume, resumable=True, setting="resume") if cfg.resume else None
    own = os.path.realpath(os.path.join(run_dir, "checkpoints"))
    same_run = bool(folder) and os.path.dirname(os.path.realpath(folder)) == own
    with checkpoint.reading():
        held = [] if same_run else checkpoint.step_folders(run_dir)
    if held:
        fail(
            f"run_id = {cfg.run_id!r}: {run_dir} already holds a run, up to step {held[0]}; "
            "continue with --resume=auto, or choose another --run_id="
        )
    return folder, same_run, []


def keep_rates(cfg, saved):
    """Give cfg the rates of the checkpoint it resumes, to the last bit, if its ratios are the same but for
    rounding. schedule.final_rates looks for such a number under the name that the setting had before it was a
    ratio. saved: the checkpoint's settings."""
    if cfg.learning_rate != saved["learning_rate"]:
        return
    for former, ratio in config.RATIOS.items():
        rate = saved.get(former, saved["learning_rate"] * saved[ratio])
        product = cfg.learning_rate * getattr(cfg, ratio)
        if product != rate and (math.isclose(product, rate) or not cfg.learning_rate):
            setattr(cfg, former, rate)


def must_agree(cfg, part, tokenizer, names, what, how=""):
    """Exit with 2 if a setting among names, or the tokenizer, is not the checkpoint's; `how` ends the lines.
    Print what else changed, and return it as {setting: its value in the checkpoint}."""
    saved = part["config"]
    differs = {key: saved[key] for key in saved if key in vars(cfg) and getattr(cfg, key) != saved[key]}
    for key in differs.keys() & set(config.RATIOS.values()):
        if math.isclose(getattr(cfg, key), saved[key]):  # one of them may be a quotient of two rates
            del differs[key]
    lines = {
        key: f"{key} = {getattr(cfg, key)!r}, the checkpoint has {old!r}" for key, old in differs.items()
    }
    faults = [lines[key] for key in names if key in lines]
    if part["tokenizer"] is None:
        print(f"{what}: its tokenizer cannot be compared with that of dataset = {cfg.dataset!r}")
    elif part["tokenizer"]["sha256"] != tokenizer["sha256"]:
        faults.append(f"the tokenizer of dataset = {cfg.dataset!r} is not the checkpoint's")
    elif (bos := bos_of(tokenizer)) != (saved_bos := bos_of(part["tokenizer"])):
        print(
            f"warning: {what}: its texts begin with token {saved_bos}, those of dataset = {cfg.dataset!r} "
            f"with {bos}, which costs loss; prepared with --tokenizer=FOLDER of the model they begin alike"
        )
    if faults:
        fail(*(f"{what}: {text}; these must agree{how}" for text in faults))
    changed = sorted(lines.keys() - {"run_id", "out_dir", "resume", "init_from", "verify_data"})
    for key in changed:
        print(f"changed: {lines[key]}")
    return {key: saved[key] for key in changed}


def restore(cfg, folder, run_dir, is_own, tokenizer, tokens, model, optimizers, scaler):
    """give the state of a verified checkpoint back to model, optimizers and scaler; returns the rest of its
    trainer.pt, the settings that changed, and, by those it was saved with, the patience, the stage and the
    next learning rate. is_own: whether it is this run's; tokens: data.digest. Exits with 2 where it is of
    another run, or beyond the end of this one."""
    on_disk = next(model.parameters()).device.type != "cpu"  # until it goes to the device
    part = checkpoint.load(folder, mmap=on_disk)
    trainer = checkpoint.load(folder, checkpoint.TRAINER, mmap=on_disk)
    if part["step"] != trainer["step"]:
        steps = f"checkpoint.pt is of step {part['step']}, trainer.pt of step {trainer['step']}"
        fail(f"{folder}: {steps}, so it cannot be resumed; use another step folder")
    if trainer["step"] > cfg.max_steps:
        fail(f"max_steps = {cfg.max_steps} is less than the {trainer['step']} steps of {folder}; raise it")
    keep_rates(cfg, part["config"])
    how = "; --init_from= takes the weights alone"
    changed = must_agree(cfg, part, tokenizer, RUN, f"resume from {folder}", how)
    if not data.same_tokens(trainer["data"], tokens):
        fail(f"dataset = {cfg.dataset!r}: its tokens are not those of {folder}, this would be another run")
    checkpoint.check_shapes(folder, part["model"], model.state_dict())
    distributed.load(model, optimizers, part["model"], trainer.pop("optimizer"))
    if trainer["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(trainer["scaler"])
    # a branch has its own best, and so have other validation windows
    same_eval = is_own and all(getattr(cfg, name) == part["config"][name] for name in VALIDATION)
    if not distributed.share(same_eval and trainer["best"].get("step") in checkpoint.steps(run_dir)):
        trainer |= dict(best={}, stale_evals=0)
    former = SimpleNamespace(**part["config"])
    stage, lr = schedule.stage(former, trainer["step"] - 1), schedule.lr(former, trainer["step"])
    return trainer | dict(patience=former.patience, stage=stage, lr=lr, changed=changed)
