"""Time an experiment, or plan it. Needs no prepared data if vocab_size is set.

    python bench.py config/train_baseline_95m.py --batch_size=4 --total_batch_size=1024
    python bench.py config/train_baseline_95m.py --compare          and nanoGPT, and the memory of both
    python bench.py config/train_baseline_95m.py --sample           speed of generating text
    python bench.py config/train_baseline_95m.py --sample --compare and the float twin's, and llama.cpp's
    python bench.py config/train_baseline_95m.py --plan             what lengths would take and reach
    python bench.py config/train_baseline_95m.py --plan --step_ms=695 --steps=60000,400000 --budget_hours=144

Steps of the experiment and of its float or ternary twin alternate, so that a machine whose speed drifts slows
both. They are those of train.py, on random tokens; the first ones, which compile, do not count. With --plan
and a speed, nothing is timed. The last line of stdout is a JSON object, on a terminal only with --json."""

import os

import config
from nanobit.cli import JSON, Flag
from nanobit.data_set import Damaged, read_meta

FLAGS = {
    "pairs": Flag(15, "timed steps of each model; with --sample half as many texts", within="[1, inf)"),
    "warmup": Flag(3, "steps of each before that, not counted", within="[1, inf)"),
    "sample": Flag(False, "time generating text instead of training, in float32 without --dtype"),
    "packed": Flag(True, "integer weights in ternary layers, as in sample.py", only_with="sample"),
    "head": Flag("float32", "float32 | bfloat16 | int8, as in sample.py", config.HEADS, only_with="sample"),
    "compare": Flag(False, "also nanoGPT and memory; with --sample the twin, other heads, llama.cpp"),
    "peers": Flag("..", "the folder that holds a clone of nanoGPT", only_with="compare"),
    "plan": Flag(False, "print a table of lengths: time, cost, expected loss", not_with="sample compare"),
    "steps": Flag("", "lengths, as 60000,400000; '' = around max_steps or the budget", only_with="plan"),
    "step_ms": Flag(0.0, "milliseconds of a step; 0 = timed here", only_with="plan"),
    "tokens_per_sec": Flag(0.0, "the same as a throughput; given both, they are compared", only_with="plan"),
    "budget_hours": Flag(0.0, "hours that may be used; 0 = any number", only_with="plan"),
    "dataset_tokens": Flag(0, "tokens of training data; 0 = those of meta.json, if any", only_with="plan"),
    "price_per_hour": Flag(0.0, "rent of the machine", only_with="plan"),
    "watts": Flag(0.0, "power of the machine, for the price of electricity", only_with="plan price_per_kwh"),
    "price_per_kwh": Flag(0.0, "price of a kilowatt-hour", only_with="plan watts"),
    "gpu_memory_gb": Flag(0.0, "memory for the largest batch_size; 0 = this device's", only_with="plan"),
    "json": JSON,
    "calibrate": Flag("", "folder of a finished run: shift the expected loss to its loss", only_with="plan"),
}


def derive(cfg):
    """Add what the plan needs: steps as a list, claimed_tokens (total_tokens if the steps are given too), and
    val_tokens and dataset_tokens of the data set, if it exists. Yield the faults."""
    cfg.claimed_tokens = cfg.val_tokens = 0
    is_claim = cfg.max_steps or (cfg.steps and cfg.origin["total_tokens"].startswith("--"))
    if cfg.plan and cfg.total_tokens and is_claim:
        cfg.claimed_tokens = cfg.total_tokens
        cfg.total_tokens = 0
    try:
        cfg.steps = sorted({int(float(text)) for text in cfg.steps.split(",") if cfg.steps})
    except (ValueError, OverflowError):
        yield f"steps = {cfg.steps!r} is not numbers with commas between them, as 60000,400000"
        cfg.steps = []
    if cfg.steps and not 1 <= cfg.steps[0] <= cfg.steps[-1] <= 10**9:
        yield f"steps = {cfg.steps} must each be from 1 to 1,000,000,000"
    if cfg.sample and cfg.origin["dtype"] == "default":
        cfg.dtype = "float32"  # as in sample.py
    if cfg.plan and cfg.steps and not cfg.max_steps and not cfg.total_tokens:
        cfg.max_steps = cfg.steps[-1]
    path = os.path.join(cfg.data_dir, cfg.dataset, "meta.json")
    if os.path.exists(path):
        try:
            meta = read_meta(os.path.dirname(path))
            cfg.val_tokens = meta["tokens"].get("val", 0)
            cfg.dataset_tokens = cfg.dataset_tokens or meta["tokens"].get("train", 0)
            cfg.vocab_size = cfg.vocab_size or meta["vocab_size"]
        except Damaged as error:
            yield str(error)
    elif not cfg.vocab_size:
        yield f"vocab_size = 0 is the data set's, but {path} does not exist; set --vocab_size="
    if cfg.compare and not cfg.sample:
        cfg.nanogpt = os.path.join(cfg.peers, "nanoGPT", "model.py")
        if not os.path.exists(cfg.nanogpt):
            remedy = "git clone https://github.com/karpathy/nanoGPT beside this folder, or set --peers="
            yield f"{cfg.nanogpt} does not exist; {remedy}"
        if cfg.vocab_size > 50304:
            yield f"vocab_size = {cfg.vocab_size}: nanoGPT has 50304 tokens; choose a smaller one"


def main(cfg):
    import torch  # takes seconds, so only once the flags are right

    from model import Transformer
    from nanobit import machine, record
    from nanobit.bench import generation, peers, planner, report, timing

    with torch.device("meta"):
        counts = Transformer(cfg).counts()
    facts = dict(params=counts["total"], params_active=counts["active"], params_ternary=counts["ternary"])
    print(f"{counts['total']:,} parameters, {counts['active']:,} active, {counts['ternary']:,} ternary")
    cfg.offset = planner.calibration(cfg.calibrate) if cfg.calibrate else 0.0
    device = None
    if cfg.step_ms or cfg.tokens_per_sec:
        step_ms = cfg.step_ms or 1e3 * cfg.total_batch_size / cfg.tokens_per_sec
        facts |= dict(step_ms=step_ms, tokens_per_sec=1e3 * cfg.total_batch_size / step_ms)
        once = planner.assumed_seconds(cfg, counts, step_ms)
    else:
        device = machine.pick(cfg.device)
        dtype = machine.training_dtype(cfg, device)
        machine.explain_out_of_memory(cfg, device)
        if cfg.deterministic:
            machine.make_deterministic()
        print(f"{machine.describe(device)}, {machine.name(dtype)}", flush=True)
        facts |= dict(device=machine.describe(device), dtype=machine.name(dtype), compile=False)
        if cfg.sample:
            facts |= generation.sampling(cfg, device, dtype, peers.writers if cfg.compare else None)
        elif cfg.compare:
            facts |= peers.training(cfg, device, dtype)
        else:
            facts |= timing.training(cfg, device, dtype, twin=not cfg.plan)[0]
        if cfg.plan:
            once = timing.once_seconds(cfg, device, dtype)
    if cfg.plan:
        facts |= report.print_plan(cfg, counts, facts["step_ms"], once, device)
    record.print_result(facts, cfg.json)


if __name__ == "__main__":
    main(config.load(doc=__doc__, flags=FLAGS, derive=derive))
