"""
Train one model: the settings of a config file, the loop, and a run on disk that survives what kills it.

    python train.py config/train_simple.py                          runs/train_simple/
    python train.py config/train_simple.py --ternary=False --run_id=float_twin
    python train.py config/train_simple.py --resume=auto            continues from its newest checkpoint
    python train.py --resume=runs/train_simple                      continues with the settings of that run
    torchrun --nproc_per_node=8 train.py config/train_dense_300m.py the same run on eight devices

Ctrl-C drops the step under way, saves, prints how to resume, and exits; a second one exits immediately. If
stdout is not a terminal, or with --json, its last line is one JSON object with the result.
"""

import math
import os
import sys
import time
from dataclasses import replace

import config
from nanobit import cli, terminal

# it also lets Ctrl-C just end the program, until listen() below
cfg = config.load(doc=__doc__, flags={"json": cli.JSON})
terminal.survive_lost_output()

import torch  # after the settings, so that --help and wrong flags answer quickly

from model import Transformer
from nanobit import data, distributed, generate, machine, metrics, optim, record, saving, schedule, start
from nanobit.cli import fail
from nanobit.cuda_graph import MicroSteps
from nanobit.experts import router_loss
from nanobit.kept_codes import check_codes, keep_codes
from nanobit.run_dir import RunDir, has_manifest, step_dir
from nanobit.tokenizer import bos_of, make_tokenizer, spec_of

# machine and data

if not distributed.is_main:
    sys.stdout = open(os.devnull, "w")
cli.need_packages(config.trackers(cfg), "track")
device = machine.pick(cfg.device)
dtype = machine.training_dtype(cfg, device)
machine.explain_out_of_memory(cfg, device)
distributed.start(device)
if cfg.deterministic:
    machine.make_deterministic()
meta = distributed.from_main(lambda: data.meta(cfg, verify=cfg.verify_data), on_each_machine=True)
cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
tokenizer_spec = spec_of(meta, os.path.join(cfg.data_dir, cfg.dataset))
tokenizer = make_tokenizer(tokenizer_spec)
data.check_vocabulary(cfg, meta, tokenizer)
train_data = data.Windows(cfg, meta, "train")
val_data = data.Windows(cfg, meta, "val") if cfg.eval_every else None
prompts = generate.encode_prompts(cfg, tokenizer, bos_of(tokenizer_spec)) if cfg.sample_every else []

# model and optimizers, and the state that the run begins with

distributed.leave_on_signal()  # a signal before training removes the empty folder of the run
run = RunDir(os.path.join(cfg.out_dir, cfg.run_id))
origin = distributed.from_main(lambda: start.find(cfg, run))
torch.manual_seed(cfg.seed)
model = Transformer(cfg)  # initialized on the CPU: the same weights on every device
n_params = model.counts()
if cfg.fsdp:
    distributed.shard(model, device)
model.to(device)
optimizers = optim.make_optimizers(cfg, model, machine.matrix_dtype(device))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
state, former = start.load(cfg, run, origin, tokenizer_spec, meta, model, optimizers, scaler)
step_model, is_compiled = machine.compiled(model, cfg, device)
keep_codes(model, is_compiled, dtype)  # the forward is compiled with them
with machine.autocast(device, dtype):
    step_model = distributed.replicate(step_model, device, cfg, train_data.is_masked)
keep_codes(model, is_compiled, dtype)  # again, since DDP takes the weights of rank 0
is_replayed = machine.replays_micro_steps(cfg, device, dtype, model.flops_per_token())
facts = dict(device=machine.describe(device), dtype=machine.name(dtype), compile=is_compiled, params=n_params)
facts |= dict(graphs=is_replayed) | machine.processor()
repeat_eval, repeat_samples = start.begin(cfg, run, origin, state, former, facts)
if warning := train_data.repetition(cfg.max_steps * cfg.total_batch_size):
    print(f"warning: {warning}")
distributed.listen()
run.start_log(cfg, state.step)

# saving, evaluating, sampling, logging

skips = optim.SkipCounter(state.skipped, device)
speed = metrics.Speedometer(device)
val_loss = None
last_row = record.last(run.path, record.SCALARS, "loss")  # the last training line
codes = metrics.codes(model) if cfg.ternary and state.step % cfg.log_every == 0 else None  # at that line


def save(reason):
    """Save the run after state.step updates. Return whether it is on disk; a full disk only warns."""
    if distributed.share(has_manifest(run.path, state.step)):
        return True
    now = replace(state, best=before_eval.best, stale_evals=before_eval.stale_evals)
    contents = saving.contents(cfg, now, skips.total(), tokenizer_spec, meta, model, optimizers, scaler)
    keep_steps = schedule.boundary_steps(cfg) | {state.best.get("step", -1)}
    is_saved = distributed.is_main and saving.try_save(cfg, run, state.step, contents, reason, keep_steps)
    return distributed.share(is_saved)


