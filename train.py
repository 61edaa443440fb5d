"""
Train one model: the settings of a config file, the loop, and a run on disk that survives what kills it.

    python train.py config/train_simple.py                          runs/train_simple/
    python train.py config/train_simple.py --ternary=False --run_id=float_twin
    python train.py config/train_simple.py --max_steps=100 --run_id=smoke
    python train.py config/train_simple.py --resume=auto            goes on from the newest checkpoint, or starts

Ctrl-C drops the step under way, saves, says how to resume, and exits; a second one exits at once. The last line of
stdout is one JSON object with the result.
"""

import hashlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import config

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, Ctrl-C just ends the program
cfg = config.load(sys.argv[1:], __doc__)

import numpy as np  # after the settings: --help and their faults need not wait for torch
import torch
from tqdm import tqdm

import checkpoint
import data
import device as machine
import optim
import quant
import record
from config import fail
from model import Transformer, generate, mean_loss

# machine and data

device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
if cfg.deterministic:
    machine.make_deterministic()
meta = data.meta(cfg)
cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
tokenizer_spec = meta["tokenizer"] | {"eot": meta["eot"]}
tokenizer = data.tokenizer(tokenizer_spec)
train_windows, val_windows = data.Windows(cfg, meta, "train"), data.Windows(cfg, meta, "val") if cfg.eval_every else None
try:
    prompts = [data.encode_prompt(tokenizer, meta["eot"], text) for text in cfg.sample_prompts]
except ValueError as error:
    fail(f"sample_prompts: {error}; set them for this data set, or --sample_every=0")

# where the run starts

run_dir = os.path.join(cfg.out_dir, cfg.run_id)
origin = ""  # the step folder that this run goes on from
if cfg.resume == "auto":
    origin, passed = checkpoint.newest(run_dir, resumable=True)
    for passed_step, wrong in passed:
        print(f"resume: passed over step {passed_step}: {wrong}")
elif cfg.resume:
    origin, passed = checkpoint.locate(cfg.resume, resumable=True, setting="resume"), []
same_run = origin and os.path.realpath(origin).startswith(os.path.realpath(run_dir) + os.sep)
if not same_run and cfg.resume != "auto" and checkpoint.steps(run_dir):
    fail(
        f"run_id = {cfg.run_id!r}: {run_dir} already holds a run (step {checkpoint.steps(run_dir)[0]}); "
        "go on with --resume=auto, or choose another --run_id="
    )

MUST_AGREE = "n_layer n_head n_kv_head n_embd ffn_dim vocab_size rope_theta norm_eps tie_embeddings ternary".split()
MUST_AGREE += "dataset seed seq_len total_batch_size".split()


def disagreements(saved, names):
    return [f"{name} = {getattr(cfg, name)!r}, the checkpoint has {saved[name]!r}" for name in names if getattr(cfg, name) != saved[name]]


def load_origin(folder, names, what):
    """a checkpoint's model part, after checking that settings and tokenizer agree with this run's"""
    part = checkpoint.load(folder)
    faults = disagreements(part["config"], names)
    if part["tokenizer"]["sha256"] != tokenizer_spec["sha256"]:
        faults.append(f"the tokenizer of {cfg.dataset} is not the checkpoint's")
    if faults:
        fail(*(f"{what} {folder}: {text}; these must agree" for text in faults))
    return part


step, best, stale_evals, skipped = 0, {}, 0, 0  # best: {step, val_loss}; stale_evals: evaluations since then
streak = [0, 0]  # steps skipped in a row: up to now, and the most of them since the last log line
torch.manual_seed(cfg.seed)
with torch.device(device):
    model = Transformer(cfg)
