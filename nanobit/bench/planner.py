"""Compute what a run will take and reach, for bench.py --plan.

The loss is that of a scaling law, which knows neither this data nor this tokenizer: it compares lengths, and
predicts the loss of a model only after a finished run has calibrated it."""

import contextlib
import datetime
import math
from types import SimpleNamespace

from nanobit import record, saving, schedule
from nanobit.cli import fail
from nanobit.monitor import run_files

# L(N, D) = E + A / N^a + B / D^b for N parameters and D tokens (Hoffmann et al., arXiv 2203.15556, section
# 3.3) with the constants of Besiroglu et al., "Chinchilla scaling: a replication attempt" (arXiv 2404.10102)
E, A, A_EXPONENT, B, B_EXPONENT = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
SMALLEST = 2e7  # parameters: with fewer, far from the models that it was fitted to, the law is wrong
REPEAT = 15.387756  # epochs of repeated data: Muennighoff et al. (arXiv 2305.16264), section 5
MOST_STEPS = 10**9


def worth(tokens, dataset_tokens):
    """Return how many new tokens teach as much as `tokens` in epochs; Muennighoff et al., equation 5."""
    if not dataset_tokens or tokens <= dataset_tokens:
        return tokens
    repeats = tokens / dataset_tokens - 1
    return dataset_tokens * (1 + REPEAT * (1 - math.exp(-repeats / REPEAT)))


def expected_loss(params, tokens, dataset_tokens=0, ternary=False, offset=0.0):
    """Return the validation loss in nats per token by the law, plus `offset` (see calibration)."""
    loss = E + A / params**A_EXPONENT + B / worth(tokens, dataset_tokens) ** B_EXPONENT
    if ternary:  # the difference of two fits at 300B tokens, Kaushal et al., "Spectra" (arXiv 2407.12327)
        loss += (185 - 159) * params**-0.26 + (1.76 - 1.67)
    return loss + offset


def calibration(run_dir):
    """Return the measured loss of a finished run less that of the law. Exits with 2 for any other folder."""
    try:
        end = record.last(run_dir, record.EVENTS, "result")["result"]
        epochs = record.last(run_dir, record.SCALARS, "epoch")["epoch"]
        run = run_files.read_config(run_dir)
        params = run["params"]["active"]
        data_tokens = epochs and end["tokens"] / epochs
        law = expected_loss(params, end["tokens"], data_tokens, run["settings"]["ternary"])
        offset = end["val_loss"] - law
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        fail(f"calibrate = {run_dir!r} is not a finished run with a validation loss; name the folder of one")
    if params < SMALLEST:
        fail(f"calibrate = {run_dir!r} has {params:,} parameters: the law does not hold for so small a model")
    return offset


def evaluated_tokens(cfg):
    """Return the tokens of one evaluation: eval_tokens (0 = all), but no more than the validation set has
    (0 = there is none yet)."""
    return min((n for n in (cfg.eval_tokens, cfg.val_tokens) if n), default=0)


def assumed_seconds(cfg, counts, step_ms):
    """Return the seconds of an evaluation, a round of samples and a checkpoint if nothing is timed: a forward
    is a third of a step, generation makes 50 tokens/s, the disk takes 0.25 GB/s."""
    evaluation = evaluated_tokens(cfg) / cfg.total_batch_size * step_ms / 3e3
    samples = 3 * len(cfg.sample_prompts) * cfg.sample_tokens / 50
    return evaluation, samples, 12 * counts["total"] / 1e9 / 0.25


