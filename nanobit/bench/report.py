"""Print the plan of a run: its table, what contradicts itself or is unwise, and a recommendation."""

import datetime
import math

import torch

from nanobit import machine
from nanobit.bench import planner
from nanobit.bench.planner import SMALLEST

GOOD_EPOCHS, BAD_EPOCHS = 4, 16  # after the first repetition costs, after the second most of it is wasted
ENOUGH = 0.02  # nats: a longer run that gains less is not worth its hours, even within the budget
WORTHWHILE = 0.1  # nats for each doubling of the hours, without a budget
SLACK = 0.02  # numbers of a plan that differ by less agree


def hours(value):
    """Return hours in words: 0.05, 77.2, 1,234.0."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def count(tokens):
    """Return a number of tokens in words: 3.28B, 0.49B, 49.15M, 768."""
    if tokens >= 1e8:
        return f"{tokens / 1e9:.2f}B"
    if tokens >= 1e5:
        return f"{tokens / 1e6:.2f}M"
    return f"{tokens:,}"


def size(gb):
    """Return a size of so many 1e9 bytes in words: 22.2 GB, 35 MB."""
    return f"{gb:.1f} GB" if gb >= 1 else f"{1e3 * gb:.0f} MB"


def contradictions(cfg, rows):
    """Yield a sentence for each two numbers of a plan that do not agree."""
    batch = cfg.total_batch_size
    longest = rows[-1]["steps"]

    def takes(step_ms):
        needed = longest * step_ms / 3.6e6
        text = f"{hours(needed)} hours for {longest:,} steps"
        if cfg.budget_hours and needed > cfg.budget_hours:
            text += f", over the budget of {cfg.budget_hours:g}"
        return text

    if cfg.step_ms and cfg.tokens_per_sec:
        speed = f"{cfg.tokens_per_sec:,.0f}"
        step_ms = f"{cfg.step_ms:g}"
        by_speed = 1e3 * batch / cfg.tokens_per_sec
        by_step = 1e3 * batch / cfg.step_ms
        if abs(by_step / cfg.tokens_per_sec - 1) > SLACK:
            yield (
                f"with {batch:,} tokens a step, tokens_per_sec = {speed} contradicts step_ms = {step_ms}: "
                f"{speed} tokens/s are {by_speed / 1e3:.2f} s a step and {takes(by_speed)}; "
                f"{step_ms} ms are {by_step:,.0f} tokens/s and {takes(cfg.step_ms)}; the rows use step_ms"
            )
    tokens, steps = cfg.claimed_tokens, (cfg.steps or [cfg.max_steps])[-1]
    if tokens and abs(steps * batch / tokens - 1) > SLACK:
        yield (
            f"total_tokens = {tokens:,} does not follow from steps x batch: {steps:,} steps of {batch:,} "
            f"tokens are {steps * batch:,}; {tokens:,} tokens take {-(-tokens // batch):,} steps"
        )
    for plan in rows:
        if (plan["spare_hours"] or 0) < 0:
            needed = f"{hours(plan['hours'])} hours, {hours(plan['hours_total'])} with evaluations and saves"
            yield f"budget_hours = {cfg.budget_hours:g} does not hold {plan['steps']:,} steps: {needed}"


def cautions(cfg, counts, rows, cost):
    """Yield a sentence for each unwise number of a plan."""
    for plan in rows:
        epochs = plan["epochs"] or 0
        if epochs > GOOD_EPOCHS:
            effect = "most of it is wasted" if epochs > BAD_EPOCHS else "repetition begins to cost"
            worth = f"they teach as {planner.worth(epochs, 1) / epochs:.0%} of new ones"
            yield f"{plan['steps']:,} steps see the data {epochs:.1f} times: {effect} ({worth})"
        if cfg.warmup_steps > 0.1 * plan["steps"]:
            yield f"{plan['steps']:,} steps: warmup_steps = {cfg.warmup_steps} are more than a tenth of them"
    if counts["active"] < SMALLEST:
        yield f"expected_loss: the scaling law does not hold for so small a model ({counts['active']:,})"
        return
    if short := [f"{plan['steps']:,} steps" for plan in rows if plan["tokens_per_active_param"] < 20]:
        few = "fewer than 20 tokens for each parameter"
        yield f"{', '.join(short)}: {few}: a smaller model reaches a lower loss at the same cost"
    if counts["active"] < counts["total"]:
        longest = rows[-1]
        others = (cost["dataset_tokens"], cfg.ternary, cost["offset"])
        loss = planner.expected_loss(counts["total"], longest["tokens"], *others)
        of_all = f"with all of them the law gives {loss:.2f} at {longest['steps']:,} steps"
        yield f"expected_loss of a mixture is a heuristic: it counts the active parameters; {of_all}"


def recommendation(rows, own):
    """Return (the row to take or None, a sentence with the reason): with a budget the shortest that is nearly
    as good as the best, without one the last that is worth its hours, without a loss the experiment's own."""
    has_budget = rows[0]["spare_hours"] is not None
    fit = [plan for plan in rows if not has_budget or plan["spare_hours"] >= 0]
    if not fit:
        least = f"{rows[0]['steps']:,} steps take {hours(rows[0]['hours_total'])} hours"
        return None, f"none: even {least}, over the budget; plan fewer, a smaller model or a faster device"
    sound = [plan for plan in fit if (plan["epochs"] or 0) <= GOOD_EPOCHS] or fit[:1]
    losses = [plan["expected_loss"] for plan in sound]
    chosen = sound[-1]
    if None in losses:
        chosen = next((plan for plan in sound if plan["steps"] == own and not has_budget), chosen)
    elif has_budget:
        chosen = next(plan for plan in sound if plan["expected_loss"] <= min(losses) + ENOUGH)
    else:
        for shorter in reversed(sound[:-1]):
            gain = shorter["expected_loss"] - chosen["expected_loss"]
            if gain / math.log2(chosen["steps"] / shorter["steps"]) >= WORTHWHILE:
                break
            chosen = shorter
    longer = next((plan for plan in rows if plan["steps"] > chosen["steps"]), None)
    reason = f"{chosen['tokens_per_param']:.1f} tokens per parameter"
    if longer is None:
        reason += ", the longest of these lengths"
    elif longer not in fit:
        reason += f", and {longer['steps']:,} steps do not fit the budget"
    elif longer not in sound:
        reason += f", and {longer['steps']:,} steps would repeat the data {longer['epochs']:.1f} times"
    elif None in losses:
        reason += ", the experiment's own length"
    else:
        gain = chosen["expected_loss"] - longer["expected_loss"]
        more = hours(longer["hours"] - chosen["hours"])
        reason += f", and {more} hours more, to {longer['steps']:,} steps, buy only {gain:.3f} nats"
    sentence = f"{chosen['steps']:,} steps: {reason}; it takes {hours(chosen['hours_total'])} hours"
    if has_budget:
        sentence += f" and leaves {hours(chosen['spare_hours'])} of the budget"
    return chosen, sentence


