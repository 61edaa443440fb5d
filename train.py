"""
Train one model: the settings of a config file, the loop, and a run on disk that survives what kills it.

    python train.py config/train_simple.py                          runs/train_simple/
    python train.py config/train_simple.py --ternary=False --run_id=float_twin
    python train.py config/train_simple.py --max_steps=100 --run_id=smoke
    python train.py config/train_simple.py --resume=auto            continues from its newest checkpoint
    python train.py --resume=runs/train_simple                      continues with the settings of that run
    torchrun --nproc_per_node=8 train.py config/train_dense_300m.py the same run on eight devices

Ctrl-C drops the step under way, saves, says how to resume, and exits; a second one exits immediately. The
last line of stdout is one JSON object with the result.
"""

import atexit
import hashlib
import math
import os
import signal
import sys
import time

import config
from nanobit import terminal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C just ends the program
cfg = config.load(sys.argv[1:], __doc__)
terminal.survive_lost_output()

import torch
from tqdm import tqdm

from model import Transformer
from nanobit import (
    checkpoint,
    data,
    distributed,
    generate,
    machine,
    metrics,
    optim,
    resume,
    schedule,
    trackers,
    weights,
)
from nanobit import run_dir as record
from nanobit.cli import fail
from nanobit.experts import router_loss
from nanobit.metrics import mean_loss, router_health
from nanobit.tokenizer import bos_of, make_tokenizer, with_content

# machine and data

if not distributed.is_main:
    sys.stdout = open(os.devnull, "w")
trackers.need(cfg)
device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
machine.explain_out_of_memory(cfg, device)
distributed.start(device)
if cfg.deterministic:
    machine.make_deterministic()
meta = distributed.from_main(lambda: data.meta(cfg, verify=cfg.verify_data))
cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
# with all that a checkpoint needs to make the tokenizer
tokenizer_spec = {key: meta[key] for key in ("eot", "bos") if key in meta}
tokenizer_spec |= with_content(meta["tokenizer"], os.path.join(cfg.data_dir, cfg.dataset))
tokenizer = make_tokenizer(tokenizer_spec)
data.check_vocabulary(cfg, meta, tokenizer)
train_windows = data.Windows(cfg, meta, "train")
val_windows = data.Windows(cfg, meta, "val") if cfg.eval_every else None
prompts = generate.encode(cfg, tokenizer, bos_of(tokenizer_spec)) if cfg.sample_every else []

# model, optimizer, and where the run starts

distributed.leave_on_signal()  # an empty folder of the run does not stay
run_dir = os.path.join(cfg.out_dir, cfg.run_id)
origin, same_run, passed_over = distributed.from_main(lambda: resume.origin(cfg, run_dir))
torch.manual_seed(cfg.seed)
model = Transformer(cfg)  # drawn on the CPU: the same initial weights on every device
counts = model.counts()
if cfg.fsdp and distributed.WORLD > 1:
    distributed.shard(model, device)
elif cfg.fsdp:
    print("fsdp: off, one process has nobody to share with; start several by torchrun", file=sys.stderr)
model.to(device)
optimizers = optim.make_optimizers(cfg, model, machine.matrix_dtype(device))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
step, best, stale_evals, former = 0, {}, 0, {}  # best: {step, val_loss}; stale_evals: evaluations since then
# what the routers did, summed over this rank's micro-steps since the last line, and the number of all ranks'
routers, n_routers = torch.zeros((), device=device), 0
skipped, told = 0, 0  # steps whose loss or gradient was not finite, and those of them already reported
if origin:
    tokens = data.digest(meta)
    former = resume.restore(cfg, origin, run_dir, same_run, tokenizer_spec, tokens, model, optimizers, scaler)
    step, (skipped, told) = former["step"], former["skipped"]
    best, stale_evals = former["best"], former["stale_evals"]
    if cfg.n_expert:
        routers, n_routers = former["routers"]
        routers = routers.to(device) if distributed.is_main else torch.zeros_like(routers, device=device)
    if same_run and (why := record.finished(run_dir, cfg, step, former["patience"])):
        end = record.last(run_dir, record.EVENTS)
        print(f"run {cfg.run_id} is finished: step {step}, ended by {why}")
        print(f"to go on, raise {'or switch off patience' if why == 'patience' else 'max_steps'}")
        print(record.to_json(end["result"]))
        raise SystemExit(0)
