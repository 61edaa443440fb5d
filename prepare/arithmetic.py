"""Write arithmetic problems as tokens: `12+34=46`, one a line, one token per character.

    python prepare/arithmetic.py                                          two-digit additions
    python prepare/arithmetic.py --ops=+-x --digits=3 --train_problems=2000000 --name=arithmetic3

A hash holds out about one problem in eight, in both orders of its operands. The val split and problems.txt
hold only such problems, the train split none. Takes a few seconds and 4 MB; the second command half a minute
and 46 MB."""

import hashlib
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanobit import cli  # first: it explains a missing package

# isort: split
from tqdm import tqdm

import config
from nanobit.prepare import token_files

FLAGS = {
    "ops": cli.Flag("+", "which operations: any of + - x"),
    "digits": cli.Flag(2, "digits of an operand, at most; fewer occur less often", within="[1, 9]"),
    "name": cli.Flag("arithmetic", "name of the data set"),
    "seed": cli.Flag(1337, "another seed draws other problems", within=cli.SEED),
    "train_problems": cli.Flag(200000, "lines of the train split, drawn with replacement", within="[1, inf)"),
    "val_problems": cli.Flag(2000, "held-out problems at most, each once", within="[1, inf)"),
}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
CHARS = "\n+-x=0123456789"  # ids 0 to 14; the end of a line is the end of a text


def is_held_out(a, op, b):
    """Return whether a op b is held out: by a hash of both orders, but never if both have one digit."""
    low, high = sorted((a, b))  # problems of one digit are the facts that all else follows from
    return high > 9 and hashlib.sha256(f"{low}{op}{high}".encode()).digest()[0] < 33  # of 256: 12.9 %


def draw(rng, ops, digits):
    """Return a problem (a, operation, b). A product, which is longer and harder to learn, comes half as often
    as the other operations. The longer operand has d digits with weight d * d: short problems are few, so
    each of them comes more often than each long one."""
    d = rng.choices(range(1, digits + 1), [n * n for n in range(1, digits + 1)])[0]
    often = ops + ops.replace("x", "") if "x" in ops else ops
    return rng.randrange(10**d), rng.choice(often), rng.randrange(10**d)


def problems(cfg, rng, split):
    """Return the problem lines of a split; those of val are held out, each once, if there are so many."""
    n = getattr(cfg, f"{split}_problems")
    lines, seen = [], set()
    misses = 0  # in a row
    with tqdm(total=n, desc=split, unit="line", disable=None) as bar:
        while len(lines) < n and misses < 100_000:
            problem = draw(rng, cfg.ops, cfg.digits)
            if is_held_out(*problem) != (split == "val") or problem in seen:
                misses += 1
                continue
            a, op, b = problem
            lines.append(f"{a}{op}{b}={RESULT[op](a, b)}\n")
            misses = 0
            bar.update()
            if split == "val":
                seen.add(problem)
    return lines


def derive(cfg):
    """Return the fault of --ops, if any."""
    is_right = cfg.ops and set(cfg.ops) <= set(RESULT)
    return [] if is_right else [f"ops = {cfg.ops!r}: each must be one of {' '.join(RESULT)}"]


if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",), derive=derive)
    rng = random.Random(cfg.seed)
    lines = {split: problems(cfg, rng, split) for split in ("train", "val")}
    if not all(lines.values()):
        cli.fail(f"digits = {cfg.digits}: too few problems to hold some out")
    names = ("ops", "digits", "train_problems", "val_problems", "seed")
    source = token_files.source_of("prepare/arithmetic.py", cfg, names)
    folder = token_files.open_data_set(cfg.data_dir, cfg.name, source)
    texts = {}
    for split, rows in lines.items():
        texts[split] = "".join(["\n", *rows]).encode()
        n_tokens = len(texts[split])
        print(f"{folder}: {split}: {len(rows):,} problems, {n_tokens:,} tokens, as {rows[0].strip()}")
    token_files.write_file(os.path.join(folder, "problems.txt"), "".join(lines["val"]).encode())
    token_files.write_characters(folder, texts, CHARS, source, "arithmetic")
