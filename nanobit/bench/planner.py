"""
What a run will take and reach, by arithmetic alone: bench.py --plan prints it.

Time follows from a step time, memory and disk from the counts of parameters, the loss from a scaling law that
others fitted. The law knows neither this data nor this tokenizer: it compares lengths, and says how good a
model will be only once a finished run has calibrated it.
"""

import datetime
import math
from types import SimpleNamespace

from nanobit import checkpoint, run_files, schedule
from nanobit import run_dir as record
from nanobit.cli import fail

# L(N, D) = E + A / N^a + B / D^b for N parameters and D tokens (Hoffmann et al., arXiv 2203.15556, section
# 3.3) with the constants of Besiroglu et al., "Chinchilla scaling: a replication attempt" (arXiv 2404.10102)
E, A, A_EXPONENT, B, B_EXPONENT = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
SMALLEST = 2e7  # parameters: far below the models that the law was fitted to it gives nonsense
REPEAT = 15.387756  # epochs of repeated data: Muennighoff et al. (arXiv 2305.16264), section 5
GOOD_EPOCHS, BAD_EPOCHS = 4, 16  # beyond the first repetition costs, beyond the other most of it is lost
ENOUGH = 0.02  # nats: a run that fits the budget, but is to gain less than that, is not worth its hours
WORTHWHILE = 0.1  # nats for each doubling of the hours, where there is no budget
MOST_STEPS = 10**9
SLACK = 0.02  # numbers of a plan that differ by less agree


def worth(tokens, dataset_tokens):
    """the number of distinct tokens that teach as much as `tokens` drawn in epochs from dataset_tokens (0 =
    endless); Muennighoff et al., equation 5"""
    if not dataset_tokens or tokens <= dataset_tokens:
        return tokens
    repeats = tokens / dataset_tokens - 1
    return dataset_tokens * (1 + REPEAT * (1 - math.exp(-repeats / REPEAT)))


def ternary_gap(params):
    """nats that a ternary model of so many parameters is behind a float one: the difference of two fits at
    300B tokens, Kaushal et al., "Spectra" (arXiv 2407.12327)"""
    return (185 - 159) * params**-0.26 + (1.76 - 1.67)


def expected_loss(params, tokens, dataset_tokens=0, ternary=False, offset=0.0):
    """validation loss in nats per token by the law, plus `offset` (see calibration)"""
    loss = E + A / params**A_EXPONENT + B / worth(tokens, dataset_tokens) ** B_EXPONENT
    return loss + (ternary_gap(params) if ternary else 0.0) + offset


def calibration(run_dir):
    """measured loss of a finished run less what the law says of it. Exits with 2 where it is no such run."""
    try:
        end = record.last(run_dir, record.EVENTS, "result")["result"]
        epochs = record.last(run_dir, record.SCALARS, "epoch")["epoch"]
        run = run_files.read_config(run_dir)
        ternary, params = run["settings"]["ternary"], run["params"]["active"]
        data_tokens = end["tokens"] / epochs if epochs else 0
        offset = end["val_loss"] - expected_loss(params, end["tokens"], data_tokens, ternary)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        fail(f"calibrate = {run_dir!r} is no finished run with a validation loss; name the folder of one")
    if params < SMALLEST:
        fail(f"calibrate = {run_dir!r} has {params:,} parameters: the law says nothing of so small a model")
    return offset


def hours(value):
    """hours in words: 0.05, 77.2, 1,234.0"""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def count(tokens):
    """Return a number of tokens in words: 3.28B, 0.49B, 49.15M, 768"""
    if tokens >= 1e8:
        return f"{tokens / 1e9:.2f}B"
    return f"{tokens / 1e6:.2f}M" if tokens >= 1e5 else f"{tokens:,}"


def size(gb):
    """Return a size of so many 1e9 bytes in words: 22.2 GB, 35 MB"""
    return f"{gb:.1f} GB" if gb >= 1 else f"{1e3 * gb:.0f} MB"