elif cfg.init_from:
    part = weights.initial(cfg.init_from)
    resume.must_agree(cfg, part, tokenizer_spec, resume.SHAPE, f"init_from {cfg.init_from}")
    checkpoint.check_shapes(cfg.init_from, part["model"], model.state_dict())
    distributed.load(model, [], part["model"], [])
    del part
step_model, is_compiled = machine.compiled(model, cfg.compile, device)
if not cfg.fsdp:
    with machine.autocast(device, dtype):
        step_model = distributed.replicate(step_model, device, (cfg.batch_size, cfg.seq_len))

# the folder of the run

facts = dict(device=machine.describe(device), dtype=machine.name(dtype), compile=is_compiled, params=counts)


def open_folder():
    """make the folder that of a run at this step; returns the step at which an evaluation, and that at which
    samples, are dropped from the record and so to be made again, where they are, and what the record lost"""
    checkpoint.check_disk(cfg, run_dir, counts["total"], cfg.max_steps - step)
    with checkpoint.reading():
        checkpoint.clean(run_dir, step if same_run else -1)
    again = [
        step if same_run and record.last(run_dir, *line, step=step) else -1
        for line in ((record.SCALARS, "val_loss"), (record.SAMPLES, "mode"))
    ]
    lost = record.rewind(run_dir, step if same_run and origin else None, former.get("counts"))
    record.write_best(run_dir, best)
    record.write_config(run_dir, cfg, facts | dict(origin=origin, world_size=distributed.WORLD))
    return *again, lost


evaluated, sampled, lost = distributed.from_main(open_folder)
print(record.opening(cfg, facts))
if warning := train_windows.repetition(cfg.max_steps * cfg.total_batch_size):
    print(f"warning: {warning}")
if origin:
    changed = former["changed"]
    record.event(run_dir, "resume", step=step, path=origin, passed_over=passed_over, changed=changed)
    print(f"resume: from step {step}, {origin}")
    if not math.isclose(rate := schedule.lr(cfg, step), former["lr"]):
        print(
            f"resume: the learning rate is {rate:.2e} from here; the former settings give {former['lr']:.2e}"
        )
    if schedule.stage(cfg, step) < former["stage"]:
        print(f"resume: back in stage 1 until step {schedule.boundary(cfg)}, since the run is longer now")
else:
    record.event(run_dir, "start", step=0, init_from=cfg.init_from, passed_over=passed_over)
for text in lost:
    print(f"warning: {text}")
    record.event(run_dir, "anomaly", step=step, what=text)
record.note_failures(run_dir, lambda: step)

# logging, saving, evaluating, sampling

distributed.listen()
on_terminal = sys.stderr.isatty() and distributed.is_main
bar = tqdm(total=cfg.max_steps, initial=step, disable=not on_terminal, unit="step", dynamic_ncols=True)
boundary_steps = schedule.boundary_steps(cfg)


def log_line(text, on_bar=False):
    """a line of train.log, also shown on stderr unless the bar shows the same"""
    if not distributed.is_main:
        return
    record.append_text(run_dir, text)
    if not on_terminal:
        print(text, file=sys.stderr, flush=True)
    elif not on_bar:
        bar.write(text, file=sys.stderr)


mirrors = trackers.start(cfg, run_dir, step, warn=log_line) if distributed.is_main else []
atexit.register(trackers.finish, mirrors)  # however the run ends, the last lines tell why


def keep(name, **row):
    """a line of the record, and of its mirrors"""
    record.append(run_dir, name, **row)
    trackers.mirror(mirrors, cfg, name, row)


def scheduled(at):
    """whether a checkpoint of this step is wanted whatever its loss"""
    every = cfg.save_every and at % cfg.save_every == 0
    return at > 0 and (every or at in boundary_steps or at == cfg.max_steps)


