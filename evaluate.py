"""
Score a trained model: its loss on a prepared data set with the same tokenizer, and a task's own score.

    python evaluate.py --ckpt=runs/demo
    python evaluate.py --ckpt=runs/demo --split=train --dtype=bfloat16
    python evaluate.py --ckpt=runs/baseline --dataset=lambada

Computes in float32 unless told otherwise, on the fixed windows of the split, all of them. Tasks:
arithmetic (exact answers to held-out problems), tictactoe (games), LAMBADA and BLiMP, which are text that
any model can read and have the split val only.

The last line of stdout is one JSON object: step, dataset, split, dtype, tokens, val_loss (nats per token),
perplexity, bits_per_byte where bytes are known, and for a task accuracy (0 to 1), n and its own scores. For
LAMBADA tokens and val_loss are those of the last words, perplexity is per word; for BLiMP they are those of
the good sentences.
"""

import math
import os
import signal
import sys

import config
from nanobit import cli, terminal

FLAGS = {
    "ckpt": (
        "",
        "a run folder (its newest checkpoint), RUN/best (its best evaluation), a step folder, a "
        "checkpoint.pt, or an export for transformers",
    ),
    "dataset": ("", "name of the data set in data_dir; '' = the one the model was trained on"),
    "split": ("val", "val | train"),
    "dtype": ("float32", "float32 | bfloat16 | float16: what the matrix products compute in"),
    "packed": (
        True,
        "integer weights in ternary layers; False = from the float master weights, the same loss",
    ),
    "eval_tokens": (0, "tokens of the loss, spread over the split; 0 = all"),
    "batch_size": (16, "sequences at a time"),
    "games": (2000, "games of each match-up, for tictactoe"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("data_dir", "verify_data", "device"), check_run=False)
config.need_flags(cfg, "ckpt")
faults = [
    f"{name} = {getattr(cfg, name)} must be at least {least}"
    for name, least in (("batch_size", 1), ("eval_tokens", 0), ("games", 1))
    if getattr(cfg, name) < least
]
if faults:
    cli.fail(*faults)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it
terminal.end_with_output()

from tqdm import tqdm

from nanobit import cli, data, machine, record, weights
from nanobit.infer.restore import restore
from nanobit.metrics import mean_loss
from nanobit.tasks import text as tasks
from nanobit.tokenizer import bos_of, make_tokenizer

device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
part, folder = weights.trained(cfg.ckpt)
trained = part["config"]
cfg.dataset = cfg.dataset or trained["dataset"]
if cfg.origin["data_dir"] == "default":
    cfg.data_dir = trained["data_dir"]
data_set = os.path.join(cfg.data_dir, cfg.dataset)
tokenizer, eot, bos = make_tokenizer(part["tokenizer"]), part["tokenizer"]["eot"], bos_of(part["tokenizer"])
result = dict(step=part["step"], dataset=cfg.dataset, split=cfg.split, dtype=machine.name(dtype))

if os.path.exists(os.path.join(data_set, "task.jsonl")):
    if cfg.split != "val":
        cli.fail(f"split = {cfg.split!r}: {data_set} is a task and has the split val only")
    task, examples = tasks.read(data_set)
    print(f"{folder} on {cfg.dataset}: {len(examples):,} examples")
else:
    meta, windows = data.of_trained(part, cfg.split, cfg.dataset, cfg.data_dir, cfg.verify_data)
    task = meta.get("task", "") if cfg.split == "val" else ""
    if task not in ("", "arithmetic", "tictactoe"):
        cli.fail(f"{data_set}: task {task!r} is unknown; this version scores arithmetic, tictactoe")
    if task == "arithmetic":
        problems = tasks.problems(data_set, meta["tokens"]["val"] - 1)
    n = min(windows.total, max(1, cfg.eval_tokens // windows.seq_len)) if cfg.eval_tokens else windows.total
    print(f"{folder} on {cfg.dataset}/{cfg.split}: {n:,} windows of {windows.seq_len} tokens")
print(f"{machine.describe(device)}, {machine.name(dtype)}")
model = restore(part, device, cfg.packed)

if task not in ("lambada", "blimp"):
    batches = tqdm(
        windows.fixed(cfg.eval_tokens, cfg.batch_size, device),
        total=-(-n // cfg.batch_size),
        desc="loss",
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    with machine.autocast(device, dtype):
        loss = mean_loss(model, batches)
    result |= dict(tokens=n * windows.seq_len, val_loss=loss, perplexity=tasks.exp(loss))
    print(f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.3f}")
    if meta["bytes"].get(cfg.split):
        tokens_per_byte = meta["tokens"][cfg.split] / meta["bytes"][cfg.split]
        result["bits_per_byte"] = loss / math.log(2) * tokens_per_byte
        print(f"{result['bits_per_byte']:.4f} bits per byte")

scores, lines = {}, []
with machine.autocast(device, dtype):
    if task == "arithmetic":
        scores, lines = tasks.arithmetic(model, tokenizer, eot, problems, cfg.batch_size)
    elif task == "lambada":
        scores, lines = tasks.lambada(model, tokenizer, bos, examples, cfg.batch_size)
    elif task == "blimp":
        scores, lines = tasks.blimp(model, tokenizer, bos, examples, cfg.batch_size)
    elif task == "tictactoe":
        from nanobit.tasks import tictactoe

        scores, lines = tictactoe.score(model, tokenizer, eot, cfg.games, trained["seed"])
for line in lines:
    print(line)
result |= scores
if not math.isfinite(result["val_loss"]):
    lost = f"val_loss is {result['val_loss']}: what this model computes is too large for {result['dtype']}"
    cli.fail(f"{lost}; try --dtype=float32 or an earlier step", code=1)
print(record.to_json(result))
