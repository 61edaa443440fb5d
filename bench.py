"""
Time an experiment, or plan it. Needs no prepared data.

    python bench.py config/train_baseline_95m.py --batch_size=4 --total_batch_size=1024
    python bench.py config/train_baseline_95m.py --compare          and nanoGPT, and the memory of both
    python bench.py config/train_baseline_95m.py --sample           speed of generating text
    python bench.py config/train_baseline_95m.py --sample --compare and the float twin's, and llama.cpp's
    python bench.py config/train_baseline_95m.py --plan             what lengths would take and reach
    python bench.py config/train_baseline_95m.py --plan --step_ms=695 --steps=60000,400000 --budget_hours=144

A training step of the experiment and one of its twin, float or ternary, alternate, so that a machine
whose speed drifts slows both. A step is a batch from token files, forward, backward, clipping and optimizer,
as in train.py, on random tokens; the first steps, which compile, are counted apart. With --plan and a speed
nothing is built and nothing timed. The last line of stdout is a JSON object, on a terminal only with --json.
"""

import datetime
import os
import signal
import sys

import config
from nanobit import terminal
from nanobit.cli import fail
from nanobit.data_set import Damaged, read_meta

FLAGS = {
    "pairs": (15, "timed steps of each model"),
    "warmup": (3, "steps of each before that, not counted"),
    "sample": (False, "time generating text instead of training"),
    "packed": (True, "sample: integer weights in ternary layers, as sample.py has them"),
    "head": ("float32", "sample: float32 | bfloat16, what the head is kept in"),
    "cuda_graph": (False, "sample: on CUDA, replay a token as one graph; not yet tried on a GPU"),
    "compare": (
        False,
        "also time nanoGPT's model of the same depth and width, and measure the twin's memory; with "
        "--sample, also time the float twin, a bfloat16 head and llama.cpp",
    ),
    "peers": ("..", "compare: the folder that holds a clone of nanoGPT"),
    "plan": (False, "a table of what lengths would take, cost and reach, with a recommendation"),
    "steps": ("", "plan: lengths to compare, as 60000,400000; '' = around the experiment's, or the budget"),
    "step_ms": (0.0, "plan: milliseconds of a step; 0 = timed here"),
    "tokens_per_sec": (0.0, "plan: the same as a throughput; given both, they are checked"),
    "budget_hours": (0.0, "plan: hours there are; 0 = as many as it takes"),
    "dataset_tokens": (0, "plan: tokens of training data; 0 = those of meta.json, where it is there"),
    "price_per_hour": (0.0, "plan: rent of the machine; 0 = none"),
    "watts": (0.0, "plan: what the machine draws, for the price of electricity"),
    "price_per_kwh": (0.0, "plan: the price of a kilowatt-hour"),
    "gpu_memory_gb": (0.0, "plan: memory of the card, for the largest batch_size; 0 = that of this device"),
    "json": (False, "print the line of JSON on a terminal too"),
    "calibrate": ("", "plan: the folder of a finished run, whose loss the law is shifted to"),
}
DISK_GB_PER_SEC, DECODE_TOKENS_PER_SEC = 0.25, 50.0  # assumed where nothing is timed
NANOGPT_VOCABULARY = 50304