def save(why):
    """the state before the update at `step` and before its evaluation, which resuming makes again. Returns
    whether it is on disk: a full disk costs a warning, and leaves what was there."""
    if distributed.share(checkpoint.has_manifest(run_dir, step)):
        return True
    state = distributed.gather(model.state_dict())
    if cfg.tie_embeddings:  # gathered from shards they would be two
        state["head.weight"] = state["embed.weight"]
    model_part = dict(
        format=checkpoint.FORMAT,
        step=step,
        tokens=step * cfg.total_batch_size,
        config=config.settings_of(cfg),
        tokenizer=tokenizer_spec,
        model=state,
    )
    trainer_part = dict(
        format=checkpoint.FORMAT,
        step=step,
        data=data.digest(meta),
        optimizer=[distributed.gather(optimizer.state_dict()) for optimizer in optimizers],
        scaler=scaler.state_dict(),
        routers=[distributed.total(routers.clone()), n_routers] if cfg.n_expert else None,
        skipped=[int(skips[0]), told],
        **before_evaluation,
    )
    return distributed.share(distributed.is_main and write(model_part, trainer_part, why))


def write(model_part, trainer_part, why):
    """put the checkpoint of this step on the disk; whether that succeeded"""
    try:
        record.flush(run_dir)
        folder = checkpoint.save(run_dir, step, model_part, trainer_part)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a failed write
        log_line(f"warning: step {step} was not saved ({error}); its partial is removed, earlier ones stay")
        record.event(run_dir, "anomaly", step=step, what="save failed", error=str(error))
        return False
    record.event(run_dir, "save", step=step, path=folder, why=why)
    checkpoint.prune(run_dir, cfg.keep_last, boundary_steps | {best.get("step", -1)})
    return True


def save_end():
    """save the last step; a full disk is given ten minutes and a line a minute"""
    for _ in range(10):
        if save("end"):
            return
        for _ in range(60):
            if distributed.asked_to_stop():
                return
            time.sleep(1)
    how = f"free disk space, then: {record.resume_command(run_dir)}"
    fail(f"the end of run {cfg.run_id} is not saved; {how}", code=1)


def evaluate():
    """validation loss in nats per token, logged; None where a signal came"""
    began = time.perf_counter()
    batches = val_windows.fixed(cfg.eval_tokens, cfg.batch_size, device)
    with machine.autocast(device, dtype):
        loss = mean_loss(model, batches, distributed.asked_to_stop)
    if loss is None:
        return None
    perplexity = math.exp(min(loss, 700.0))  # e^700 is about the largest that a float holds
    keep(record.SCALARS, step=step, val_loss=loss, val_perplexity=perplexity)
    seconds = time.perf_counter() - began
    log_line(
        f"eval {step}/{cfg.max_steps}  val_loss {loss:.4f}  perplexity {perplexity:.2f}  {seconds:.1f} s"
    )
    return loss


def note_best(loss):
    """keep the checkpoint of a new best evaluation, and of the former best only if the schedule wants it"""
    global best, stale_evals
    if not loss < best.get("val_loss", math.inf):  # a loss that is not a number is not better either
        stale_evals += 1
        return
    if not save("best"):
        return
    former, best, stale_evals = best, {"step": step, "val_loss": loss}, 0
    is_written = distributed.is_main and record.write_best(run_dir, best)
    if is_written and former and former["step"] != step and not scheduled(former["step"]):
        checkpoint.remove(checkpoint.step_dir(run_dir, former["step"]))


def sample():
    """every prompt in every mode into samples.jsonl"""
    model.eval()
    with machine.autocast(device, dtype):
        for row in generate.write(cfg, model, tokenizer, prompts, device, distributed.asked_to_stop):
            keep(record.SAMPLES, step=step, **row)
    model.train()


def hand_over():
    """what an interrupted run leaves: the state at the beginning of its step"""
    distributed.asked_to_stop()
    on_disk = save("interrupt")
    record.event(run_dir, "interrupt", step=step, signal=distributed.interrupted)
    bar.close()
    if on_disk and distributed.is_main:
        how = f"to continue: {record.resume_command(run_dir)}"
        print(f"stopped by signal {distributed.interrupted}, saved step {step}; {how}", file=sys.stderr)
    sys.exit(128 + distributed.interrupted)


def rescue():
    """save the state before damaged data end the program; of several ranks, one alone cannot"""
    bar.close()
    if distributed.WORLD == 1 and save("damaged data"):
        how = record.resume_command(run_dir)
        log_line(f"saved step {step}; to continue once the data set is whole again: {how}")


# the loop