def times(steps, every, at_start=False):
    """how often something happens in a run that does it each `every` steps (0 = never) and at the end"""
    return (-(-steps // every) + at_start) if every else 0


def memory_gb(cfg, counts, batch_size, dtype_bytes):
    """most memory of a training step on one device, in 1e9 bytes, with batch_size sequences a micro-step:
    master weights, gradients and optimizer state in fp32, and what a compiled forward keeps for the backward.

    Of a token in a block of width C, with keys of width K and inner width F, in b bytes: the residual stream
    twice (8 C), queries, keys, values and their sum, gate and up; a float model also keeps the inputs of its
    products, b (2 C + F), where a ternary one rounds them again. Counted by hooks on what autograd saves;
    without compile it is 1.5 to 2 times as much. The experts of a mixture run uncompiled in a loop."""
    b, width = dtype_bytes, cfg.n_embd
    kv = width // cfg.n_head * cfg.n_kv_head
    block = 8 * width + b * (2 * width + 2 * kv) + (0 if cfg.ternary else 2 * b * width)
    if cfg.n_expert:
        block += cfg.n_expert_active * 4 * b * (cfg.ffn_dim + width)
    else:
        block += b * (2 if cfg.ternary else 3) * cfg.ffn_dim
    logits = 4 * width + 2 * b * cfg.vocab_size  # and their gradient
    per_token = cfg.n_layer * block + logits
    state = 16 * counts["total"]
    embeddings = (1 if cfg.tie_embeddings else 2) * cfg.vocab_size * width
    if cfg.optimizer == "muon":  # one number for each weight of a matrix, not two
        state -= 4 * (counts["total"] - embeddings)
    if b == 2 and not cfg.ternary:  # autocast's copies of the weights
        state += 2 * counts["total"]
    return (state + per_token * batch_size * cfg.seq_len) / 1e9


def largest_batch_size(cfg, counts, gpu_memory_gb, dtype_bytes):
    """the largest batch_size that divides the sequences of a step and fits, or 0. A tenth of the memory and
    0.8 GB are left for the allocator's holes and for what CUDA itself takes."""
    room, sequences = 0.9 * gpu_memory_gb - 0.8, cfg.total_batch_size // cfg.seq_len
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    return max((n for n in sizes if memory_gb(cfg, counts, n, dtype_bytes) <= room), default=0)


def log_bytes(cfg, steps):
    """disk that the lines of the record will take, as measured on small runs"""
    matrices = cfg.n_layer * 7 if cfg.ternary else 0
    lines = times(steps, cfg.log_every) * (420 + 190 * matrices + 200 * cfg.n_layer * bool(cfg.n_expert))
    return lines + times(steps, cfg.sample_every) * 3 * len(cfg.sample_prompts) * (
        200 + 5 * cfg.sample_tokens
    )


def saves(cfg, steps):
    """how many checkpoints a run of so many steps writes at most: by the schedule, at the boundary, at the
    end, and where each evaluation is the best so far"""
    run = SimpleNamespace(**vars(cfg) | dict(max_steps=steps))
    every = [n for n in (cfg.save_every, cfg.eval_every) if n]
    found = sum(steps // n for n in every) - (steps // math.lcm(*every) if len(every) == 2 else 0)
    return found + sum(all(at % n for n in every) for at in schedule.boundary_steps(run) | {steps})


def finish(now, value):
    """the date so many hours from now, - where that is no date any more"""
    try:
        return (now + datetime.timedelta(hours=value)).isoformat(" ", "minutes")
    except OverflowError:
        return "-"


def row(cfg, counts, steps, cost):
    """the plan of a run of so many steps, as a dict.

    counts: Transformer.counts(). cost: dict of step_ms, eval_seconds, sample_seconds, save_seconds (each for
    one), dataset_tokens (0 = unknown), per_hour (money), budget_hours (0 = none), offset (of the loss), now
    (a datetime)."""
    tokens = steps * cfg.total_batch_size
    training = steps * cost["step_ms"] / 3.6e6
    extra = (
        times(steps, cfg.eval_every, at_start=True) * cost["eval_seconds"]
        + times(steps, cfg.sample_every) * cost["sample_seconds"]
        + saves(cfg, steps) * cost["save_seconds"]
    )
    total = training + extra / 3600
    loss = expected_loss(counts["active"], tokens, cost["dataset_tokens"], cfg.ternary, cost["offset"])
    return dict(
        steps=steps,
        tokens=tokens,
        tokens_per_param=tokens / counts["total"],
        tokens_per_active_param=tokens / counts["active"],
        epochs=tokens / cost["dataset_tokens"] if cost["dataset_tokens"] else None,
        hours=training,
        hours_total=total,
        finish=finish(cost["now"], total),
        checkpoint_gb=checkpoint.kept_bytes(cfg, counts["total"], steps) / 1e9,
        log_gb=log_bytes(cfg, steps) / 1e9,
        price=total * cost["per_hour"] if cost["per_hour"] else None,
        spare_hours=cost["budget_hours"] - total if cost["budget_hours"] else None,
        # a loss over ln(V), that of guessing, is far outside of what the law was fitted to
        expected_loss=loss if counts["active"] >= SMALLEST and loss < math.log(cfg.vocab_size) else None,
    )


def milestones(cfg, counts, steps, cost, every=50_000):
    """dicts of what is behind a run of so many steps at each `every`, at its stage boundary and its end"""
    what = {at: "" for at in range(every, steps, every)} | {steps: "end"}
    boundary = schedule.boundary(SimpleNamespace(**vars(cfg) | dict(max_steps=steps)))
    if 0 < boundary < steps:
        what[boundary] = "stage boundary"
    keys = ("steps", "tokens", "tokens_per_param", "hours_total", "finish")
    rows = [row(cfg, counts, at, cost) | {"what": what[at]} for at in sorted(what)]
    return [{key: each[key] for key in ("what", *keys)} for each in rows]


def candidates(cfg, step_ms, budget_hours):
    """lengths in steps worth comparing where none are named: the experiment's own, and parts of the budget or
    halves and doubles of it"""
    whole = budget_hours * 3.6e6 / step_ms if budget_hours else 2 * cfg.max_steps
    whole = min(whole, MOST_STEPS)
    found = {max(1, round(whole * part)) for part in (1 / 8, 1 / 4, 1 / 2, 0.9 if budget_hours else 1)}
    return sorted(found | {cfg.max_steps})


def contradictions(cfg, claim, rows):
    """what the numbers of a plan say against each other, a sentence each. claim: dict of step_ms,
    tokens_per_sec, tokens, steps that are to make them (each 0 = not given), budget_hours"""
    told, batch, longest = [], cfg.total_batch_size, rows[-1]["steps"]

    def takes(step_ms):
        needed = longest * step_ms / 3.6e6
        is_over = claim["budget_hours"] and needed > claim["budget_hours"]
        over = f", over the budget of {claim['budget_hours']:g}" if is_over else ""
        return f"{hours(needed)} hours for {longest:,} steps{over}"

    if claim["step_ms"] and claim["tokens_per_sec"]:
        by_speed, by_step = 1e3 * batch / claim["tokens_per_sec"], 1e3 * batch / claim["step_ms"]
        if abs(by_step / claim["tokens_per_sec"] - 1) > SLACK:
            told.append(
                f"tokens_per_sec = {claim['tokens_per_sec']:,.0f} contradicts step_ms = {claim['step_ms']:g}:"
                f" with {batch:,} tokens a step, {claim['tokens_per_sec']:,.0f} tokens/s are "
                f"{by_speed / 1e3:.2f} s a step and {takes(by_speed)}; {claim['step_ms']:g} ms are "
                f"{by_step:,.0f} tokens/s and {takes(claim['step_ms'])}; the rows use step_ms"
            )
    steps = claim["steps"]
    if claim["tokens"] and abs(steps * batch / claim["tokens"] - 1) > SLACK:
        told.append(
            f"total_tokens = {claim['tokens']:,} does not follow from steps x batch: {steps:,} steps of "
            f"{batch:,} tokens are {steps * batch:,}; {claim['tokens']:,} tokens take "
            f"{-(-claim['tokens'] // batch):,} steps"
        )
    for each in rows:
        if each["spare_hours"] is not None and each["spare_hours"] < 0:
            told.append(
                f"budget_hours = {claim['budget_hours']:g} does not hold {each['steps']:,} steps: they take "
                f"{hours(each['hours'])} hours, {hours(each['hours_total'])} with evaluations and saves"
            )
    return told


def cautions(cfg, counts, rows, cost):
    """what is unwise in a plan, a sentence each"""
    told = []
    for each in rows:
        epochs, at = each["epochs"] or 0, f"{each['steps']:,} steps"
        if epochs > GOOD_EPOCHS:
            how = "most of it is wasted" if epochs > BAD_EPOCHS else "repetition begins to cost"
            gain = worth(epochs, 1) / epochs
            told.append(f"{at} see the data {epochs:.1f} times: {how} (they teach as {gain:.0%} of new ones)")
        if cfg.warmup_steps > 0.1 * each["steps"]:
            told.append(f"{at}: warmup_steps = {cfg.warmup_steps} are more than a tenth of them")
    short = [f"{each['steps']:,} steps" for each in rows if each["tokens_per_active_param"] < 20]
    if short and counts["active"] >= SMALLEST:
        told.append(
            f"{', '.join(short)}: fewer than 20 tokens for each parameter: a smaller model reaches a lower "
            "loss at the same cost"
        )
    if counts["active"] < SMALLEST:
        told.append(f"expected_loss: the scaling law says nothing of so small a model ({counts['active']:,})")
    elif counts["active"] < counts["total"]:
        like = cost["dataset_tokens"], cfg.ternary, cost["offset"]
        lower = expected_loss(counts["total"], rows[-1]["tokens"], *like)
        told.append(
            f"expected_loss of a mixture is a heuristic: it counts the active parameters; with all of them "
            f"the law gives {lower:.2f} at {rows[-1]['steps']:,} steps"
        )
    return told


def recommendation(rows, own):
    """(the row to take or None, a sentence that says why). With a budget the shortest that is nearly as good
    as the best of those that fit; without one, the last that is worth its price, or where the law says
    nothing, the experiment's own number of steps."""
    has_budget = rows[0]["spare_hours"] is not None
    fit = [each for each in rows if not has_budget or each["spare_hours"] >= 0]
    if not fit:
        least = f"{rows[0]['steps']:,} steps take {hours(rows[0]['hours_total'])} hours"
        return None, f"none: even {least}, over the budget; plan fewer, a smaller model or a faster device"
    sound = [each for each in fit if (each["epochs"] or 0) <= GOOD_EPOCHS] or fit[:1]
    at, losses = len(sound) - 1, [each["expected_loss"] for each in sound]
    if None in losses:
        at = next((i for i, each in enumerate(sound) if each["steps"] == own and not has_budget), at)
    elif has_budget:
        at = next(i for i, loss in enumerate(losses) if loss <= min(losses) + ENOUGH)
    else:
        while at > 0 and (losses[at - 1] - losses[at]) / doublings(sound[at - 1], sound[at]) < WORTHWHILE:
            at -= 1
    chosen = sound[at]
    longer = next((each for each in rows if each["steps"] > chosen["steps"]), None)
    why = f"{chosen['tokens_per_param']:.1f} tokens per parameter"
    if longer is None:
        why += ", the longest of these lengths"
    elif longer not in fit:
        why += f", and {longer['steps']:,} steps do not fit the budget"
    elif longer not in sound:
        why += f", and {longer['steps']:,} steps would repeat the data {longer['epochs']:.1f} times"
    elif None in losses:
        why += ", the experiment's own length"
    else:
        gain, more = chosen["expected_loss"] - longer["expected_loss"], longer["hours"] - chosen["hours"]
        why += f", and {hours(more)} hours more, to {longer['steps']:,} steps, buy only {gain:.3f} nats"
    rest = f" and leaves {hours(chosen['spare_hours'])} of the budget" if has_budget else ""
    return chosen, f"{chosen['steps']:,} steps: {why}; it takes {hours(chosen['hours_total'])} hours{rest}"


def doublings(one, other):
    """how many times the length of one row doubles to that of another"""
    return math.log2(other["steps"] / one["steps"])
