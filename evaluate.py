"""
Score a trained model: its loss on a prepared data set, and on a task its exact answers to held-out problems.

    python evaluate.py --ckpt=runs/demo
    python evaluate.py --ckpt=runs/demo --split=train --dtype=bfloat16

Computes in float32 unless told otherwise, on the fixed windows of the split, all of them. The last line of
stdout is one JSON object: step, dataset, split, dtype, tokens, val_loss (nats per token), perplexity,
bits_per_byte where bytes are known, and for a task accuracy (0 to 1), n and its own scores.
"""

import math
import os
import signal
import sys

import config

FLAGS = {
    "ckpt": ("", "a run folder (its newest checkpoint), a step folder or a checkpoint.pt"),
    "dataset": ("", "name of the data set in data_dir; '' = the one the model was trained on"),
    "split": ("val", "val | train"),
    "dtype": ("float32", "float32 | bfloat16: what the matrix products compute in"),
    "eval_tokens": (0, "tokens of the loss, spread over the split; 0 = all"),
    "batch_size": (64, "sequences at a time"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("data_dir", "device"), check_run=False)
config.need_flags(cfg, "ckpt")
if cfg.batch_size < 1 or cfg.eval_tokens < 0:
    config.fail(
        f"batch_size = {cfg.batch_size} must be at least 1, eval_tokens = {cfg.eval_tokens} at least 0"
    )
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it

import torch
from tqdm import tqdm

import checkpoint
import data
import device as machine
import record
from model import generate, mean_loss, restore


def exact_answers(model, tokenizer, eot, problems, batch_size):
    """the share of problems (question, answer) whose greedy answer is right to the last character, by kind of
    question: {"": all, "+2": additions whose longer operand has 2 digits, ...}, and the wrong ones
    [(question, answer, right)]"""
    by_length = {}  # prompts of one length make a batch
    for question, answer in problems:
        by_length.setdefault(len(question), []).append((question, answer))
    right, of, wrong = {}, {}, []
    bar = tqdm(total=len(problems), desc="problems", disable=not sys.stderr.isatty(), leave=False)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            some = group[start : start + batch_size]
            idx = torch.tensor(
                [data.encode_prompt(tokenizer, eot, q) for q, _ in some], device=model.embed.weight.device
            )
            longest = max(len(answer) for _, answer in some) + 1
            new = torch.cat(list(generate(model, idx, longest, temperature=0.0)), 1).tolist()
            for (question, answer), ids in zip(some, new):
                said = tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)
                for kind in ("", kind_of(question)):
                    of[kind] = of.get(kind, 0) + 1
                    right[kind] = right.get(kind, 0) + (said == answer)
                if said != answer:
                    wrong.append((question, said, answer))
            bar.update(len(some))
    bar.close()
    return {kind: right[kind] / n for kind, n in sorted(of.items())}, wrong


def kind_of(question):
    """'+2' for '12+7=': the operation and the digits of the longer operand"""
    op = next(char for char in question if not char.isdigit())
    return f"{op}{max(map(len, question.rstrip('=').split(op)))}"


device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
folder = checkpoint.locate(cfg.ckpt)
part = checkpoint.load(folder)
trained = part["config"]
cfg.dataset, cfg.origin["dataset"] = cfg.dataset or trained["dataset"], folder
if cfg.origin["data_dir"] == "default":
    cfg.data_dir = trained["data_dir"]
cfg.seed, cfg.seq_len, cfg.vocab_size, cfg.prepare = (
    trained[key] for key in ("seed", "seq_len", "vocab_size", "prepare")
)
meta = data.meta(cfg)
if meta["tokenizer"]["sha256"] != part["tokenizer"]["sha256"]:
    config.fail(
        f"dataset = {cfg.dataset!r} has another tokenizer than {folder}: its token ids mean other text"
    )
windows = data.Windows(cfg, meta, cfg.split)
model = restore(part, device)
tokenizer = data.tokenizer(part["tokenizer"])
n = min(windows.total, max(1, cfg.eval_tokens // cfg.seq_len)) if cfg.eval_tokens else windows.total
print(f"{folder} on {cfg.dataset}/{cfg.split}: {n} windows of {cfg.seq_len} tokens")
print(f"{machine.describe(device)}, {machine.name(dtype)}")

result = dict(
    step=part["step"],
    dataset=cfg.dataset,
    split=cfg.split,
    dtype=machine.name(dtype),
    tokens=n * cfg.seq_len,
)
batches = tqdm(
    windows.fixed(cfg.eval_tokens, cfg.batch_size, device),
    total=-(-n // cfg.batch_size),
    desc="loss",
    disable=not sys.stderr.isatty(),
    leave=False,
)
with machine.autocast(device, dtype):
    loss = mean_loss(model, batches)
result |= dict(val_loss=loss, perplexity=math.exp(min(loss, 700.0)))
print(f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.3f}")
if meta["bytes"].get(cfg.split):
    result["bits_per_byte"] = loss / math.log(2) * meta["tokens"][cfg.split] / meta["bytes"][cfg.split]
    print(f"{result['bits_per_byte']:.4f} bits per byte")
if meta.get("task") == "arithmetic" and cfg.split == "val":
    path = os.path.join(cfg.data_dir, cfg.dataset, "problems.txt")
    if not os.path.exists(path):
        config.fail(f"{path} is missing; make the data set again")
    with open(path, encoding="utf-8") as file:
        problems = [(q + "=", a) for q, _, a in (line.rstrip("\n").partition("=") for line in file)]
    with machine.autocast(device, dtype):
        shares, wrong = exact_answers(model, tokenizer, part["tokenizer"]["eot"], problems, cfg.batch_size)
    result |= dict(accuracy=shares.pop(""), n=len(problems), accuracy_by_kind=shares)
    print(f"exact answers: {result['accuracy']:.2%} of {len(problems)} held-out problems")
    for kind, share in shares.items():
        print(f"  {kind:>4}  {share:.2%}")
    for question, said, answer in wrong[:5]:
        print(f"  wrong: {question}{said}, right is {answer}")
print(record.to_json(result))