def save_end():
    """Save the last step. A full disk is given ten minutes, and a line a minute."""
    for second in range(600):
        if (second % 60 == 0 and save("end")) or distributed.asked_to_stop():
            return
        time.sleep(1)
    fail(f"the end of run {cfg.run_id} is not saved; free disk space, then: {run.resume_command()}", code=1)


def leave():
    """End an interrupted run: save the state at the beginning of its step, and exit."""
    signum = distributed.asked_to_stop()
    is_saved = save("interrupt")
    run.event("interrupt", step=state.step, signal=signum)
    run.bar.close()
    if is_saved and distributed.is_main:
        stopped = f"stopped by signal {signum}, saved step {state.step}"
        print(f"{stopped}; to continue: {run.resume_command()}", file=sys.stderr)
    distributed.stop()
    sys.exit(128 + signum)


def rescue():
    """Save when a shard is damaged, before the program ends. One of several ranks cannot save alone."""
    run.bar.close()
    if distributed.WORLD == 1 and save("damaged data"):
        run.log(f"saved step {state.step}; to continue with the repaired data set: {run.resume_command()}")


def evaluate():
    """Return the validation loss in nats per token, logged, or None if a signal came."""
    began = time.perf_counter()
    batches = val_data.fixed(cfg.eval_tokens, cfg.batch_size, device)
    with machine.autocast(device, dtype):
        loss = metrics.mean_loss(model, batches, distributed.asked_to_stop)
    if loss is None:
        return None
    run.log_evaluation(state.step, loss, time.perf_counter() - began)
    return loss


def update_best(loss):
    """Keep the checkpoint of a new best evaluation, and of the former best only if it has another reason."""
    if not loss < state.best.get("val_loss", math.inf):  # NaN is not better either
        state.stale_evals += 1
    elif save("best"):
        former_step = state.best.get("step", state.step)
        state.best = {"step": state.step, "val_loss": loss}
        state.stale_evals = 0
        is_written = distributed.is_main and run.write_best(state.best)
        if is_written and former_step != state.step and not schedule.due("save", cfg, former_step):
            saving.remove_former_best(run.path, former_step)


def end_if_out_of_patience():
    """Save, and return True, if the last evaluations found no better loss: the run ends here."""
    if not cfg.patience or state.stale_evals < cfg.patience or not save("end"):
        return False
    best = f"--ckpt={os.path.join(run.path, 'best')}" if state.best else "no evaluation was finite"
    run.log(f"patience: {state.stale_evals} evaluations without a new best loss; {best}")
    return True


def sample():
    """Write every prompt in every mode into samples.jsonl."""
    model.eval()
    with machine.autocast(device, dtype):
        for row in generate.samples(cfg, model, tokenizer, prompts, device, distributed.asked_to_stop):
            run.write(record.SAMPLES, step=state.step, **row)
            run.show_sample(state.step, row)
    model.train()


def log_step(lr, weight_decay, loss_sum, norm, health_input):
    """Log the update that was just made: losses, rates and speed, ternary health, routers, skipped steps."""
    global codes, last_row
    n_micro_steps = cfg.accumulation * distributed.WORLD
    numbers = [loss_sum / n_micro_steps, norm, *skips.counts]
    loss, grad_norm, skipped, _, worst_row = torch.stack(numbers).tolist()  # one wait for the device
    last_row = dict(
        step=state.step,
        epoch=train_data.epochs(state.step * cfg.total_batch_size),
        tokens=state.step * cfg.total_batch_size,
        loss=loss,
        lr=lr,
        weight_decay=weight_decay,
        stage=schedule.stage(cfg, state.step - 1),  # of the update that was just made
        grad_norm=grad_norm,
        **speed.read(cfg.total_batch_size, model.flops_per_token(), dtype),
    )
    if scaler.is_enabled():
        last_row["loss_scale"] = scaler.get_scale()
    run.write(record.SCALARS, **last_row, time=time.time())
    run.show_step(last_row)
    if cfg.ternary:
        with machine.autocast(device, dtype):
            health, codes = metrics.health(model, codes, health_input)
        run.write(record.BITNET, step=state.step, **health)
    if cfg.n_expert:
        mean = distributed.total(state.routers) / state.n_router_samples
        run.write(record.ROUTER, step=state.step, **metrics.router_health(mean))
        state.routers = torch.zeros((), device=device)
        state.n_router_samples = 0
    run.report_skips(cfg, state, int(skipped), int(worst_row))
    skips.reset_row()


