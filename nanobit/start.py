"""How a run starts: its folder, the state that it begins with, and what it prints first."""

import math
import textwrap

import config
from nanobit import distributed, record, saving, schedule
from nanobit.cli import fail
from nanobit.run_dir import Origin, reading, step_folders


def find(cfg, run):
    """Return the Origin of a run by cfg.resume, and lock its folder from now on. Exits with 2 if the folder
    holds a run that this one would overwrite."""
    run.open()  # before anything is chosen from it: its former process may still be saving
    origin = Origin()
    if cfg.resume:
        from nanobit import resume  # here and below, since most runs continue from nothing

        origin = resume.find(cfg, run)
    with reading():
        present = step_folders(run.path)
    if present and not origin.is_own:
        fail(
            f"run_id = {cfg.run_id!r}: {run.path} already holds a run, up to step {present[0]}; "
            "continue with --resume=auto, or choose another --run_id="
        )
    return origin


def load(cfg, run, origin, tokenizer_spec, meta, model, optimizers, scaler):
    """Give model, optimizers and scaler the state that a run begins with: a checkpoint's, the weights of
    init_from, or as drawn. Return (State, former): see resume.restore; former is None without a checkpoint.
    Exits with 0 if the run is finished."""
    state = saving.State()
    former = None
    if origin.folder or cfg.init_from:
        from nanobit import resume

        if origin.folder:
            state, former = resume.restore(cfg, origin, run, tokenizer_spec, meta, model, optimizers, scaler)
        else:
            resume.take_weights(cfg, tokenizer_spec, model)
    elif "chat" in tokenizer_spec:
        print("warning: conversations are for a trained model, and this one is random; see --init_from=")
    state.routers = state.routers.to(next(model.parameters()).device)
    return state, former


def prepare_folder(cfg, run, origin, state, facts):
    """Remove from the run's folder what is written again after this step: later checkpoints, lines of the
    record. Return (whether the evaluation at this step was removed, whether the samples were, warnings)."""
    step = state.step
    is_continued = bool(origin.folder) and origin.is_own
    with reading():
        saving.remove_partials(run.path)  # before the check, which counts them
    saving.check_disk(cfg, run.path, facts["params"]["total"], cfg.max_steps - step)
    with reading():
        saving.rename_later(run.path, step if origin.is_own else -1)
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


def opening(cfg, facts):
    """Return what a run prints first: the settings that differ from the defaults, model, device and length.
    facts: as for write_config."""
    defaults = config.assignments(config.DEFAULT)
    values = config.settings_of(cfg)
    changed = [f"{name}={values[name]!r}" for name in defaults if values[name] != defaults[name]]
    params = facts["params"]
    model = f"{params['total']:,} parameters, {params['ternary']:,} ternary"
    if cfg.n_expert:
        model += f", {params['active']:,} active per token"
    device = facts["device"]
    batch = f"{cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}"
    if distributed.WORLD > 1:
        device = f"{distributed.WORLD} x {device}"
        batch = f"{distributed.WORLD} x {batch}"
    compiled = "compiled: the first step takes longer" if facts["compile"] else "not compiled"
    if facts["graphs"]:
        compiled = f"micro-steps as CUDA graphs, {compiled}"
    total = cfg.max_steps * cfg.total_batch_size
    return (
        f"{textwrap.fill('settings: ' + ', '.join(changed), 100, subsequent_indent='  ')}\n"
        f"model: {model}\n"
        f"device: {device}, {facts['dtype']}, {compiled}\n"
        f"length: {cfg.max_steps:,} steps of {cfg.total_batch_size:,} tokens ({batch}), {total:,} in all"
    )
