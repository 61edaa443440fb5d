"""What the tests of bench.py share: the command, a tiny experiment, and rows of a plan of known cost."""

import datetime
import json
from types import SimpleNamespace

from conftest import run, settings

from nanobit.bench import planner

TINY = dict(vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, ffn_dim=64, seq_len=16, batch_size=2)
BASELINE = "config/train_baseline_95m.py"
COST = dict(step_ms=100, eval_seconds=3.6, sample_seconds=7.2, save_seconds=36, dataset_tokens=1e9)
COST |= dict(per_hour=2.0, budget_hours=100, offset=0.25, now=datetime.datetime(2026, 2, 28))
COUNTS = dict(total=95_000_000, active=95_000_000)


def bench(*args, code=0, **values):
    """Return (the JSON line or None, stdout, stderr)."""
    out, err = run("bench.py", *args, *(f"--{key}={value}" for key, value in values.items()), code=code)
    return json.loads(out.strip().split("\n")[-1]) if code == 0 else None, out, err


def rows_of(steps, **cost):
    """Return (cfg, the rows of a plan of these lengths in steps), of a dense model of 95M parameters; cost:
    changes of COST."""
    cfg = settings(total_batch_size=8192, batch_size=8, seq_len=256, schedule="two_stage", save_every=10_000)
    cfg = SimpleNamespace(**vars(cfg) | dict(eval_every=5000, sample_every=7000, vocab_size=32000))
    return cfg, [planner.row(cfg, COUNTS, n, COST | cost) for n in steps]
