"""Several ranks of train.py end as one, whatever stops or kills one of them. On the CPU, over gloo."""

import os
import signal
import subprocess
import sys
import time

import faults
import pytest
from conftest import EVENTS, ROOT, SCALARS, flags, lines, train
from fork import CONTEXT, Script
from ranks import PLAIN, assert_same, on_ranks, one_process, values_of

from nanobit import distributed


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return (data_dir, out_dir) with the run of one process."""
    return one_process(tmp_path_factory)


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
