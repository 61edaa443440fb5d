"""train.py on several ranks: two processes are one, whatever kills one of them. On the CPU, over gloo."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch
from conftest import (
    EVENTS,
    ROOT,
    RUN,
    SCALARS,
    final,
    flags,
    lines,
    result_of,
    rows,
    start_ranks,
    train,
    write_data,
)
from fork import CONTEXT, Script

from nanobit import distributed

# two micro-steps for one process, one for each of two
PLAIN = dict(total_batch_size=128, max_steps=20, dropout=0.1, sample_every=20)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return (data_dir, out_dir) with the run of one process."""
    folder = tmp_path_factory.mktemp("one")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "one", **PLAIN)
    return data_dir, out_dir


def values_of(where, run_id, **changes):
    """Return the settings of a run."""
    return dict(data_dir=where[0], out_dir=where[1], dataset="tiny", run_id=run_id) | RUN | PLAIN | changes


def launch(where, run_id, tmp_path, patch, more=(), **changes):
    """Start torchrun with two ranks of train.py as children; patch is Python that runs in each rank."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text("from torch.distributed.run import main\nmain()\n")
    script = tmp_path / "patched.py"
    script.write_text(
        f"import runpy, sys\nsys.path[:0] = [{ROOT!r}]\n{patch}\n"
        f"sys.argv[0] = 'train.py'\nrunpy.run_path({os.path.join(ROOT, 'train.py')!r}, run_name='__main__')\n"
    )
    args = ["--standalone", "--nproc_per_node=2", *more, str(script)]
    args += flags(**values_of(where, run_id, **changes))
    # the variable: see docs/scale.md, without it a restart fails now and then
    return Script(str(launcher), args, ROOT, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


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


# ranks are one process


@pytest.fixture(scope="module")
def outputs(one):
    """Return the stdout of two ranks that trained run "two"."""
    return two(one, "two")


def test_two_processes_are_one_bit_for_bit(one, outputs):
    """Two ranks see the data, draw the dropout and log the losses of one process."""
    assert_same(one, "one", "two")


def test_rank_0_alone_prints(one, outputs):
    """The result of several ranks is printed once, by rank 0."""
    out, silent = outputs
    assert result_of(out)["step"] == 20
    assert result_of(out)["tokens"] == 20 * 128
    assert out.count('{"run_id"') == 1
    assert silent == ""


def test_the_number_of_ranks_is_recorded(one, outputs):
    """config.json holds the number of ranks."""
    with open(f"{one[1]}/two/config.json", encoding="utf-8") as file:
        assert json.load(file)["world_size"] == 2


def test_a_finished_run_ends_both_ranks(one, outputs):
    """Ranks that find their run finished leave each other; rank 0 says so."""
    first, second = two(one, "two", resume="auto")
    assert "run two is finished: step 20" in first
    assert second == ""


def test_three_ranks_resume_bit_for_bit(one):
    """A resume on three ranks is exact, though DDP sums the gradients of its first step in another order than
    later ones, which from three ranks on gives other bits."""
    changes = dict(n=3, total_batch_size=192, sample_every=0, eval_every=0)
    two(one, "three", **changes)
    two(one, "three_resumed", resume=f"{one[1]}/three/checkpoints/step_000010", **changes)
    assert_close(one, "three", "three_resumed")


def test_what_routers_did_is_summed_over_ranks_and_resumes(one):
    """A line of the routers covers the tokens of all ranks since the line before, also if the run resumed on
    another number of ranks in between."""
    changes = dict(n_expert=3, ternary=False, log_every=4, sample_every=0, eval_every=0, keep_last=0)
    train(*one, "m1", **PLAIN | changes)
    two(one, "m2", resume=f"{one[1]}/m1/checkpoints/step_000010", **changes)
    train(*one, "m3", resume=f"{one[1]}/m2/checkpoints/step_000015", **PLAIN | changes)
    m1, m2, m3 = (
        {row["step"]: row["total"] for row in lines(f"{one[1]}/{name}", "metrics/router.jsonl")}
        for name in ("m1", "m2", "m3")
    )
    assert list(m1) == [4, 8, 12, 16, 20]
    assert list(m2) == [12, 16, 20]
    assert list(m3) == [16, 20]
    for step, row in [*m2.items(), *m3.items()]:
        assert row == pytest.approx(m1[step], rel=1e-3)


def test_float16_on_two_ranks(one):
    """Two ranks find one scale of the loss together."""
    changes = dict(ternary=False, dtype="float16", max_steps=5, eval_every=0, sample_every=0)
    train(*one, "half", **PLAIN | changes)
    two(one, "two_halves", **changes)
    assert len(losses(one, "half")) == 5
    assert losses(one, "half") == pytest.approx(losses(one, "two_halves"), abs=1e-4)


@pytest.mark.parametrize("ternary, steps", [(True, 5), (False, 20)])
def test_four_micro_steps_are_two_on_each_of_two(one, ternary, steps):
    """Gradients are averaged once a step, over all micro-steps. The sums have another order: the roundings of
    a ternary model may flip later."""
    changes = dict(total_batch_size=256, ternary=ternary, sample_every=0, eval_every=0, schedule="constant")
    changes |= dict(max_steps=steps, save_every=0)
    train(*one, f"four{ternary}", **PLAIN | changes)
    two(one, f"twice_two{ternary}", **changes)
    assert len(losses(one, f"four{ternary}")) == steps
    assert losses(one, f"four{ternary}") == pytest.approx(losses(one, f"twice_two{ternary}"), abs=1e-4)


# what one rank finds, all do


@pytest.mark.parametrize(
    "run_id, dataset, says", [("new", "nope", "data set"), ("one", "tiny", "holds a run")]
)
def test_a_fault_that_rank_0_finds_ends_all_in_silence(one, run_id, dataset, says):
    """A user's mistake is reported in one line, by rank 0, and no rank prints a traceback."""
    (_, first), (_, second) = on_ranks(one, run_id, code=2, dataset=dataset)
    assert first.count("error: ") == 1
    assert says in first
    assert second == ""


