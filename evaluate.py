"""Score a trained model: its loss on a prepared data set with the same tokenizer, and a task's own score.

    python evaluate.py --ckpt=runs/demo
    python evaluate.py --ckpt=runs/demo --split=train --dtype=bfloat16
    python evaluate.py --ckpt=runs/train_tinystories --dataset=lambada
    python evaluate.py --ckpt=runs/chat --conversations=held_out.jsonl

Tasks: arithmetic (exact answers to held-out problems), tictactoe (games), LAMBADA and BLiMP (text for any
model, split val only). With --conversations, for any model: the loss on answers, and the
share of worked problems whose last number is right, by source.

If stdout is not a terminal, or with --json, its last line is one JSON object: step, dataset, split, dtype,
tokens, val_loss (nats per token), perplexity, bits_per_byte if the bytes are known, and for a task accuracy
(0 to 1), n and its own scores; with another --head than float32 its name, and the exact_val_loss. Of LAMBADA
tokens and val_loss are those of the last words, perplexity is per word; of BLiMP they are those of the good
sentences."""

import math
import os

import config
from nanobit.cli import JSON, Flag, fail

FLAGS = {
    "ckpt": Flag("", "a run folder, RUN/best, step folder, checkpoint.pt or exported folder", required=True),
    "dataset": Flag("", "name of the data set in data_dir; '' = the one that the model was trained on"),
    "conversations": Flag("", "score answers in a .jsonl file, as prepare/chat.py reads", not_with="dataset"),
    "split": Flag("val", "val | train"),
    "dtype": Flag("float32", "auto | float32 | bfloat16 | float16: of the matrix products", config.DTYPES),
    "head": Flag(
        "float32", "float32 | bfloat16 | int8: score with this head, beside that in float32", config.HEADS
    ),
    "packed": Flag(True, "integer weights in ternary layers; False = float master weights, the same loss"),
    "eval_tokens": Flag(0, "tokens of the loss, spread over the split; 0 = all"),
    "batch_size": Flag(16, "sequences at a time", within="[1, inf)"),
    "json": JSON,
    "games": Flag(2000, "games of each match-up, for tictactoe", within="[1, inf)"),
}
cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir", "verify_data", "device"))

import torch

from nanobit import data, machine, record, weights
from nanobit.infer.head import set_head
from nanobit.infer.restore import restore
from nanobit.kept_codes import keep_codes
from nanobit.metrics import mean_loss
from nanobit.tasks import answers, arithmetic, text, tictactoe
from nanobit.tokenizer import bos_of, make_tokenizer

device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
part, folder = weights.trained(cfg.ckpt)
trained = part["config"]
cfg.dataset = cfg.dataset or trained["dataset"]
if cfg.origin["data_dir"] == "default":
    cfg.data_dir = trained["data_dir"]
data_set = os.path.join(cfg.data_dir, cfg.dataset)
spec = part["tokenizer"]
tokenizer = make_tokenizer(spec)

is_text = bool(cfg.conversations) or os.path.exists(os.path.join(data_set, "task.jsonl"))
if is_text and cfg.split != "val":
    fail(f"split = {cfg.split!r}: {cfg.conversations or data_set} is a task and has the split val only")
if cfg.conversations:
    task = "chat"
    examples = answers.read(cfg.conversations)
    cfg.dataset = os.path.basename(cfg.conversations)
    print(f"{folder} on {cfg.dataset}: {len(examples):,} conversations")
elif is_text:
    task, examples = text.read(data_set)
    print(f"{folder} on {cfg.dataset}: {len(examples):,} examples")
else:
    meta, windows = weights.data_of(part, cfg.split, cfg.dataset, cfg.data_dir, cfg.verify_data)
    task = meta.get("task", "") if cfg.split == "val" else ""
    if task not in ("", "arithmetic", "tictactoe"):
        fail(f"{data_set}: task {task!r} is unknown; this version scores arithmetic, tictactoe")
    if task == "arithmetic":
        examples = arithmetic.read(data_set, meta["tokens"]["val"] - 1)
    wanted = cfg.eval_tokens or windows.total * windows.seq_len
    n = min(windows.total, max(1, wanted // windows.seq_len))
    print(f"{folder} on {cfg.dataset}/{cfg.split}: {n:,} windows of {windows.seq_len} tokens")
print(f"{machine.describe(device)}, {machine.name(dtype)}")

model = restore(part, device, cfg.packed)
keep_codes(model)  # of layers that are not packed
result = dict(step=part["step"], dataset=cfg.dataset, split=cfg.split, dtype=machine.name(dtype))
scores = {  # each returns (fields of the JSON line, lines of text)
    "arithmetic": lambda: arithmetic.score(model, tokenizer, spec["eot"], examples, cfg.batch_size),
    "tictactoe": lambda: tictactoe.score(model, tokenizer, spec["eot"], cfg.games, trained["seed"]),
    "chat": lambda: answers.score(model, tokenizer, spec, examples, cfg.batch_size),
    "lambada": lambda: text.lambada(model, tokenizer, bos_of(spec), examples, cfg.batch_size),
    "blimp": lambda: text.blimp(model, tokenizer, bos_of(spec), examples, cfg.batch_size),
}


def loss_on_windows():
    """Return the mean loss of the model on the windows of the data set, in nats per token."""
    batches = windows.fixed(cfg.eval_tokens, cfg.batch_size, device)
    return mean_loss(model, text.progress("loss", batches, -(-n // cfg.batch_size)))


with machine.autocast(device, dtype):
    if cfg.head != "float32":
        result["head"] = cfg.head
        if not is_text:
            result["exact_val_loss"] = loss_on_windows()
            print(f"loss {result['exact_val_loss']:.5f} with the exact head; with the {cfg.head} head:")
        set_head(model, cfg.head)
    if not is_text:
        loss = loss_on_windows()
        batches = windows.fixed(cfg.eval_tokens, cfg.batch_size, torch.device("cpu"))
        tokens = sum((targets >= 0).sum().item() for _, targets, *_ in batches)  # a loss mask leaves some out
        if tokens < n * windows.seq_len:
            print(f"{tokens:,} tokens, those of answers, count")
        result |= dict(tokens=tokens, val_loss=loss, perplexity=text.exp(loss))
        print(f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.3f}")
        if bits := data.bits_per_byte(meta, loss, cfg.split):
            result["bits_per_byte"] = bits
            print(f"{bits:.4f} bits per byte")
    if task:
        fields, lines = scores[task]()
        print(*lines, sep="\n")
        result |= fields
if not math.isfinite(result["val_loss"]):
    problem = f"val_loss is {result['val_loss']}: what this model computes is too large for {result['dtype']}"
    fail(f"{problem}; try --dtype=float32 or an earlier step", code=1)
record.print_result(result, cfg.json)