optimizer = optim.make_optimizer(cfg, model)
if origin:
    part, trainer = load_origin(origin, MUST_AGREE, "resume"), checkpoint.load(origin, checkpoint.TRAINER)
    model.load_state_dict(part["model"])
    optimizer.load_state_dict(trainer["optimizer"])
    step, best, stale_evals, skipped, streak = (trainer[key] for key in ("step", "best", "stale_evals", "skipped", "streak"))
    changed = disagreements(part["config"], [name for name in part["config"] if name in vars(cfg) and name not in MUST_AGREE])
    for text in changed:
        if not text.startswith(("resume =", "init_from =", "run_id =")):
            print(f"resume: changed: {text}")
    if same_run and step >= cfg.max_steps:
        finished = [line for line in record.read(run_dir, record.EVENTS) if line["event"] == "finish"]
        if finished and finished[-1]["result"]["step"] == step:
            print(f"run {cfg.run_id} is finished: step {step} of {cfg.max_steps}; to lengthen it raise max_steps")
            print(record.to_json(finished[-1]["result"]))
            raise SystemExit(0)
    if step > cfg.max_steps:
        fail(f"max_steps = {cfg.max_steps} is less than the {step} steps of {origin}; raise it")
elif cfg.init_from:
    part = load_origin(checkpoint.locate(cfg.init_from, setting="init_from"), MUST_AGREE[:9], "init_from")
    model.load_state_dict(part["model"])
start_step = step

# the folder, the disk

counts = model.counts()
weights_gb, trainer_gb = 4 * counts["total"] / 1e9, 8 * counts["total"] / 1e9  # fp32; AdamW holds two numbers a weight
lock = record.open_run(run_dir)
free_gb = shutil.disk_usage(run_dir).free / 1e9
if free_gb < 2.2 * (weights_gb + trainer_gb):
    fail(
        f"out_dir = {cfg.out_dir!r} has {free_gb:.2f} GB free; two checkpoints of this model need "
        f"{2.2 * (weights_gb + trainer_gb):.2f} GB; free some or choose another --out_dir="
    )
n_saves = (cfg.max_steps - step) // cfg.save_every if cfg.save_every else 0
planned_gb = n_saves * weights_gb + (min(n_saves, cfg.keep_last or n_saves) + 4) * trainer_gb
if planned_gb > free_gb:
    print(f"disk: the checkpoints of this run will take about {planned_gb:.1f} GB, {free_gb:.1f} GB are free; raise save_every")
for folder in checkpoint.clean(run_dir, step if same_run else -1):
    print(f"set aside: {folder}, a later step than the one this run goes on from")
record.rewind(run_dir, step if same_run else None)
record.write_best(run_dir, best)

settings = {name: [value, cfg.origin.get(name, "derived")] for name, value in vars(cfg).items() if name != "origin"}
width = max(map(len, settings))
print("\n".join(f"{name:{width}} {value!r:<24} {source}" for name, (value, source) in settings.items()))
step_model, is_compiled = machine.compiled(model, cfg.compile, device)


def git_commit():
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    return found.stdout.strip() or None


data.write_json(
    os.path.join(run_dir, "config.json"),
    {
        "settings": {name: {"value": value, "origin": source} for name, (value, source) in settings.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": machine.describe(device),
        "dtype": str(dtype).removeprefix("torch."),
        "compile": is_compiled,
        "params": counts,
        "git_commit": git_commit() if shutil.which("git") else None,
        "resumed_from": {"step": step, "path": origin} if origin else None,
        "pid": os.getpid(),
    },
)
if origin:
    record.event(run_dir, "resume", step=step, path=origin, passed_over=[list(item) for item in passed])
    print(f"resume: from step {step}, {origin}")
else:
    record.event(run_dir, "start", init_from=cfg.init_from or None)
print(
    f"model: {counts['total']:,} parameters, {counts['ternary']:,} ternary; {machine.describe(device)}, "
    f"{str(dtype).removeprefix('torch.')}, compile {'on' if is_compiled else 'off'}; "
    f"{cfg.total_batch_size:,} tokens a step = {cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}, "
    f"{cfg.max_steps * cfg.total_batch_size / 1e6:,.1f}M tokens in all"
)

# signals, saving, evaluating, sampling

interrupted = 0  # the signal that asks this run to stop; polled, so that nothing is left half done


def on_signal(signum, frame):
    global interrupted
    if interrupted:  # the second one: at once. a rename is one call, which this cannot cut in two
        os._exit(128 + signum)
    interrupted = signum


signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)