def test_every_machine_checks_its_copy_of_the_data(one, tmp_path):
    """The first rank of each machine reads the shards there: a damaged copy on the second one ends both."""
    shutil.copytree(one[0], tmp_path / "copy")
    shard = tmp_path / "copy" / "tiny" / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    patch = faults.second_machine(str(tmp_path / "copy"))
    (_, first), (_, second) = on_ranks(one, "copies", code=2, patch=patch)
    assert first == ""
    assert "its sha256 is not the one in meta.json" in second


def test_a_time_limit_on_one_rank_ends_both(one):
    """Ranks whose clocks differ end at the same step."""
    out, _ = two(one, "minutes", patch=faults.time_is_over(rank=1), max_minutes=60)
    assert result_of(out)["step"] == 0


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(one):
    """All ranks skip a step if the loss of one of them is not finite, and so keep the same weights. Its
    gradients are finite here: they would be averaged, and seen by both."""
    patch = faults.nan_loss_without_gradient(5, rank=1)  # the first is DDP's, before the first step
    two(one, "nan", patch=patch, sample_every=0)
    events = lines(f"{one[1]}/nan", EVENTS)
    assert [(row["step"], row["steps"]) for row in events if row["event"] == "anomaly"] == [(4, 1)]
    assert all(w.isfinite().all() for w in final(f"{one[1]}/nan", 20)[0].values())


# signals


def test_a_signal_to_one_rank_stops_both_and_one_process_continues(one):
    """A rank that gets a signal does not leave the other waiting: both leave at one step, saved, from
    which any number of ranks can resume."""
    patch = faults.signal_at_update(7, signal.SIGTERM, rank=1)
    (_, first), (_, second) = on_ranks(one, "signalled", code=128 + signal.SIGTERM, patch=patch)
    assert first.count("stopped by signal 15, saved step 7; to continue: ") == 1
    assert "stopped by" not in second
    assert lines(f"{one[1]}/signalled", EVENTS)[-1]["event"] == "interrupt"
    train(*one, "signalled", resume="auto", **PLAIN)
    assert_same(one, "one", "signalled")


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_the_launcher_saves_once(one, tmp_path, to_all):
    """A signal to torchrun, which passes it on, or to all processes, as SLURM sends it, saves the run:
    no rank takes it for the second signal, which exits without saving."""
    run_id = f"ended{to_all}"
    patch = faults.slow_updates(0.1)
    child = launch(one, run_id, tmp_path, patch, max_steps=10_000, sample_every=0, eval_every=0)
    path = f"{one[1]}/{run_id}/{SCALARS}"
    deadline = time.time() + 100
    while not (os.path.exists(path) and '"step": 3, "epoch"' in open(path, encoding="utf-8").read()):
        assert not child.ended() and time.time() < deadline, child.output()
        time.sleep(0.05)
    pid = child.process.pid
    ranks = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    for receiver in [*map(int, ranks if to_all else []), pid]:
        os.kill(receiver, signal.SIGTERM)
    code, _, err = child.wait(60)
    assert code != 0
    assert "nothing saved" not in err
    assert err.count("stopped by signal 15, saved step") == 1
    assert lines(f"{one[1]}/{run_id}", EVENTS)[-1]["event"] == "interrupt"


