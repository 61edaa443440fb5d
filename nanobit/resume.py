"""How a run continues: the checkpoint it continues from, what must agree with it, the state it gives back."""

import math
import os
import re
from types import SimpleNamespace

import torch

import config
from nanobit import checkpoint, data, distributed, parts, record, schedule, weights
from nanobit.cli import fail
from nanobit.run_dir import MODEL, TRAINER, Origin, has_manifest, reading, step_dir, steps
from nanobit.saving import State
from nanobit.tokenizer import bos_of

WEIGHT_SHAPE = [name for name in config.SHAPE if name != "seq_len"]
# what a resumed run must share with its origin
RUN = config.SHAPE + "ternary optimizer dataset seed total_batch_size".split()


def newest_resumable(run):
    """Return the Origin that resume = 'auto' continues from. A run without any whole file is renamed, to
    start over. If weights could be saved by hand, exit with 1 and the choices: an unattended restart must not
    throw away what was trained."""
    usable = None
    with reading():
        folder, skipped = checkpoint.newest(run.path, resumable=True)
        if skipped and not folder:
            usable, _ = checkpoint.newest(run.path, resumable=False)
    for step, fault in skipped:
        print(f"resume: skipped step {step}: {fault}")
    if folder or not skipped:
        return Origin(folder, True, skipped)
    choices = f"to start this run over, rename or delete {run.path}"
    if usable:
        holds = f"the weights of {usable} are whole; --init_from={usable} with another --run_id= uses them"
        fail(f"{run.path} has no checkpoint to resume from, see above, but {holds}; {choices}", code=1)
    for step, _ in skipped:
        folder = step_dir(run.path, step)
        if os.path.exists(os.path.join(folder, MODEL)) and not has_manifest(run.path, step):
            holds = f"{folder} holds weights, but no manifest.json that verifies them: restore a copy of it"
            fail(f"{run.path} has no checkpoint to resume from, see above; {holds}; {choices}", code=1)
    print(f"resume: no intact checkpoint found, starting over; the old run is now {run.move_aside()}")
    return Origin(None, True, skipped)


def find(cfg, run):
    """Return the Origin that cfg.resume names."""
    if cfg.resume == "auto":
        return newest_resumable(run)
    folder = checkpoint.locate(cfg.resume, resumable=True, setting="resume")
    own_folders = os.path.realpath(os.path.join(run.path, "checkpoints"))
    return Origin(folder, is_own=os.path.dirname(os.path.realpath(folder)) == own_folders)


def keep_rates(cfg, saved):
    """Give cfg the rates of the checkpoint's settings, to the last bit, if its ratios are the same but for
    rounding: schedule.final_rates looks for them under the names that they had before they were ratios."""
    if cfg.learning_rate != saved["learning_rate"]:
        return
    for former, ratio in config.RATIOS.items():
        rate = saved.get(former, saved["learning_rate"] * saved[ratio])
        product = cfg.learning_rate * getattr(cfg, ratio)
        if product != rate and (math.isclose(product, rate) or not cfg.learning_rate):
            setattr(cfg, former, rate)


def differences(cfg, saved):
    """Return {setting: its value in a checkpoint's settings} of those that differ from cfg. Ratios may differ
    by rounding: one of them may be a quotient of two rates."""

    def agrees(key):
        value = getattr(cfg, key)
        return value == saved[key] or (key in config.RATIOS.values() and math.isclose(value, saved[key]))

    return {key: saved[key] for key in saved if key in vars(cfg) and not agrees(key)}


def must_agree(cfg, part, tokenizer, names, source, hint=""):
    """Exit with 2 if a setting among names, or the tokenizer, is not the checkpoint's; `hint` ends the
    lines of settings. Print what else changed, and return it as {setting: its value in the checkpoint}."""
    former = differences(cfg, part["config"])
    lines = {key: f"{key} = {getattr(cfg, key)!r}, the checkpoint has {former[key]!r}" for key in former}
    faults = [f"{lines[key]}; these must agree{hint}" for key in names if key in lines]
    if part["tokenizer"] is None:
        print(f"{source}: its tokenizer cannot be compared with that of dataset = {cfg.dataset!r}")
    elif part["tokenizer"]["sha256"] != tokenizer["sha256"]:
        remedy = "name one that was prepared with it in --dataset="
        faults.append(f"the tokenizer of dataset = {cfg.dataset!r} is not the checkpoint's; {remedy}")
    elif bos_of(tokenizer) != bos_of(part["tokenizer"]):
        print(
            f"warning: {source}: its texts begin with token {bos_of(part['tokenizer'])}, those of dataset = "
            f"{cfg.dataset!r} with {bos_of(tokenizer)}, which costs loss; prepare it with --tokenizer= and "
            "the folder of the model"
        )
    if faults:
        fail(*(f"{source}: {text}" for text in faults))
    changed = sorted(lines.keys() - {"run_id", "out_dir", "resume", "init_from", "verify_data"})
    for key in changed:
        print(f"changed: {lines[key]}")
    return {key: former[key] for key in changed}