def times(steps, every):
    """Return how often a run does something each `every` steps (0 = never) and at the end."""
    return -(-steps // every) if every else 0


def memory_gb(cfg, counts, batch_size, dtype_bytes):
    """Return the peak memory in 1e9 bytes of a training step with batch_size sequences a micro-step: fp32
    weights, gradients and optimizer state, and what a compiled forward keeps (without compile 1.5 to 2 times
    as much; counted by hooks on what autograd saves). A block keeps of each token the residual stream twice,
    queries, keys and values (as wide as queries, as on CUDA) and their sum, the inputs of attention and
    feed-forward, gate, up, the input of down_proj, and that of o_proj (ternary). The experts of a mixture run
    uncompiled in a loop."""
    b = dtype_bytes
    width = cfg.n_embd
    block = 8 * width + (6 + cfg.ternary) * b * width
    if cfg.n_expert:
        block += cfg.n_expert_active * 4 * b * (cfg.ffn_dim + width)
    else:
        block += 3 * b * cfg.ffn_dim
    # the last residual stream, the input of the head, the logits and their gradient
    per_token = cfg.n_layer * block + (4 + b) * width + 2 * b * cfg.vocab_size
    state = 16 * counts["total"] + counts["ternary"]  # int8 codes
    if cfg.optimizer == "muon":  # one number for each weight of a matrix, not two
        embeddings = (2 - cfg.tie_embeddings) * cfg.vocab_size * width
        state -= 4 * (counts["total"] - embeddings)
    if b == 2:  # copies of the weights by autocast, or of the codes
        state += 2 * counts["total"]
    return (state + per_token * batch_size * cfg.seq_len) / 1e9


def largest_batch_size(cfg, counts, gpu_memory_gb, dtype_bytes):
    """Return the largest batch_size that divides the sequences of a step and fits, or 0."""
    room = 0.9 * gpu_memory_gb - 0.8  # the rest is for gaps between allocations and CUDA itself
    sequences = cfg.total_batch_size // cfg.seq_len
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    return max((n for n in sizes if memory_gb(cfg, counts, n, dtype_bytes) <= room), default=0)


def log_bytes(cfg, steps):
    """Return the disk that the lines of the record will take, as measured on small runs."""
    per_line = 420 + cfg.n_layer * (190 * 7 * bool(cfg.ternary) + 200 * bool(cfg.n_expert))
    per_sample = 200 + 5 * cfg.sample_tokens
    samples = times(steps, cfg.sample_every) * 3 * len(cfg.sample_prompts)
    return times(steps, cfg.log_every) * per_line + samples * per_sample


def saves(cfg, steps):
    """Return how many checkpoints a run of so many steps writes, if each evaluation is the best so far."""
    run = SimpleNamespace(**vars(cfg) | dict(max_steps=steps))
    intervals = [n for n in (cfg.save_every, cfg.eval_every) if n]
    n_saves = sum(steps // n for n in intervals)
    if len(intervals) == 2:
        n_saves -= steps // math.lcm(*intervals)
    return n_saves + sum(all(at % n for n in intervals) for at in schedule.boundary_steps(run) | {steps})


def row(cfg, counts, steps, cost):
    """Return the plan of a run of so many steps, as a dict. cost: dict of step_ms, seconds of one evaluation,
    sampling and save, dataset_tokens, per_hour (price), budget_hours (0 = none), offset of the loss, now."""
    tokens = steps * cfg.total_batch_size
    training = steps * cost["step_ms"] / 3.6e6
    evaluations = times(steps, cfg.eval_every) + bool(cfg.eval_every)  # one at step 0
    extra = evaluations * cost["eval_seconds"] + times(steps, cfg.sample_every) * cost["sample_seconds"]
    total = training + (extra + saves(cfg, steps) * cost["save_seconds"]) / 3600
    finish = "-"
    with contextlib.suppress(OverflowError):  # no calendar has it
        finish = (cost["now"] + datetime.timedelta(hours=total)).isoformat(" ", "minutes")
    loss = expected_loss(counts["active"], tokens, cost["dataset_tokens"], cfg.ternary, cost["offset"])
    # a loss over ln(V), that of guessing, is far from what the law was fitted to
    has_loss = counts["active"] >= SMALLEST and loss < math.log(cfg.vocab_size)
    plan = dict(steps=steps, tokens=tokens, hours=training, hours_total=total, finish=finish)
    plan |= dict(tokens_per_param=tokens / counts["total"], tokens_per_active_param=tokens / counts["active"])
    plan["epochs"] = tokens / cost["dataset_tokens"] if cost["dataset_tokens"] else None
    plan["checkpoint_gb"] = saving.kept_bytes(cfg, counts["total"], steps) / 1e9
    plan["log_gb"] = log_bytes(cfg, steps) / 1e9
    plan["price"] = total * cost["per_hour"] if cost["per_hour"] else None
    plan["spare_hours"] = cost["budget_hours"] - total if cost["budget_hours"] else None
    return plan | dict(expected_loss=loss if has_loss else None)


def milestones(cfg, counts, steps, cost, every=50_000):
    """Return dicts of the state of a run of so many steps at each `every`, its stage boundary and its end."""
    what = {at: "" for at in range(every, steps, every)} | {steps: "end"}
    boundary = schedule.boundary(SimpleNamespace(**vars(cfg) | dict(max_steps=steps)))
    if 0 < boundary < steps:
        what[boundary] = "stage boundary"
    keys = ("steps", "tokens", "tokens_per_param", "hours_total", "finish")
    rows = [row(cfg, counts, at, cost) for at in sorted(what)]
    return [{"what": what[at["steps"]]} | {key: at[key] for key in keys} for at in rows]


def candidates(cfg, step_ms, budget_hours):
    """Return lengths in steps to compare: the experiment's, and parts of the budget or of twice that."""
    whole = 2 * cfg.max_steps
    parts = [1 / 8, 1 / 4, 1 / 2, 1]
    if budget_hours:
        whole = budget_hours * 3.6e6 / step_ms
        parts[-1] = 0.9
    lengths = {max(1, round(min(whole, MOST_STEPS) * part)) for part in parts}
    return sorted(lengths | {cfg.max_steps})