bar = tqdm(total=cfg.max_steps, initial=step, disable=not sys.stderr.isatty(), unit="step", dynamic_ncols=True)
boundary = optim.boundary(cfg)
boundary_steps = {boundary - 1, boundary} if 0 < boundary < cfg.max_steps else set()
sequences_per_step = cfg.batch_size * cfg.accumulation
peak_flops = machine.peak_flops(device, dtype)
saved_config = {name: value for name, value in vars(cfg).items() if name != "origin"}


def log_line(text, on_bar=False):
    """a line of train.log, also shown on stderr unless a bar shows the same"""
    with open(os.path.join(run_dir, "train.log"), "a", encoding="utf-8") as file:
        file.write(text + "\n")
    if bar.disable:
        print(text, file=sys.stderr, flush=True)
    elif not on_bar:
        bar.write(text, file=sys.stderr)


def scheduled(at):
    """whether a checkpoint of this step is wanted whatever its loss"""
    return at > 0 and ((cfg.save_every and at % cfg.save_every == 0) or at in boundary_steps or at == cfg.max_steps)


def save(why):
    """the state before the update at `step`, with the evaluations before this step: resuming makes this one's again.
    Returns whether it is on disk: a disk that is full costs a warning and leaves what was there."""
    folder = checkpoint.step_dir(run_dir, step)
    if step in checkpoint.steps(run_dir):
        return True
    model_part = dict(
        format=checkpoint.FORMAT,
        step=step,
        tokens=step * cfg.total_batch_size,
        config=saved_config,
        tokenizer=tokenizer_spec,
        model=model.state_dict(),
    )
    trainer_part = dict(
        format=checkpoint.FORMAT,
        step=step,
        optimizer=optimizer.state_dict(),
        best=best,
        stale_evals=stale_evals,
        skipped=skipped + int(skips[0]),
        streak=[int(skips[1]), int(skips[2])],
    )
    try:
        checkpoint.save(run_dir, step, model_part, trainer_part)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a failed write
        log_line(f"warning: step {step} could not be saved ({error}); the partial is removed, earlier checkpoints stay")
        record.event(run_dir, "anomaly", step=step, what="save failed", error=str(error))
        return False
    record.event(run_dir, "save", step=step, path=folder, why=why)
    checkpoint.prune(run_dir, cfg.keep_last, boundary_steps | {best.get("step", -1)})
    return True


def evaluate():
    """validation loss in nats per token, logged; None where a signal came"""
    began = time.perf_counter()
    with machine.autocast(device, dtype):
        loss = mean_loss(model, val_windows.fixed(cfg.eval_tokens, cfg.batch_size, device), stop=lambda: interrupted)
    if loss is None:
        return None
    record.append(run_dir, record.SCALARS, step=step, val_loss=loss, val_perplexity=perplexity(loss))
    log_line(f"eval {step}/{cfg.max_steps}  val_loss {loss:.4f}  perplexity {perplexity(loss):.2f}  {time.perf_counter() - began:.1f} s")
    return loss


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # e^700 is the largest that a float holds


MODES = {
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=0.8, top_k=50),
    "nucleus": dict(temperature=0.8, top_p=0.95),
}


def repetition(ids):
    """share of the 4-grams of a text that it has had before; 0 for text that never repeats itself"""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def sample():
    """every prompt in every mode into samples.jsonl, by a generator of its own"""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    model.eval()
    for mode, options in MODES.items():
        for text, ids in zip(cfg.sample_prompts, prompts):
            new = []
            prompt = torch.tensor([ids], device=device)
            with machine.autocast(device, dtype):
                for token in generate(model, prompt, cfg.sample_tokens, generator=generator, **options):
                    new.append(token)
                    if interrupted:
                        return
            new = torch.cat(new, 1)[0].tolist() if new else []
            fields = dict(prompt=text, generated_text=tokenizer.decode(new), repetition=round(repetition(new), 4))
            record.append(run_dir, record.SAMPLES, step=step, mode=mode, **fields)
    model.train()


