"""train.py under torchrun: two processes are one, whatever kills one of them. On the CPU, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    EVENTS,
    NAN,
    ROOT,
    RUN,
    SCALARS,
    final,
    flags,
    lines,
    rows,
    start_ranks,
    train,
    write_data,
)

from nanobit import distributed

# two micro-steps for one process, one for each of two
PLAIN = dict(total_batch_size=128, max_steps=20, dropout=0.1, sample_every=20)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(data_dir, out_dir) with the run of one process"""
    folder = tmp_path_factory.mktemp("one")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "one", **PLAIN)
    return data_dir, out_dir


def launch(where, run_id, tmp_path, patch="", more=(), **changes):
    """two ranks of train.py as children of a torchrun; patch is Python that runs first in each of them"""
    script = tmp_path / "patched.py"
    script.write_text(
        f"import runpy, sys\nsys.path[:0] = [{ROOT!r}]\n{patch}\n"
        f"sys.argv[0] = 'train.py'\nrunpy.run_path({os.path.join(ROOT, 'train.py')!r}, run_name='__main__')\n"
    )
    values = dict(data_dir=where[0], out_dir=where[1], dataset="tiny", run_id=run_id) | RUN | PLAIN | changes
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *more]
    # the variable: see docs/scale.md, without it a restart fails now and then
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipe = subprocess.PIPE
    command = [*torchrun, str(script), *flags(**values)]
    how = dict(stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, **how)


def finish(child, code=0):
    """(stdout, stderr) of what launch started, and its exit code is this one"""
    try:
        out, err = child.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)  # torchrun ends its ranks
        raise
    assert child.returncode == code, f"{out[-2000:]}\n{err[-6000:]}"
    return out, err


def two(where, run_id, n=2, patch="", **changes):
    """stdout of each of n ranks of train.py, which end well"""
    values = dict(data_dir=where[0], out_dir=where[1], dataset="tiny", run_id=run_id) | RUN | PLAIN | changes
    results = [child.wait(150) for child in start_ranks(n, patch, **values)]
    assert [code for code, _, _ in results] == [0] * n, results
    return [out for _, out, _ in results]


def assert_same(where, a, b):
    for left, right in zip(*(final(f"{where[1]}/{run_id}", 20) for run_id in (a, b))):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert rows(f"{where[1]}/{a}") == rows(f"{where[1]}/{b}")
    samples = [lines(f"{where[1]}/{run_id}", "samples/samples.jsonl") for run_id in (a, b)]
    assert samples[0] == samples[1]


def test_a_fault_that_rank_0_finds_ends_all_in_silence(one):
    """bug guarded: a line that tells the user's mistake, lost between the tracebacks of ranks that waited"""
    values = RUN | PLAIN | dict(data_dir=one[0], out_dir=one[1])
    for wrong, told in (
        ({"dataset": "nope"}, "data set"),
        ({"run_id": "one", "dataset": "tiny"}, "holds a run"),
    ):
        first, second = (child.wait(60) for child in start_ranks(2, **values | wrong))
        assert first[0] == second[0] == 2 and first[2].count("error: ") == 1 and told in first[2]
        assert not second[2]


def test_two_processes_are_one_bit_for_bit(one):
    """bugs guarded: ranks that see the same data, draw the same dropout, divide by the wrong number, log
    only their own loss, write each line twice"""
    out, silent = two(one, "two")
    assert_same(one, "one", "two")
    result = json.loads(out.strip().split("\n")[-1])
    assert result["step"] == 20 and result["tokens"] == 20 * 128
    assert out.count('{"run_id"') == 1 and not silent
    assert json.load(open(f"{one[1]}/two/config.json"))["world_size"] == 2