def micro_step(*batch):
    """Add the gradients of a micro-step to those of its update. Return its loss and router numbers."""
    with machine.autocast(device, dtype):
        loss, router = step_model(*batch)
    scaler.scale((loss + router_loss(cfg, router)) / cfg.accumulation).backward()
    return loss.detach(), router


def ending():
    """Return what ends the run at this step, or ''. Every rank must ask."""
    seconds = distributed.largest(speed.seconds()) if cfg.max_minutes else 0.0
    return schedule.ending(cfg, state.step, seconds)


# the loop

run_micro_step = MicroSteps(micro_step, model.parameters(), cfg.accumulation, is_replayed)
batch = train_data.micro_batch(state.step, 0, device)
for windows in filter(None, (train_data, val_data)):
    windows.shards.on_damage = windows.masks.on_damage = rescue
retry_save = False  # a scheduled save has failed
reason = ending()
model.train()
while True:
    lr, weight_decay = optim.set_rates(optimizers, cfg, state.step)
    state.counts = dict(record.counts)  # lines in each file of the record
    before_eval = replace(state)  # what is saved: resuming repeats the evaluation of its step

    # save first, so that an evaluation or sample that fails loses nothing
    save_due = schedule.due("save", cfg, state.step) or (retry_save and state.step % cfg.log_every == 0)
    eval_due = schedule.due("eval", cfg, state.step, reason or repeat_eval)
    sample_due = schedule.due("sample", cfg, state.step, reason or repeat_samples)
    repeat_eval = repeat_samples = False
    if reason or save_due or eval_due or sample_due:
        with speed.paused():
            if reason:
                save_end()
            elif save_due:
                retry_save = not save("schedule")
            if eval_due:
                val_loss = evaluate()
                if state.step and val_loss is not None:
                    update_best(val_loss)
                if not reason and end_if_out_of_patience():
                    reason = "patience"
                    sample_due = cfg.sample_every > 0
            if sample_due and not distributed.asked_to_stop():
                sample()
    if distributed.asked_to_stop():
        leave()
    if reason:
        break

    # one update: the micro-steps, each with its own seed, then the optimizers
    last_sample = train_data.last_sample(state.step)
    if not train_data.has(last_sample):
        with speed.paused():
            fault = train_data.wait_for(last_sample, distributed.asked_to_stop, run.log)
        if distributed.asked_to_stop():
            leave()
        if fault:
            save("no data")
            fail(f"{fault}; then: {run.resume_command()}", code=1)
    check_codes(model)
    batch = batch or train_data.micro_batch(state.step, 0, device)
    loss_sum = torch.zeros((), device=device)
    router_sum = torch.zeros((), device=device)
    try:
        for micro in range(cfg.accumulation):
            torch.manual_seed(data.seed(cfg, state.step, micro))
            distributed.sync_gradients(step_model, micro == cfg.accumulation - 1)
            loss, router = run_micro_step(micro, *batch)
            health_input = batch[0][:1]
            batch = train_data.micro_batch(state.step, micro + 1, device)  # while the device computes
            loss_sum += loss
            if cfg.n_expert:
                router_sum = router_sum + router.detach()
            if distributed.stops_alone():
                leave()
    except Exception:
        if distributed.stops_alone():  # Ctrl-C also ended a worker of torch.compile, which raises here
            leave()
        raise
    norm, skipped = optim.update(model, optimizers, scaler, cfg.grad_clip, loss_sum)
    keep_codes(model, is_compiled, dtype)  # for all forwards until the next update
    skips.add(skipped)
    if cfg.n_expert:
        state.routers = state.routers + router_sum
        state.n_router_samples += cfg.accumulation * distributed.WORLD
    state.step += 1
    speed.count()
    run.bar.update()
    reason = ending()
    if state.step % cfg.log_every == 0 or reason:
        log_step(lr, weight_decay, loss_sum, norm, health_input)
        speed.start()

# the end

run.end_log()
result = dict(run_id=cfg.run_id, step=state.step, tokens=state.step * cfg.total_batch_size)
result |= dict(loss=last_row.get("loss"), val_loss=val_loss, checkpoint=step_dir(run.path, state.step))
result |= dict(val_bits_per_byte=data.bits_per_byte(meta, val_loss), seconds=speed.seconds())
result |= dict(tokens_per_sec=last_row.get("tokens_per_sec"), peak_memory_gb=machine.peak_memory_gb(device))
run.event("finish", step=state.step, why=reason, result=result)
distributed.stop()
end = f"run {cfg.run_id} ended by {reason} at step {state.step:,} after {speed.seconds() / 60:.1f} minutes"
record.print_result(result, cfg.json, f"{end}\nnext: python sample.py --ckpt={run.path} --prompt=...")