def restore(cfg, origin, run, tokenizer, meta, model, optimizers, scaler):
    """Give the state of a verified checkpoint back to model, optimizers and scaler.

    Return (State, former): the changed settings, and by the checkpoint's settings the patience, the stage of
    the last update and the next learning rate. Exits with 2 if it is of another run, or beyond its end, and
    with 0 if it is the end of this run."""
    folder = origin.folder
    on_disk = next(model.parameters()).device.type != "cpu"  # until it goes to the device
    part = checkpoint.load(folder, mmap=on_disk)
    trainer = checkpoint.load(folder, TRAINER, mmap=on_disk)
    step = trainer["step"]
    in_name = re.findall(r"^step_(\d+)$", os.path.basename(os.path.abspath(folder)))
    if {part["step"], *map(int, in_name)} != {step}:
        problem = f"checkpoint.pt is of step {part['step']}, trainer.pt of step {step}"
        fail(f"{folder}: {problem}; these and the name of the folder must agree; use another step folder")
    if step > cfg.max_steps:
        fail(f"max_steps = {cfg.max_steps} is less than the {step} steps of {folder}; raise it")
    keep_rates(cfg, part["config"])
    hint = "; --init_from= takes the weights alone"
    if origin.is_own:
        hint = f"; --resume={run.path} alone takes the settings of the run{hint}"
    changed = must_agree(cfg, part, tokenizer, RUN, f"resume from {folder}", hint)
    parts.check_shapes(folder, part["model"], model.state_dict())
    skipped, reported = trainer["skipped"]
    state = State(step=step, skipped=skipped, skips_reported=reported, counts=trainer.get("counts"))
    with checkpoint.checking(os.path.join(folder, TRAINER)):
        if not data.same_tokens(trainer["data"], data.digest(meta)):
            fail(
                f"dataset = {cfg.dataset!r}: its tokens are not those of {folder}, this would be another run"
            )
        parts.check_states(optimizers, trainer["optimizer"], step)
        if trainer["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(trainer["scaler"])
        if cfg.n_expert:
            state.routers, state.n_router_samples = trainer["routers"]
            state.routers.expand(cfg.n_layer, 3 + cfg.n_expert)  # raises an error for another shape
    if not distributed.is_main:  # the sum is over all ranks
        state.routers = torch.zeros_like(state.routers)
    distributed.load(model, optimizers, part["model"], trainer["optimizer"])
    # a branch has its own best, and so have other validation windows
    same_eval = origin.is_own and all(
        getattr(cfg, name) == part["config"][name] for name in config.VALIDATION
    )
    if distributed.share(same_eval and trainer["best"].get("step") in steps(run.path)):
        state.best = trainer["best"]
        state.stale_evals = trainer["stale_evals"]
    saved = SimpleNamespace(**part["config"])
    reason = distributed.share(origin.is_own and run.finished(cfg, step, saved.patience))
    if reason:
        raising = "raise or switch off patience" if reason == "patience" else "raise max_steps"
        print(f"run {cfg.run_id} is finished: step {step}, ended by {reason}")
        print(f"to continue it, {raising}")
        record.print_result(record.last(run.path, record.EVENTS)["result"], cfg.json)
        distributed.stop()
        raise SystemExit(0)
    lr = schedule.lr(saved, step)
    return state, SimpleNamespace(changed=changed, stage=schedule.stage(saved, step - 1), lr=lr)


def take_weights(cfg, tokenizer, model):
    """Give the model the weights of cfg.init_from. Exits with 2 if they are not of its shape."""
    part = weights.initial(cfg.init_from)
    must_agree(cfg, part, tokenizer, WEIGHT_SHAPE, f"init_from {cfg.init_from}")
    parts.check_shapes(cfg.init_from, part["model"], model.state_dict())
    distributed.load(model, [], part["model"], [])
