"""How a run continues: the checkpoint it continues from, what must agree with it, the state it gives back."""

import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

import config
from nanobit import checkpoint, data, distributed, parts, record, schedule
from nanobit.cli import fail
from nanobit.run_dir import has_manifest, opening, step_dir, step_folders, steps
from nanobit.tokenizer import bos_of

SHAPE = (
    "n_layer n_head n_kv_head n_embd ffn_dim n_expert n_expert_active vocab_size vocab_multiple "
    "rope_theta norm_eps tie_embeddings"
).split()
VALIDATION = ("tokenize_on_fly", "eval_tokens")  # the settings that select the windows of an evaluation
# what a resumed run must share with its origin
RUN = SHAPE + "ternary optimizer dataset seed seq_len total_batch_size".split()


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


@dataclass
class Origin:
    """The checkpoint that a run continues from."""

    folder: str | None = None  # its step folder; None: the run starts
    is_own: bool = True  # it is this run's own, not another one's
    skipped: list = field(default_factory=list)  # (step, fault) of newer checkpoints


def newest_resumable(run):
    """Return the Origin that resume = 'auto' continues from. A run without any whole file is renamed, to
    start over. If weights could be saved by hand, exit with 1 and the choices: an unattended restart must not
    throw away what was trained."""
    usable = None
    with checkpoint.reading():
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
        if os.path.exists(os.path.join(folder, checkpoint.MODEL)) and not has_manifest(run.path, step):
            holds = f"{folder} holds weights, but no manifest.json that verifies them: restore a copy of it"
            fail(f"{run.path} has no checkpoint to resume from, see above; {holds}; {choices}", code=1)
    print(f"resume: no intact checkpoint found, starting over; the old run is now {run.move_aside()}")
    return Origin(None, True, skipped)


def find(cfg, run):
    """Return the Origin of a run by cfg.resume, and lock its folder from now on. Exits with 2 if the folder
    holds a run that this one would overwrite."""
    run.open()  # before anything is chosen from it: its former process may still be saving
    if cfg.resume == "auto":
        return newest_resumable(run)
    origin = Origin(None, False)
    if cfg.resume:
        origin.folder = checkpoint.locate(cfg.resume, resumable=True, setting="resume")
        own_folders = os.path.realpath(os.path.join(run.path, "checkpoints"))
        origin.is_own = os.path.dirname(os.path.realpath(origin.folder)) == own_folders
    if origin.is_own:
        return origin
    with checkpoint.reading():
        present = step_folders(run.path)
    if present:
        fail(
            f"run_id = {cfg.run_id!r}: {run.path} already holds a run, up to step {present[0]}; "
            "continue with --resume=auto, or choose another --run_id="
        )
    return origin


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


