"""Runs of train.py on several ranks, on the CPU over gloo, and their comparison with those of one process."""

import torch
from conftest import RUN, final, lines, rows, start_ranks, train, write_data

# two micro-steps for one process, one for each of two
PLAIN = dict(total_batch_size=128, max_steps=20, dropout=0.1, sample_every=20)


def one_process(tmp_path_factory):
    """Train run "one" on one process; return (data_dir, out_dir)."""
    folder = tmp_path_factory.mktemp("one")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "one", **PLAIN)
    return data_dir, out_dir


def values_of(where, run_id, **changes):
    """Return the settings of a run."""
    return dict(data_dir=where[0], out_dir=where[1], dataset="tiny", run_id=run_id) | RUN | PLAIN | changes


# a rank says so if it ends without distributed.stop()
WATCH = """
import atexit, torch.distributed as dist
def meet(*args, original=dist.init_process_group, **options):
    original(*args, **options)
    atexit.register(lambda: dist.is_initialized() and print("still in the group", file=sys.stderr))
dist.init_process_group = meet
"""


def on_ranks(where, run_id, n=2, code=0, patch="", **changes):
    """Return [(stdout, stderr)] of n ranks of train.py that leave each other and end with this exit code."""
    children = start_ranks(n, patch + WATCH, **values_of(where, run_id, **changes))
    results = [child.wait(150) for child in children]
    assert [ended for ended, _, _ in results] == [code] * n, results
    assert "still in the group" not in str(results)
    return [(out, err) for _, out, err in results]


def two(where, run_id, n=2, **changes):
    """Return the stdout of each of n ranks of train.py, which end with 0."""
    return [out for out, _ in on_ranks(where, run_id, n, **changes)]


def assert_close(where, a, b, **tolerance):
    """Check that two runs end with the same weights and optimizer state, to the bit if no tolerance is
    given."""
    for left, right in zip(*(final(f"{where[1]}/{run_id}", 20) for run_id in (a, b))):
        torch.testing.assert_close(left, right, **dict(rtol=0, atol=0) | tolerance)


def assert_same(where, a, b):
    """Check that two runs are the same, bit for bit."""
    assert_close(where, a, b)
    assert rows(f"{where[1]}/{a}") == rows(f"{where[1]}/{b}")
    samples = [lines(f"{where[1]}/{run_id}", "samples/samples.jsonl") for run_id in (a, b)]
    assert samples[0] == samples[1]


def losses(where, run_id):
    """Return the losses of the training lines."""
    return [row["loss"] for row in rows(f"{where[1]}/{run_id}") if "loss" in row]