# steps skipped: in all, in a row up to now, most in a row since a log line; a resumed run begins a new row
skips = torch.tensor([skipped, 0, 0], dtype=torch.float32, device=device)
sequences_per_step = cfg.batch_size * cfg.accumulation * distributed.WORLD
speedometer = machine.Speedometer(device)
last = record.last(run_dir, record.SCALARS, "loss")  # the last training line
codes = metrics.codes(model) if cfg.ternary and step % cfg.log_every == 0 else None  # those of the last line
val_loss = None
owed = False  # whether a scheduled save has failed and is to be tried again
model.train()


def ending():
    """what ends the run at this step, or ''"""
    if step >= cfg.max_steps:
        return "max_steps"
    is_over = cfg.max_minutes and distributed.largest(speedometer.seconds() > 60 * cfg.max_minutes)
    return "max_minutes" if is_over else ""


def place(micro):
    """the number of this rank's micro-step `micro` among all of the step: one process takes the same batches
    with the same random numbers as several"""
    return micro * distributed.WORLD + distributed.RANK


def next_batch(micro):
    """inputs and targets of micro-step `micro` of this step; one past its last is the next step's first, None
    where its tokens are still to be written"""
    first = step * sequences_per_step + place(micro) * cfg.batch_size
    is_there = train_windows.has(first + cfg.batch_size - 1)
    return train_windows.batch(first, cfg.batch_size, device) if is_there else None


def seed(micro):
    """the seed of all random numbers of a micro-step, whether the run got here in one go or resumed"""
    text = f"{cfg.seed}/{step}/{place(micro)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


batch, why = next_batch(0), ending()
for windows in filter(None, (train_windows, val_windows)):
    windows.shards.on_damage = rescue