def print_rows(rows):
    """Print the table of a plan."""
    has_price = rows[0]["price"] is not None
    header = f"{'steps':>10} {'tokens':>8} {'T/P':>6} {'epochs':>6} {'hours':>8} {'in all':>8}  "
    print(f"{header}{'finish':16} {'disk':>8} {'loss':>5}" + f" {'price':>8}" * has_price)
    for plan in rows:
        numbers = (plan["epochs"], plan["expected_loss"], plan["price"])
        epochs, loss, price = ("-" if value is None else f"{value:,.2f}" for value in numbers)
        print(
            f"{plan['steps']:10,} {count(plan['tokens']):>8} {plan['tokens_per_param']:6.1f} {epochs:>6} "
            f"{hours(plan['hours']):>8} {hours(plan['hours_total']):>8}  {plan['finish']:16} "
            f"{size(plan['checkpoint_gb'] + plan['log_gb']):>8} {loss:>5}" + f" {price:>8}" * has_price
        )


def print_memory(cfg, counts, device):
    """Print the memory of a step and the largest batch_size that fits; return both and the warnings."""
    dtype_bytes = {"float32": 4}.get(cfg.dtype, 2)  # of a device that is not here
    gpu_memory_gb = cfg.gpu_memory_gb
    if device:
        dtype_bytes = machine.training_dtype(cfg, device).itemsize
    if not gpu_memory_gb and device and device.type == "cuda":
        gpu_memory_gb = torch.cuda.get_device_properties(device).total_memory / 1e9
    compiled = {True: "compiled", False: "without compile up to twice the activations"}[bool(cfg.compile)]
    memory = planner.memory_gb(cfg, counts, cfg.batch_size, dtype_bytes)
    needs = f"about {size(memory)} with batch_size = {cfg.batch_size}"
    print(f"memory: {needs}, {8 * dtype_bytes}-bit, {compiled}")
    if not gpu_memory_gb:
        return memory, None, []
    largest = planner.largest_batch_size(cfg, counts, gpu_memory_gb, dtype_bytes)
    whole = f"of the {cfg.total_batch_size // cfg.seq_len} sequences of a step"
    print(f"largest batch_size that fits in {gpu_memory_gb:g} GB: {largest}, {whole}")
    if largest >= cfg.batch_size:
        return memory, largest, []
    remedy = f"use {largest or 'a smaller model'}"
    return memory, largest, [f"a step needs {needs}, and gpu_memory_gb = {gpu_memory_gb:g}; {remedy}"]