def step_seed(at):
    """seed of all random numbers of a step: the same whether the run got there in one go or resumed"""
    return int.from_bytes(hashlib.blake2b(f"{cfg.seed}/{at}/0".encode(), digest_size=7).digest(), "little")


def hand_over():
    """what an interrupted run leaves: the state at the beginning of its step"""
    optimizer.zero_grad()
    on_disk = save("interrupt")
    record.event(run_dir, "interrupt", step=step, signal=interrupted)
    bar.close()
    if on_disk:
        print(f"stopped by signal {interrupted}, saved step {step}; go on with the same command and --resume=auto", file=sys.stderr)
    sys.exit(128 + interrupted)


# the loop

skips = torch.zeros(3, device=device)  # steps skipped in this process; in a row up to now; most in a row since a log line
skips[1], skips[2] = streak
began = clock = time.perf_counter()
timed_steps, timed, speed, val_loss = 0, 0.0, None, None  # steps and seconds since the last line, without pauses
last = next((line for line in reversed(record.read(run_dir, record.SCALARS)) if "loss" in line), {})
codes = quant.codes(model) if cfg.ternary and step % cfg.log_every == 0 else None  # else those of the last line are gone
model.train()


def next_batch(micro):
    """inputs, targets of micro-step `micro` of the current step (beyond its last: of the next step)"""
    return train_windows.batch(step * sequences_per_step + micro * cfg.batch_size, cfg.batch_size, device)