def settings():
    """the checked settings; for the plan also claimed_tokens, total_tokens where the steps are given too, and
    val_tokens, those of the data set where it is there"""
    cfg = config.load(sys.argv[1:], __doc__, FLAGS, check_run=False)
    cfg.claimed_tokens, cfg.val_tokens, faults = 0, 0, []
    is_claim = cfg.max_steps or (cfg.steps and cfg.origin["total_tokens"].startswith("--"))
    if cfg.plan and cfg.total_tokens and is_claim:
        cfg.claimed_tokens, cfg.total_tokens = cfg.total_tokens, 0
    try:
        cfg.steps = sorted({int(float(text)) for text in cfg.steps.split(",")}) if cfg.steps else []
    except (ValueError, OverflowError):
        faults.append(
            f"steps = {cfg.steps!r} is not numbers with commas between them, as 60000,400000 (no 60,000)"
        )
        cfg.steps = []
    if cfg.plan and cfg.steps and not cfg.max_steps and not cfg.total_tokens:
        cfg.max_steps = cfg.steps[-1]
    config.check(cfg, faults)
    if cfg.steps and not 1 <= min(cfg.steps) <= max(cfg.steps) <= 10**9:
        faults.append(f"steps = {cfg.steps} must each be from 1 to 1,000,000,000")
    if cfg.pairs < 1 or cfg.warmup < 1:
        faults.append(f"pairs = {cfg.pairs} and warmup = {cfg.warmup} must be at least 1")
    for key, (default, _) in FLAGS.items():
        if type(default) in (int, float) and getattr(cfg, key) < 0:
            faults.append(f"{key} = {getattr(cfg, key)} must not be negative")
        for mode in ("sample", "plan", "compare"):
            if (
                cfg.origin[key] != "default"
                and FLAGS[key][1].startswith(f"{mode}:")
                and not getattr(cfg, mode)
            ):
                faults.append(f"--{key} is of --{mode}; add that")
    if cfg.plan and (cfg.sample or cfg.compare):
        faults.append("--plan goes with neither --sample nor --compare; it times what it needs")
    if cfg.head not in ("float32", "bfloat16"):
        faults.append(f"head = {cfg.head!r} is unknown; choose float32 or bfloat16")
    if bool(cfg.watts) != bool(cfg.price_per_kwh):
        faults.append(f"watts = {cfg.watts:g} and price_per_kwh = {cfg.price_per_kwh:g} need each other")
    cfg.nanogpt = os.path.join(cfg.peers, "nanoGPT", "model.py")
    if cfg.compare and not cfg.sample and not os.path.exists(cfg.nanogpt):
        how = "git clone https://github.com/karpathy/nanoGPT beside this folder, or say where it is: --peers="
        faults.append(f"{cfg.nanogpt} is not there; {how}")
    path, numbers = os.path.join(cfg.data_dir, cfg.dataset, "meta.json"), {}
    if os.path.exists(path):
        try:
            meta = read_meta(os.path.dirname(path))
            numbers = {"vocab_size": meta["vocab_size"], "val_tokens": meta["tokens"].get("val", 0)}
            numbers["dataset_tokens"] = meta["tokens"].get("train", 0)
        except Damaged as error:
            faults.append(str(error))
    for key, number in numbers.items():
        setattr(cfg, key, getattr(cfg, key) or number)
    if not cfg.vocab_size and not faults:
        faults.append(f"vocab_size = 0 means the data set's, and {path} is not there; set --vocab_size=")
    if cfg.compare and not cfg.sample and cfg.vocab_size > NANOGPT_VOCABULARY:
        faults.append(
            f"compare: nanoGPT's model has {NANOGPT_VOCABULARY} tokens; set a smaller --vocab_size="
        )
    if faults:
        fail(*faults)
    return cfg


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it
    terminal.end_with_output()
    cfg = settings()  # mistakes are told before torch is imported

import torch

from model import Transformer
from nanobit import machine, record
from nanobit.bench import planner, timing
from nanobit.bench.planner import count, hours, size

# the plan


def assumed_seconds(cfg, counts, step_ms):
    """the same where nothing is timed: a forward is a third of a step, the rest is assumed"""
    evaluation = (cfg.eval_tokens or cfg.val_tokens) / cfg.total_batch_size * step_ms / 3e3
    samples = 3 * len(cfg.sample_prompts) * cfg.sample_tokens / DECODE_TOKENS_PER_SEC
    return evaluation, samples, 12 * counts["total"] / 1e9 / DISK_GB_PER_SEC