while True:
    lr, weight_decay = optim.set_rates(optimizers, cfg, step)
    before_evaluation = dict(best=best, stale_evals=stale_evals, counts=dict(record.counts))

    # save, then evaluate, then sample: what fails here costs nothing that was trained
    save_due = scheduled(step) or (owed and step % cfg.log_every == 0)
    eval_due = cfg.eval_every > 0 and (bool(why) or step % cfg.eval_every == 0 or step == evaluated)
    sample_due = cfg.sample_every > 0 and (
        bool(why) or (step > 0 and step % cfg.sample_every == 0) or step == sampled
    )
    if why or save_due or eval_due or sample_due:
        speedometer.pause()
        if why:
            save_end()
        elif save_due:
            owed = not save("schedule")
        if eval_due:
            val_loss = evaluate()
            if step and val_loss is not None:
                note_best(val_loss)
            if cfg.patience and stale_evals >= cfg.patience and not why and save("end"):
                why, sample_due = "patience", cfg.sample_every > 0
                former = f"than {best['val_loss']:.4f} at step {best['step']}" if best else "than NaN"
                use = f"--ckpt={os.path.join(run_dir, 'best')}" if best else "no checkpoint is the best"
                log_line(f"patience: {stale_evals} evaluations without a better loss {former}: {use}")
        if sample_due and not distributed.asked_to_stop():
            sample()
        speedometer.go_on()
    if distributed.asked_to_stop():
        hand_over()
    if why:
        break

    # one update
    last_sample = (step + 1) * sequences_per_step - 1
    if not train_windows.has(last_sample):
        speedometer.pause()
        fault = train_windows.wait_for(last_sample, stop=distributed.asked_to_stop, say=log_line)
        speedometer.go_on()
        if distributed.asked_to_stop():
            hand_over()
        if fault:
            save("no data")
            fail(f"{fault}; then: {record.resume_command(run_dir)}", code=1)
    batch = batch or next_batch(0)
    loss_sum, router_sum = torch.zeros((), device=device), 0.0
    try:
        for micro in range(cfg.accumulation):
            torch.manual_seed(seed(micro))
            distributed.sync_gradients(step_model, micro == cfg.accumulation - 1)
            with machine.autocast(device, dtype):
                loss, router = step_model(*batch)
            seen, batch = batch[0][:1], next_batch(micro + 1)  # while the device computes
            scaler.scale((loss + router_loss(cfg, router)) / cfg.accumulation).backward()
            loss_sum += loss.detach()
            if cfg.n_expert:
                router_sum += router.detach()
            if distributed.received and distributed.WORLD == 1:  # of several, none may leave before all know
                hand_over()
    except Exception:
        if (
            distributed.received and distributed.WORLD == 1
        ):  # Ctrl-C also reached the compiler of torch.compile
            hand_over()
        raise
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = distributed.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf))
    bad = (~(distributed.total(loss_sum) + norm).isfinite()).float()
    for optimizer in optimizers:
        # a step that is not finite is skipped on the device: where found_inf is 1, nothing changes
        optimizer.found_inf = bad
        optimizer.step()
        optimizer.zero_grad()
    if scaler.is_enabled():  # its overflows are how it finds the scale
        bad = bad * (scaler.scale(torch.ones((), device=device)) < 1)  # get_scale() would wait for the device
        scaler.update()
    routers, n_routers = routers + router_sum, n_routers + cfg.accumulation * distributed.WORLD
    skips[0] += bad
    skips[1] = (skips[1] + 1) * bad
    skips[2] = torch.maximum(skips[2], skips[1])
    step += 1
    why = ending()
    speedometer.count()
    bar.update()

    # log
    if step % cfg.log_every == 0 or why:
        loss, grad_norm, skipped, _, worst_streak = torch.stack(
            [loss_sum / (cfg.accumulation * distributed.WORLD), norm, *skips]
        ).tolist()
        speed = speedometer.read(cfg.total_batch_size, model.flops_per_token(), dtype)
        last = dict(
            step=step,
            epoch=step * sequences_per_step / train_windows.total if train_windows.total else None,
            tokens=step * cfg.total_batch_size,
            loss=loss,
            lr=lr,
            weight_decay=weight_decay,
            stage=schedule.stage(cfg, step - 1),
            grad_norm=grad_norm,
            **speed,
            **(dict(loss_scale=scaler.get_scale()) if scaler.is_enabled() else {}),
            time=time.time(),
        )
        keep(record.SCALARS, **last)
        shown = f"loss {loss:.4f}  lr {lr:.2e}  wd {weight_decay:g}  stage {last['stage']}"
        tokens_per_sec, step_ms = speed["tokens_per_sec"] or 0, speed["step_ms"] or 0
        eta = tqdm.format_interval((cfg.max_steps - step) * step_ms / 1e3)
        log_line(
            f"step {step}/{cfg.max_steps}  {step / cfg.max_steps:.1%}  {shown}  grad {grad_norm:.2f}  "
            f"{tokens_per_sec:,.0f} tok/s  eta {eta}",
            on_bar=True,
        )
        bar.set_postfix_str(f"{shown}  {tokens_per_sec:,.0f} tok/s", refresh=False)
        if cfg.ternary:
            with machine.autocast(device, dtype):
                health, codes = metrics.health(model, codes, seen)
            keep(record.BITNET, step=step, **health)
        if cfg.n_expert:
            mean, routers, n_routers = (
                distributed.total(routers) / n_routers,
                torch.zeros((), device=device),
                0,
            )
            keep(record.ROUTER, step=step, **router_health(mean))
        if skipped > told:
            record.event(run_dir, "anomaly", step=step, what="not finite, skipped", steps=int(skipped - told))
            log_line(f"warning: {int(skipped - told)} steps skipped, their loss or gradient was not finite")
            told = int(skipped)
        if worst_streak >= 5:
            good, _ = checkpoint.newest(run_dir, resumable=True)
            remedy = "no checkpoint was saved before; start again with a lower learning_rate"
            if good:
                again = f"{record.resume_command(run_dir)} --learning_rate={cfg.learning_rate / 2:g}"
                remedy = f"the last finite checkpoint is {good}; with a lower rate: {again}"
            fail(f"{int(worst_streak)} steps in a row were not finite by step {step}; {remedy}", code=1)
        skips[2] = skips[1]
        speedometer.go_on()

# the end

bar.close()
per_byte = meta["tokens"]["val"] / meta["bytes"]["val"] / math.log(2) if meta["bytes"].get("val") else None
result = dict(
    run_id=cfg.run_id,
    step=step,
    tokens=step * cfg.total_batch_size,
    loss=last.get("loss"),
    val_loss=val_loss,
    val_bits_per_byte=val_loss * per_byte if per_byte and val_loss is not None else None,
    seconds=speedometer.seconds(),
    tokens_per_sec=last.get("tokens_per_sec"),
    peak_memory_gb=machine.peak_memory_gb(device),
    checkpoint=checkpoint.step_dir(run_dir, step),
)
record.event(run_dir, "finish", step=step, why=why, result=result)
trackers.finish(mirrors)
distributed.stop()
print(record.to_json(result))
