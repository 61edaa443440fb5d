"""
Write arithmetic problems as tokens: `12+34=46`, one a line, one token per character.

    python prepare/arithmetic.py                                          two-digit additions
    python prepare/arithmetic.py --ops=+-x --digits=3 --train_problems=2000000 --name=arithmetic3

A problem is held out when a hash of it says so, about one in eight, and then so is the same problem with its
operands exchanged: the model is scored on sums it has seen in neither order. The val split and problems.txt
hold only such problems, the train split none. Takes a few seconds and 4 MB; the second command half a
minute and 46 MB.
"""

import hashlib
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanobit import cli  # first: it explains a missing package

# isort: split
import numpy as np
from tqdm import tqdm

import config
from nanobit.prepare import token_files

FLAGS = {
    "ops": cli.Flag("+", "which operations: any of + - x"),
    "digits": cli.Flag(
        2, "digits of an operand, at most; shorter ones occur too, less often", within="[1, 9]"
    ),
    "name": cli.Flag("arithmetic", "name of the data set"),
    "seed": cli.Flag(1337, "another seed draws other problems", within=cli.SEED),
    "train_problems": cli.Flag(200000, "lines of the train split, drawn with replacement", within="[1, inf)"),
    "val_problems": cli.Flag(
        2000, "held-out problems, each once; fewer if there are fewer", within="[1, inf)"
    ),
}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
CHARS = "\n+-x=0123456789"  # ids 0 to 14; the end of a line is the end of a text


def is_held_out(a, op, b):
    """Return whether a op b belongs to the val split: by a hash, the same for both orders of the operands.
    Never if both have one digit: those are the facts that all else follows from."""
    low, high = sorted((a, b))
    return high > 9 and hashlib.sha256(f"{low}{op}{high}".encode()).digest()[0] < 33  # of 256: 12.9 %


def draw(rng, ops, digits):
    """Return a problem (a, operation, b). All operations come equally often, but a product half as often as
    the others, if there are any: it is longer, and harder to learn. The longer operand has d digits with
    weight d * d: short problems are few, so each of them comes more often than each long one."""
    d = rng.choices(range(1, digits + 1), [n * n for n in range(1, digits + 1)])[0]
    often = ops + ops.replace("x", "") if "x" in ops else ops
    return rng.randrange(10**d), rng.choice(often), rng.randrange(10**d)


def problems(rng, ops, digits, n, held_out, distinct):
    """Return n problem lines, held out or not. If distinct, each comes once, and fewer than n are returned
    if so many do not turn up."""
    lines = []
    seen = set()
    misses = 0  # in a row
    split = "val" if held_out else "train"
    with tqdm(total=n, desc=split, unit="line", disable=None) as bar:
        while len(lines) < n and misses < 100_000:
            problem = draw(rng, ops, digits)
            if is_held_out(*problem) != held_out or problem in seen:
                misses += 1
                continue
            a, op, b = problem
            lines.append(f"{a}{op}{b}={RESULT[op](a, b)}\n")
            misses = 0
            bar.update()
            if distinct:
                seen.add(problem)
    return lines


def derive(cfg):
    """Return the fault of --ops, if any."""
    if not cfg.ops or set(cfg.ops) - set(RESULT):
        return [f"ops = {cfg.ops!r}: each must be one of {' '.join(RESULT)}"]
    return []


if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",), derive=derive)
    rng = random.Random(cfg.seed)
    lines = {
        "train": problems(rng, cfg.ops, cfg.digits, cfg.train_problems, held_out=False, distinct=False),
        "val": problems(rng, cfg.ops, cfg.digits, cfg.val_problems, held_out=True, distinct=True),
    }
    if not all(lines.values()):
        cli.fail(f"digits = {cfg.digits}: too few problems to hold some out")
    given = ("ops", "digits", "train_problems", "val_problems", "seed")
    source = "prepare/arithmetic.py " + " ".join(f"--{key}={getattr(cfg, key)}" for key in given)
    folder = token_files.open_data_set(cfg.data_dir, cfg.name, source)
    ids = np.zeros(256, np.uint16)
    ids[list(CHARS.encode())] = range(len(CHARS))
    shards, sizes = {}, {}
    for split, rows in lines.items():
        text = "".join(["\n", *rows]).encode()
        shards |= token_files.write_split(folder, split, ids[np.frombuffer(text, np.uint8)], len(CHARS))
        sizes[split] = len(text)
        print(f"{folder}: {split}: {len(rows):,} problems, {len(text):,} tokens, as {rows[0].strip()}")
    token_files.write_file(os.path.join(folder, "problems.txt"), "".join(lines["val"]).encode())
    made = dict(tokenizer=token_files.char_tokenizer(CHARS), eot=0, vocab_size=len(CHARS), source=source)
    token_files.write_meta(folder, **made, tokens=sizes, bytes=sizes, shards=shards, task="arithmetic")