def print_plan(cfg, counts, step_ms, once, device):
    """Print a plan; return its part of the JSON line. once: seconds of an evaluation, a round of samples and
    a checkpoint; device: None if the speed was given, not timed."""
    cost = dict(zip(("eval_seconds", "sample_seconds", "save_seconds"), once), step_ms=step_ms)
    cost |= {name: getattr(cfg, name) for name in ("dataset_tokens", "budget_hours", "offset")}
    cost["per_hour"] = cfg.price_per_hour + cfg.watts / 1e3 * cfg.price_per_kwh
    cost["now"] = datetime.datetime.now()
    steps = cfg.steps or planner.candidates(cfg, step_ms, cfg.budget_hours)
    rows = [planner.row(cfg, counts, n, cost) for n in steps]
    speed = f"{step_ms:,.1f} ms a step, {1e3 * cfg.total_batch_size / step_ms:,.0f} tokens/s"
    if cfg.step_ms and cfg.tokens_per_sec:
        speed += ", by step_ms"
    print(f"\n{speed}")
    print_rows(rows)
    extra = "{:,.1f} s an evaluation, {:,.1f} s a round of samples, {:,.1f} s a checkpoint".format(*once)
    if not device:
        extra += " (assumed)"
    print(f"in all: with {extra}; disk: checkpoints and logs")
    shift = f"shifted by {cfg.offset:+.2f} to {cfg.calibrate}" if cfg.calibrate else "uncalibrated, +-0.3"
    print(f"loss: in nats per token by a scaling law, {shift}; trust its differences more than its values")
    memory, largest, warnings = print_memory(cfg, counts, device)
    warnings += [*contradictions(cfg, rows), *cautions(cfg, counts, rows, cost)]
    if cfg.eval_every and not planner.evaluated_tokens(cfg):
        warnings.append("eval_tokens = 0, but the validation set is missing: its time is not counted")
    chosen, sentence = recommendation(rows, cfg.max_steps)
    stones = planner.milestones(cfg, counts, (chosen or rows[-1])["steps"], cost)
    print(f"\nmilestones of {stones[-1]['steps']:,} steps:")
    for i, stone in enumerate(stones):
        if stone["what"] or i % (1 + len(stones) // 20) == 0:
            time = f"{hours(stone['hours_total']):>8} h  {stone['finish']}"
            print(f"{stone['steps']:10,} {count(stone['tokens']):>8} {time}  {stone['what']}".rstrip())
    for text in warnings:
        print(f"warning: {text}")
    print(f"\nrecommended: {sentence}")
    facts = dict(rows=rows, milestones=stones, memory_gb=memory, largest_batch_size=largest)
    return facts | dict(is_calibrated=bool(cfg.calibrate), warnings=warnings, recommendation=sentence)
