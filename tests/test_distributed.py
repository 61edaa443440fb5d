"""train.py on several ranks: two processes are one, and what one finds all do. On the CPU, over gloo."""

import json
import shutil

import faults
import pytest
from conftest import EVENTS, final, lines, result_of, train
from ranks import PLAIN, assert_close, assert_same, losses, on_ranks, one_process, two


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return (data_dir, out_dir) with the run of one process."""
    return one_process(tmp_path_factory)


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