def test_a_killed_rank_is_restarted_by_torchrun(one, tmp_path):
    """After a restart by torchrun all ranks continue from the same checkpoint, the newest."""
    patch = faults.signal_at_update(13, signal.SIGKILL, rank=1, restarts=0)
    child = launch(one, "killed", tmp_path, patch, more=["--max-restarts=1"], resume="auto")
    code, out, err = child.wait(150)
    assert code == 0, (out, err)
    assert_same(one, "one", "killed")
    resumed = [row["step"] for row in lines(f"{one[1]}/killed", EVENTS) if row["event"] == "resume"]
    assert resumed in ([10], [12])


def leave_a_group(store):
    """Make a control group, leave it, and exit with 0 if that ends all threads that it began."""
    before = len(os.listdir("/proc/self/task"))
    distributed.dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    distributed.control = distributed.dist.new_group(backend="gloo")
    assert len(os.listdir("/proc/self/task")) > before
    distributed.stop()
    deadline = time.monotonic() + 5  # the system lists a thread for a moment after its end
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.exit(len(os.listdir("/proc/self/task")) - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to see threads")
def test_a_rank_that_leaves_ends_its_threads(tmp_path):
    """No thread of the group of flags outlives distributed.stop: one that frees a tensor while Python ends
    would abort the process, and torchrun would call the finished run a failed one."""
    process = CONTEXT.Process(target=leave_a_group, args=(tmp_path / "store",))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_second_signal_within_five_seconds_is_the_first(monkeypatch):
    """One of several ranks that gets the signal again, from torchrun after SLURM, saves; after five seconds a
    second one exits immediately."""
    clock = [100.0]
    exits = []
    monkeypatch.setattr(distributed, "received", 0)
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed.os, "write", lambda *a: None)
    monkeypatch.setattr(distributed.os, "_exit", exits.append)
    for seconds, expected in ((0, []), (4, []), (6, [143])):
        clock[0] = 100.0 + seconds
        distributed.on_signal(15, None)
        assert exits == expected


# shards

# on a CPU with bfloat16 units Muon iterates in bfloat16, whose roundings are larger than the bounds
MIXTURE = dict(n_layer=2, n_expert=3, optimizer="muon", ternary=False, schedule="constant", dropout=0.0)
MIXTURE |= dict(eval_tokens=192, keep_last=0, patch=faults.float32_muon())


@pytest.fixture(scope="module")
def mixture(one):
    """Return (data_dir, out_dir) with run "mixture", of one process, and run "sharded", of two until step
    11."""
    train(*one, "mixture", **PLAIN | MIXTURE)
    two(one, "sharded", fsdp=True, **MIXTURE | dict(max_steps=11))
    train(*one, "sharded", resume="auto", **PLAIN | MIXTURE)
    return one


def test_a_sharded_mixture_is_the_whole_one(mixture):
    """Muon and the experts of a sharded model compute what those of a whole one do, and one process resumes
    the sharded checkpoint."""
    assert_close(mixture, "mixture", "sharded", rtol=1e-3, atol=1e-5)
    whole, sharded = (
        [row.get("loss", row.get("val_loss")) for row in rows(f"{mixture[1]}/{name}")]
        for name in ("mixture", "sharded")
    )
    assert whole[:13] == pytest.approx(sharded[:13], abs=1e-5)


def test_a_sharded_mixture_logs_its_routers(mixture):
    """Each step has a line of the routers."""
    assert len(lines(f"{mixture[1]}/sharded", "metrics/router.jsonl")) == 20


def test_a_tied_matrix_is_written_once(mixture):
    """Embedding and head of a checkpoint share their memory."""
    weights = final(f"{mixture[1]}/sharded", 20)[0]
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


def test_shards_resume_from_a_whole_checkpoint(mixture):
    """A sharded run resumes from the checkpoint of one process."""
    two(mixture, "sharded_on", fsdp=True, resume=f"{mixture[1]}/mixture/checkpoints/step_000010", **MIXTURE)
    assert_close(mixture, "mixture", "sharded_on", rtol=1e-3, atol=1e-5)


def test_the_health_of_shards_is_that_of_the_whole_weights(one):
    """Ternary scales and codes are those of the whole matrix, not of a shard."""
    changes = dict(schedule="constant", max_steps=3, sample_every=0)
    train(*one, "bits", **PLAIN | changes)
    two(one, "bit_shards", fsdp=True, **changes)
    whole, sharded = (
        lines(f"{one[1]}/{name}", "metrics/bitnet.jsonl")[-1]["total"] for name in ("bits", "bit_shards")
    )
    del whole["act_absmax"], sharded["act_absmax"]  # of the tokens that the process has just read
    assert whole == pytest.approx(sharded, rel=1e-3)
