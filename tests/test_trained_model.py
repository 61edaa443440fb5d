"""What train.py has saved, as evaluate.py and sample.py use it."""

import pytest
from conftest import result_of, run, train, write_data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Return (--ckpt= and --data_dir= of a run that evaluates all its windows, its result)."""
    folder = tmp_path_factory.mktemp("evaluated")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    out, _ = train(data_dir, out_dir, "r", max_steps=6, eval_tokens=10**6, sample_every=0)
    return [f"--ckpt={out_dir}/r", f"--data_dir={data_dir}"], result_of(out)


def test_evaluate_agrees_with_training(evaluated):
    """evaluate.py uses the windows and the forward of training."""
    where, trained = evaluated
    out, _ = run("evaluate.py", *where, "--batch_size=4")
    result = result_of(out)
    assert result["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-6)
    assert result["bits_per_byte"] == pytest.approx(trained["val_bits_per_byte"], abs=1e-6)
    assert result["dtype"] == "float32"


def test_evaluate_refuses_an_unknown_split(evaluated):
    """A split that the data set does not have exits with 2."""
    assert "no split 'test'" in run("evaluate.py", *evaluated[0], "--split=test", code=2)[1]


def test_sample_repeats_itself_with_its_seed(evaluated):
    """sample.py writes so many samples of the prompt, the same with the same seed only."""
    ask = [evaluated[0][0], "--prompt=ab", "--max_new_tokens=20", "--num_samples=4"]
    first, again, other = (run("sample.py", *ask, seed) for seed in ("--seed=3", "--seed=3", "--seed=4"))
    assert first[0] == again[0]
    assert first[0] != other[0]
    assert first[0].count("\nab") == 3
    assert "tokens/s" in first[1]


def test_sample_refuses_a_character_that_the_tokenizer_lacks(evaluated):
    """A prompt that cannot be encoded exits with 2, and with the character."""
    err = run("sample.py", evaluated[0][0], "--prompt=Z", code=2)[1]
    assert "tokenizer has no character 'Z'" in err


def test_sample_needs_a_prompt(evaluated):
    """A missing prompt exits with 2."""
    assert "--prompt=... or" in run("sample.py", evaluated[0][0], code=2)[1]