def plan(cfg, counts, step_ms, once, device):
    """print the plan; its part of the JSON line. once: see timing.once_seconds"""
    cost = dict(
        step_ms=step_ms,
        dataset_tokens=cfg.dataset_tokens,
        per_hour=cfg.price_per_hour + cfg.watts / 1e3 * cfg.price_per_kwh,
        budget_hours=cfg.budget_hours,
        offset=cfg.offset,
        now=datetime.datetime.now(),
        **dict(zip(("eval_seconds", "sample_seconds", "save_seconds"), once)),
    )
    steps = cfg.steps or planner.candidates(cfg, step_ms, cfg.budget_hours)
    rows = [planner.row(cfg, counts, n, cost) for n in steps]
    by = ", by step_ms" if cfg.step_ms and cfg.tokens_per_sec else ""
    print(f"\n{step_ms:,.1f} ms a step, {1e3 * cfg.total_batch_size / step_ms:,.0f} tokens/s{by}")
    print(
        f"{'steps':>10} {'tokens':>8} {'T/P':>6} {'epochs':>6} {'hours':>8} {'in all':>8}  {'finish':16} "
        f"{'disk':>8} {'loss':>5}" + (f" {'price':>8}" if cost["per_hour"] else "")
    )
    for each in rows:
        epochs = "-" if each["epochs"] is None else f"{each['epochs']:.2f}"
        price = f" {each['price']:8,.2f}" if cost["per_hour"] else ""
        loss = "    -" if each["expected_loss"] is None else f"{each['expected_loss']:5.2f}"
        print(
            f"{each['steps']:10,} {count(each['tokens']):>8} {each['tokens_per_param']:6.1f} {epochs:>6} "
            f"{hours(each['hours']):>8} {hours(each['hours_total']):>8}  {each['finish']:16} "
            f"{size(each['checkpoint_gb'] + each['log_gb']):>8} {loss}{price}"
        )
    print(
        f"in all: with {once[0]:,.1f} s an evaluation, {once[1]:,.1f} s a round of samples, {once[2]:,.1f} s "
        f"a checkpoint{' (assumed)' if cfg.step_ms or cfg.tokens_per_sec else ''}; disk: checkpoints and logs"
    )
    calibrated = (
        f"shifted by {cfg.offset:+.2f} to {cfg.calibrate}" if cfg.calibrate else "uncalibrated, +-0.3"
    )
    print(f"loss: in nats per token by a scaling law, {calibrated}; its differences say more than itself")

    wanted = 4 if cfg.dtype == "float32" else 2  # of a device that is not here
    dtype_bytes = machine.pick_dtype(cfg.dtype, device).itemsize if device else wanted
    gpu_memory_gb = cfg.gpu_memory_gb
    if not gpu_memory_gb and device is not None and device.type == "cuda":
        gpu_memory_gb = torch.cuda.get_device_properties(device).total_memory / 1e9
    memory = planner.memory_gb(cfg, counts, cfg.batch_size, dtype_bytes)
    print(
        f"memory: about {size(memory)} with batch_size = {cfg.batch_size}, {8 * dtype_bytes}-bit"
        f"{', compiled' if cfg.compile else '; without compile up to twice the activations'}"
    )
    warnings, largest = [], None
    if gpu_memory_gb:
        largest = planner.largest_batch_size(cfg, counts, gpu_memory_gb, dtype_bytes)
        whole = f"of the {cfg.total_batch_size // cfg.seq_len} sequences of a step"
        print(f"largest batch_size that fits in {gpu_memory_gb:g} GB: {largest}, {whole}")
        if largest < cfg.batch_size:
            warnings.append(
                f"batch_size = {cfg.batch_size} takes about {size(memory)} and gpu_memory_gb = "
                f"{gpu_memory_gb:g}; use {largest or 'a smaller model'}"
            )

    claim = dict(
        step_ms=cfg.step_ms,
        tokens_per_sec=cfg.tokens_per_sec,
        tokens=cfg.claimed_tokens,
        steps=cfg.steps[-1] if cfg.steps else cfg.max_steps,
        budget_hours=cfg.budget_hours,
    )
    warnings += planner.contradictions(cfg, claim, rows) + planner.cautions(cfg, counts, rows, cost)
    if cfg.eval_every and not cfg.eval_tokens and not cfg.val_tokens:
        warnings.append(
            "eval_tokens = 0 is all of a validation set that is not here: its time is not counted"
        )
    chosen, sentence = planner.recommendation(rows, cfg.max_steps)
    stones = planner.milestones(cfg, counts, (chosen or rows[-1])["steps"], cost)
    print(f"\nmilestones of {stones[-1]['steps']:,} steps:")
    for i, each in enumerate(stones):
        if each["what"] or i % (1 + len(stones) // 20) == 0:
            behind = f"{count(each['tokens']):>8} {hours(each['hours_total']):>8} h  {each['finish']}"
            print(f"{each['steps']:10,} {behind}  {each['what']}".rstrip())
    for text in warnings:
        print(f"warning: {text}")
    print(f"\nrecommended: {sentence}")
    return dict(
        rows=rows,
        milestones=stones,
        memory_gb=memory,
        largest_batch_size=largest,
        is_calibrated=bool(cfg.calibrate),
        warnings=warnings,
        recommendation=sentence,
    )


def main(cfg):
    with torch.device("meta"):
        counts = Transformer(cfg).counts()
    facts = dict(params=counts["total"], params_active=counts["active"], params_ternary=counts["ternary"])
    print(f"{counts['total']:,} parameters, {counts['active']:,} active, {counts['ternary']:,} ternary")
    cfg.offset = planner.calibration(cfg.calibrate) if cfg.calibrate else 0.0
    step_ms, device, once = cfg.step_ms, None, None
    if cfg.tokens_per_sec and not step_ms:
        step_ms = 1e3 * cfg.total_batch_size / cfg.tokens_per_sec
    if step_ms:
        found = dict(step_ms=step_ms, tokens_per_sec=1e3 * cfg.total_batch_size / step_ms)
        once = assumed_seconds(cfg, counts, step_ms)
    else:
        device = machine.pick(cfg.device)
        dtype = machine.pick_dtype(cfg.dtype, device)
        machine.explain_out_of_memory(cfg, device)
        if cfg.deterministic:
            machine.make_deterministic()
        print(f"{machine.describe(device)}, {machine.name(dtype)}", flush=True)
        facts |= dict(device=machine.describe(device), dtype=machine.name(dtype), compile=False)
        if cfg.sample:
            found = timing.sampling(cfg, device, dtype)
        else:
            found = timing.training(cfg, device, dtype, alone=cfg.plan)
        if cfg.plan:
            once = timing.once_seconds(cfg, device, dtype)
    if cfg.plan:
        found |= plan(cfg, counts, found["step_ms"], once, device)
    if cfg.json or not sys.stdout.isatty():
        print(record.to_json(facts | found))


if __name__ == "__main__":
    main(cfg)
