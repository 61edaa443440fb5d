"""Parameters sharded over ranks by FSDP are the whole ones. On the CPU, over gloo."""

import faults
import pytest
from conftest import final, lines, rows, train
from ranks import PLAIN, assert_close, one_process, two

# on a CPU with bfloat16 units Muon iterates in bfloat16, whose roundings are larger than the bounds
MIXTURE = dict(n_layer=2, n_expert=3, optimizer="muon", ternary=False, schedule="constant", dropout=0.0)
MIXTURE |= dict(eval_tokens=192, keep_last=0, patch=faults.float32_muon())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return (data_dir, out_dir) with the run of one process."""
    return one_process(tmp_path_factory)


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