def must_agree(cfg, part, tokenizer, names, source, hint=""):
    """Exit with 2 if a setting among names, or the tokenizer, is not the checkpoint's; `hint` ends the lines.
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
        print(f"{source}: its tokenizer cannot be compared with that of dataset = {cfg.dataset!r}")
    elif part["tokenizer"]["sha256"] != tokenizer["sha256"]:
        faults.append(f"the tokenizer of dataset = {cfg.dataset!r} is not the checkpoint's")
    elif bos_of(tokenizer) != bos_of(part["tokenizer"]):
        print(
            f"warning: {source}: its texts begin with token {bos_of(part['tokenizer'])}, those of dataset = "
            f"{cfg.dataset!r} with {bos_of(tokenizer)}, which costs loss; prepare it with --tokenizer= and "
            "the folder of the model"
        )
    if faults:
        fail(*(f"{source}: {text}; these must agree{hint}" for text in faults))
    changed = sorted(lines.keys() - {"run_id", "out_dir", "resume", "init_from", "verify_data"})
    for key in changed:
        print(f"changed: {lines[key]}")
    return {key: saved[key] for key in changed}


def restore(cfg, origin, run, tokenizer, tokens, model, optimizers, scaler):
    """Give the state of a verified checkpoint back to model, optimizers and scaler. tokens: data.digest.

    Return (State, former): the changed settings, and by the checkpoint's settings the patience, the stage of
    the last update and the next learning rate. Exits with 2 if it is of another run, or beyond its end.
    """
    folder = origin.folder
    on_disk = next(model.parameters()).device.type != "cpu"  # until it goes to the device
    part = checkpoint.load(folder, mmap=on_disk)
    trainer = checkpoint.load(folder, checkpoint.TRAINER, mmap=on_disk)
    step = trainer["step"]
    if part["step"] != step:
        problem = f"checkpoint.pt is of step {part['step']}, trainer.pt of step {step}"
        fail(f"{folder}: {problem}, so it cannot be resumed; use another step folder")
    if step > cfg.max_steps:
        fail(f"max_steps = {cfg.max_steps} is less than the {step} steps of {folder}; raise it")
    keep_rates(cfg, part["config"])
    hint = "; --init_from= takes the weights alone"
    changed = must_agree(cfg, part, tokenizer, RUN, f"resume from {folder}", hint)
    if not data.same_tokens(trainer["data"], tokens):
        fail(f"dataset = {cfg.dataset!r}: its tokens are not those of {folder}, this would be another run")
    parts.check_shapes(folder, part["model"], model.state_dict())
    distributed.load(model, optimizers, part["model"], trainer["optimizer"])
    if trainer["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(trainer["scaler"])
    skipped, reported = trainer["skipped"]
    state = State(step=step, skipped=skipped, skips_reported=reported, counts=trainer.get("counts"))
    if cfg.n_expert:
        state.routers, state.n_router_samples = trainer["routers"]
        if not distributed.is_main:  # the sum is over all ranks
            state.routers = torch.zeros_like(state.routers)
    # a branch has its own best, and so have other validation windows
    same_eval = origin.is_own and all(getattr(cfg, name) == part["config"][name] for name in VALIDATION)
    if distributed.share(same_eval and trainer["best"].get("step") in steps(run.path)):
        state.best = trainer["best"]
        state.stale_evals = trainer["stale_evals"]
    former = SimpleNamespace(**part["config"])
    return state, SimpleNamespace(
        changed=changed,
        patience=former.patience,
        stage=schedule.stage(former, step - 1),
        lr=schedule.lr(former, step),
    )


def load(cfg, run, origin, tokenizer_spec, meta, model, optimizers, scaler):
    """Give model, optimizers and scaler the state that a run begins with: a checkpoint's, the weights of
    init_from, or as drawn. Return what restore does; former is None if there is no checkpoint. Exits with 0
    if the run is finished."""
    device = next(model.parameters()).device
    state = State()
    former = None
    if origin.folder:
        tokens = data.digest(meta)
        state, former = restore(cfg, origin, run, tokenizer_spec, tokens, model, optimizers, scaler)
        reason = run.finished(cfg, state.step, former.patience) if origin.is_own else ""
        if reason:
            raising = "raise or switch off patience" if reason == "patience" else "raise max_steps"
            print(f"run {cfg.run_id} is finished: step {state.step}, ended by {reason}")
            print(f"to continue it, {raising}")
            record.print_result(record.last(run.path, record.EVENTS)["result"], cfg.json)
            raise SystemExit(0)
    elif cfg.init_from:
        from nanobit import weights  # only here: it may read an exported folder

        part = weights.initial(cfg.init_from)
        must_agree(cfg, part, tokenizer_spec, SHAPE, f"init_from {cfg.init_from}")
        parts.check_shapes(cfg.init_from, part["model"], model.state_dict())
        distributed.load(model, [], part["model"], [])
    state.routers = state.routers.to(device)
    return state, former


def contents(cfg, state, skipped, tokenizer_spec, meta, model, optimizers, scaler):
    """Return the contents of checkpoint.pt and trainer.pt, which restore reads; every rank must ask. skipped:
    the number of skipped steps until now."""
    tensors = distributed.gather(model.state_dict())
    if cfg.tie_embeddings:  # gathered from shards they would be two
        tensors["head.weight"] = tensors["embed.weight"]
    both = dict(format=checkpoint.FORMAT, step=state.step)
    tokens = state.step * cfg.total_batch_size
    settings = config.settings_of(cfg)
    model_part = both | dict(tokens=tokens, config=settings, tokenizer=tokenizer_spec, model=tensors)
    optimizer_states = [distributed.gather(optimizer.state_dict()) for optimizer in optimizers]
    trainer_part = both | dict(data=data.digest(meta), optimizer=optimizer_states, scaler=scaler.state_dict())
    trainer_part["routers"] = [distributed.total(state.routers.clone()), state.n_router_samples]
    trainer_part["skipped"] = [skipped, state.skips_reported]
    trainer_part |= dict(best=state.best, stale_evals=state.stale_evals, counts=state.counts)
    return model_part, trainer_part


def prepare_folder(cfg, run, origin, state, facts):
    """Remove from the run's folder what is written again after this step: later checkpoints, lines of the
    record. Return (whether the evaluation at this step was removed, whether the samples were, warnings)."""
    step = state.step
    is_continued = bool(origin.folder) and origin.is_own
    checkpoint.check_disk(cfg, run.path, facts["params"]["total"], cfg.max_steps - step)
    with checkpoint.reading():
        checkpoint.clean(run.path, step if origin.is_own else -1)
    has_eval = origin.is_own and bool(record.last(run.path, record.SCALARS, "val_loss", step=step))
    has_samples = origin.is_own and bool(record.last(run.path, record.SAMPLES, "mode", step=step))
    lost = record.rewind(run.path, step if is_continued else None, state.counts)
    run.write_best(state.best)
    run.write_config(cfg, facts | dict(origin=origin.folder, world_size=distributed.WORLD))
    return has_eval, has_samples, lost


def begin(cfg, run, origin, state, former, facts):
    """Prepare the folder; print and record what the run is and continues from. Return (whether the evaluation
    at this step must be repeated, whether the samples must)."""
    step = state.step
    repeat_eval, repeat_samples, warnings = distributed.from_main(
        lambda: prepare_folder(cfg, run, origin, state, facts)
    )
    print(opening(cfg, facts))
    if former:
        changed = former.changed
        run.event("resume", step=step, path=origin.folder, passed_over=origin.skipped, changed=changed)
        print(f"resume: from step {step}, {origin.folder}")
        rate = schedule.lr(cfg, step)
        if not math.isclose(rate, former.lr):
            print(f"resume: the learning rate is {rate:.2e} from here; before it was {former.lr:.2e}")
        if schedule.stage(cfg, step) < former.stage:
            print(f"resume: back in stage 1 until step {schedule.boundary(cfg)}, since the run is longer now")
    else:
        run.event("start", step=0, init_from=cfg.init_from, passed_over=origin.skipped)
    for text in warnings:
        print(f"warning: {text}")
        run.event("anomaly", step=step, what=text)
    run.note_failures(state)
    return repeat_eval, repeat_samples


def report_skips(cfg, run, state, skipped, worst_row):
    """Report the steps skipped since the last report. Five in a row end the run with exit code 1, and name
    the last good checkpoint. skipped: all of them; worst_row: the longest row."""
    new_skips = skipped - state.skips_reported
    if new_skips:
        run.event("anomaly", step=state.step, what="not finite, skipped", steps=new_skips)
        run.log(f"warning: {new_skips} steps skipped, their loss or gradient was not finite")
        state.skips_reported = skipped
    if worst_row < 5:
        return
    folder, _ = checkpoint.newest(run.path, resumable=True)
    remedy = "no checkpoint was saved before; start again with a lower learning_rate"
    if folder:
        command = f"{run.resume_command()} --learning_rate={cfg.learning_rate / 2:g}"
        remedy = f"the last finite checkpoint is {folder}; with a lower rate: {command}"
    fail(f"{worst_row} steps in a row were not finite by step {state.step}; {remedy}", code=1)