def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(one, tmp_path):
    """bugs guarded: a rank that leaves alone while the other waits for its gradients; a checkpoint that only
    as many ranks can read"""
    patch = "import os, signal, torch\nreal, n = torch.optim.AdamW.step, [0]\n"
    patch += "def step(*a, **k):\n    n[0] += 1\n"
    patch += "    if n[0] == 7 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
    patch += "    return real(*a, **k)\ntorch.optim.AdamW.step = step"
    _, err = finish(launch(one, "signalled", tmp_path, patch=patch), code=1)
    assert err.count("stopped by signal 15, saved step 7; to continue: ") == 1
    assert lines(f"{one[1]}/signalled", EVENTS)[-1]["event"] == "interrupt"
    train(*one, "signalled", resume="auto", **PLAIN)
    assert_same(one, "one", "signalled")


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_the_launcher_saves_once(one, tmp_path, to_all):
    """bugs guarded: a rank that has heard of the other's signal takes its own for the second one, and exits
    without saving; or the launcher's for a second one where SLURM has sent it to all"""
    run_id = f"ended{to_all}"
    patch = "import time, torch\nreal = torch.optim.AdamW.step\n"
    patch += "def step(*a, **k): time.sleep(0.1); return real(*a, **k)\ntorch.optim.AdamW.step = step"
    child = launch(one, run_id, tmp_path, patch=patch, max_steps=10_000, sample_every=0)
    path, deadline = f"{one[1]}/{run_id}/{SCALARS}", time.time() + 100
    while not (os.path.exists(path) and '"step": 3, "epoch"' in open(path, encoding="utf-8").read()):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    assert len(found) == 2
    for pid in [*map(int, found if to_all else []), child.pid]:
        os.kill(pid, signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and "nothing saved" not in err
    assert err.count("stopped by signal 15, saved step") == 1
    assert lines(f"{one[1]}/{run_id}", EVENTS)[-1]["event"] == "interrupt"


def test_a_killed_rank_is_restarted_by_torchrun(one, tmp_path):
    """bug guarded: a restart that begins anew, or goes on from another step on each rank"""
    patch = "import os, signal, torch\nreal, n = torch.optim.AdamW.step, [0]\n"
    patch += "def step(*a, **k):\n    n[0] += 1\n"
    patch += "    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1'\n"
    patch += "    if n[0] == 13 and first: os.kill(os.getpid(), signal.SIGKILL)\n"
    patch += "    return real(*a, **k)\ntorch.optim.AdamW.step = step"
    finish(launch(one, "killed", tmp_path, patch=patch, more=["--max-restarts=1"], resume="auto"))
    assert_same(one, "one", "killed")
    resumed = [row["step"] for row in lines(f"{one[1]}/killed", EVENTS) if row["event"] == "resume"]
    assert resumed in ([10], [12])


def test_three_ranks_resume_bit_for_bit(one):
    """bug guarded: DDP sums the gradients in another order in its first step than in the later ones, which
    from three ranks on gives other bits in the first step after a resume"""
    how = dict(n=3, total_batch_size=192, sample_every=0, eval_every=0)
    two(one, "three", **how)
    two(one, "three_resumed", resume=f"{one[1]}/three/checkpoints/step_000010", **how)
    for left, right in zip(*(final(f"{one[1]}/{name}", 20) for name in ("three", "three_resumed"))):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_what_routers_did_is_summed_over_ranks_and_resumes(one):
    """bugs guarded: a line of the routers that tells of rank 0's tokens alone; the sums since the last line
    counted once for each rank after a resume, or those of rank 0 alone saved"""
    how = dict(n_expert=3, ternary=False, log_every=4, sample_every=0, eval_every=0, keep_last=0)
    train(*one, "m1", **PLAIN | how)
    two(one, "m2", resume=f"{one[1]}/m1/checkpoints/step_000010", **how)
    train(*one, "m3", resume=f"{one[1]}/m2/checkpoints/step_000015", **PLAIN | how)
    m1, m2, m3 = (
        {row["step"]: row["total"] for row in lines(f"{one[1]}/{name}", "metrics/router.jsonl")}
        for name in ("m1", "m2", "m3")
    )
    assert list(m1) == [4, 8, 12, 16, 20] and list(m2) == [12, 16, 20] and list(m3) == [16, 20]
    assert all(row == pytest.approx(m1[step], rel=1e-3) for step, row in [*m2.items(), *m3.items()])


def test_a_time_limit_on_one_rank_ends_both(one):
    """bug guarded: clocks that differ by a step leave one rank waiting for the other's gradients"""
    patch = "import os; from nanobit import machine as device\n"
    patch += "if os.environ['RANK'] == '1': device.Speedometer.seconds = lambda self: 1e9"
    out, _ = two(one, "minutes", patch=patch, max_minutes=60)
    assert json.loads(out.strip().split("\n")[-1])["step"] == 0


def test_a_second_signal_within_five_seconds_is_the_first(monkeypatch):
    """bugs guarded: torchrun's signal after SLURM's ends a rank before it has saved; a Ctrl-C that no second
    one hastens"""
    clock, ended = [100.0], []
    monkeypatch.setattr(distributed, "received", 0)
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed.os, "write", lambda *a: None)
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    for second in (0, 4, 6):
        clock[0] = 100.0 + second
        distributed.on_signal(15, None)
        assert ended == ([143] if second == 6 else [])