batch = next_batch(0)
while True:
    rate, decay = optim.set_rates(optimizer, cfg, step)
    out_of_time = cfg.max_minutes and time.perf_counter() - began > cfg.max_minutes * 60
    ending = step >= cfg.max_steps or out_of_time

    # save, then evaluate, then sample: what fails here costs nothing that was trained
    eval_due = cfg.eval_every and (step % cfg.eval_every == 0 or ending)
    sample_due = cfg.sample_every and step and (step % cfg.sample_every == 0 or ending)
    if ending or scheduled(step) or eval_due or sample_due:
        machine.synchronize(device)
        timed += time.perf_counter() - clock
        if (ending or scheduled(step)) and not save("end" if ending else "schedule") and ending:
            fail(f"the end of run {cfg.run_id} could not be saved; free disk space, then --resume=auto", code=1)
        if eval_due:
            val_loss = evaluate()
            if val_loss is not None and step and val_loss < best.get("val_loss", math.inf):
                save("best")  # holds the former best, as resuming from it evaluates again
                former, best, stale_evals = best, {"step": step, "val_loss": val_loss}, 0
                record.write_best(run_dir, best)
                if former and not scheduled(former["step"]) and former["step"] != step:
                    checkpoint.remove(checkpoint.step_dir(run_dir, former["step"]))
            elif val_loss is not None and step:
                stale_evals += 1
            if cfg.patience and stale_evals >= cfg.patience and not ending and save("end"):
                log_line(f"patience: no better validation loss in {stale_evals} evaluations; the best was at step {best['step']}")
                ending, sample_due = True, cfg.sample_every > 0
        if sample_due and not interrupted:
            sample()
        clock = time.perf_counter()
    if interrupted:
        hand_over()
    if ending:
        break

    # one update
    torch.manual_seed(step_seed(step))
    try:
        loss_sum = torch.zeros((), device=device)
        for micro in range(cfg.accumulation):
            with machine.autocast(device, dtype):
                loss = step_model(*batch)
            batch = next_batch(micro + 1)  # while the device computes
            (loss / cfg.accumulation).backward()
            loss_sum += loss.detach()
            if interrupted:
                hand_over()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        # a step that is not finite is skipped on the device: fused AdamW leaves weights and state alone where found_inf is 1
        bad = (~(loss_sum + norm).isfinite()).float()
        optimizer.found_inf = bad
        optimizer.step()
    except torch.OutOfMemoryError:
        bar.close()
        fail(
            f"out of memory on {machine.describe(device)} at batch_size = {cfg.batch_size}: halve it "
            f"(--batch_size={max(1, cfg.batch_size // 2)} --total_batch_size={cfg.total_batch_size}); the result does not change",
            code=1,
        )
    except Exception:
        if interrupted:  # Ctrl-C reached the compiler that torch.compile had started
            hand_over()
        raise
    optimizer.zero_grad()
    skips[0] += bad
    skips[1] = (skips[1] + 1) * bad
    skips[2] = torch.maximum(skips[2], skips[1])
    step += 1
    bar.update()
    timed_steps += 1
    if step == start_step + 1:  # compilation and warming up are not speed
        machine.synchronize(device)
        clock, timed, timed_steps = time.perf_counter(), 0.0, 0

    # log
    if step % cfg.log_every == 0 or step == cfg.max_steps:
        loss, norm, n_skipped, _, worst = torch.stack([loss_sum / cfg.accumulation, norm, *skips]).tolist()
        timed += time.perf_counter() - clock
        step_ms = 1e3 * timed / timed_steps if timed_steps else None
        speed = 1e3 * cfg.total_batch_size / step_ms if step_ms else None
        last = dict(
            step=step,
            epoch=step * sequences_per_step / train_windows.total,
            tokens=step * cfg.total_batch_size,
            loss=loss,
            lr=rate,
            weight_decay=decay,
            stage=optim.stage(cfg, step - 1),
            grad_norm=norm,
            tokens_per_sec=speed,
            step_ms=step_ms,
            mfu=speed * model.flops_per_token() / peak_flops if speed and peak_flops else None,
            memory_gb=machine.peak_memory_gb(device),
            gpu_util=machine.utilization(device),
            time=round(time.time(), 3),
        )
        record.append(run_dir, record.SCALARS, **last)
        eta = tqdm.format_interval((cfg.max_steps - step) * step_ms / 1e3) if step_ms else "?"
        shown = f"loss {loss:.4f}  lr {rate:.2e}  wd {decay:g}  stage {last['stage']}"
        log_line(
            f"step {step}/{cfg.max_steps}  {100 * step / cfg.max_steps:.1f}%  {shown}  grad {norm:.2f}  "
            f"{speed or 0:,.0f} tok/s  eta {eta}",
            on_bar=True,
        )
        bar.set_postfix_str(f"{shown}  {speed or 0:,.0f} tok/s")
        if cfg.ternary:
            health, codes = quant.health(model, codes, batch[0][:1])
            record.append(run_dir, record.BITNET, step=step, **health)
        if n_skipped > 0:
            record.event(run_dir, "anomaly", step=step, what="not finite, skipped", steps=int(n_skipped))
            log_line(f"warning: {int(n_skipped)} steps were skipped: loss or gradient was not finite")
            skipped += int(n_skipped)
        skips[0] = 0
        if worst >= 5:
            saved = checkpoint.steps(run_dir)
            where = checkpoint.step_dir(run_dir, saved[0]) if saved else "none yet"
            bar.close()
            fail(
                f"{int(worst)} steps in a row were not finite by step {step}; the last good checkpoint: {where}; "
                "resume from it with a lower learning_rate",
                code=1,
            )
        skips[2] = skips[1]
        timed_steps, timed, clock = 0, 0.0, time.perf_counter()

# the end

bar.close()
tokens_per_byte = meta["tokens"]["val"] / meta["bytes"]["val"] if meta["bytes"].get("val") else None
result = dict(
    run_id=cfg.run_id,
    step=step,
    tokens=step * cfg.total_batch_size,
    loss=last.get("loss"),
    val_loss=val_loss,
    val_bits_per_byte=val_loss / math.log(2) * tokens_per_byte if val_loss is not None and tokens_per_byte else None,
    seconds=round(time.perf_counter() - began, 3),
    tokens_per_sec=speed,
    peak_memory_gb=machine.peak_memory_gb(device),
    checkpoint=checkpoint.step_dir(run_dir, step),
)
record.event(run_dir, "finish", result=result)
print(record.to_json(result))