def test_float16_on_two_ranks(one):
    """bug guarded: a scale of the loss that each rank finds alone"""
    how = dict(ternary=False, dtype="float16", max_steps=5, eval_every=0, sample_every=0)
    train(*one, "half", **PLAIN | how)
    two(one, "two_halves", **how)
    a, b = ([row["loss"] for row in rows(f"{one[1]}/{name}")] for name in ("half", "two_halves"))
    assert len(a) == 5 and a == pytest.approx(b, abs=1e-4)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(one):
    """bug guarded: ranks whose weights part for ever. Only the loss of one rank is not finite here: a
    gradient would be averaged, and seen by both"""
    patch = "import os\n" + NAN.format(bad="count[0] == 5 and os.environ['RANK'] == '1'")
    patch = patch.replace("out[0] * float('nan')", "out[0] + float('nan')")
    two(one, "nan", patch=patch, sample_every=0)
    told = [
        (row["step"], row["steps"]) for row in lines(f"{one[1]}/nan", EVENTS) if row["event"] == "anomaly"
    ]
    assert told == [(4, 1)] and all(w.isfinite().all() for w in final(f"{one[1]}/nan", 20)[0].values())


def test_a_sharded_mixture_is_the_whole_one(one):
    """bugs guarded: Muon on a shard of a matrix; ternary scales of a shard; a sharded checkpoint that one
    process cannot read, or the other way round; an evaluation that not every rank takes part in"""
    how = dict(n_expert=3, optimizer="muon", ternary=False, schedule="constant", dropout=0.0, eval_tokens=192)
    # on a CPU with bfloat16 units Muon iterates in bfloat16, whose roundings are larger than the bounds
    how |= dict(
        keep_last=0,
        patch="import torch\nfrom nanobit import machine as m\nm.matrix_dtype = lambda device: torch.float32",
    )
    train(*one, "mixture", **PLAIN | how)
    two(one, "sharded", fsdp=True, **how | dict(max_steps=11))
    train(*one, "sharded", resume="auto", **PLAIN | how)
    for left, right in zip(*(final(f"{one[1]}/{name}", 20) for name in ("mixture", "sharded"))):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    losses = [
        [row.get("loss", row.get("val_loss")) for row in rows(f"{one[1]}/{n}")]
        for n in ("mixture", "sharded")
    ]
    assert (
        losses[0][:13] == pytest.approx(losses[1][:13], abs=1e-5)
        and len(lines(f"{one[1]}/sharded", "metrics/router.jsonl")) == 20
    )
    weights = final(f"{one[1]}/sharded", 20)[0]
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr(), "written twice"
    two(one, "sharded_on", fsdp=True, resume=f"{one[1]}/mixture/checkpoints/step_000010", **how)
    for left, right in zip(*(final(f"{one[1]}/{name}", 20) for name in ("mixture", "sharded_on"))):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    how = dict(schedule="constant", max_steps=3, sample_every=0)
    train(*one, "bits", **PLAIN | how)
    two(one, "bit_shards", fsdp=True, **how)
    health = [
        lines(f"{one[1]}/{name}", "metrics/bitnet.jsonl")[-1]["total"] for name in ("bits", "bit_shards")
    ]
    del health[0]["act_absmax"], health[1]["act_absmax"]  # of the tokens that the process has just read
    assert health[0] == pytest.approx(health[1], rel=1e-3)


@pytest.mark.parametrize("ternary, steps", [(True, 5), (False, 20)])
def test_four_micro_steps_are_two_on_each_of_two(one, ternary, steps):
    """bug guarded: gradients averaged at every micro-step, or only the last one's counted. The sums have
    another order: a ternary model's roundings may flip later"""
    how = dict(total_batch_size=256, ternary=ternary, sample_every=0, eval_every=0, schedule="constant")
    how |= dict(max_steps=steps, save_every=0)
    train(*one, f"four{ternary}", **PLAIN | how)
    two(one, f"twice_two{ternary}", **how)
    a, b = (
        [row["loss"] for row in rows(f"{one[1]}/{name}{ternary}")][:steps] for name in ("four", "twice_two")
    )
    assert len(a) == steps and a == pytest.approx(b, abs=1e-4)
