"""compare.py: what its command line means, and what it refuses before anything runs."""

import os
from unittest import mock

import pytest
from comparisons import NULL, arguments, call, no_run
from conftest import errors_of

import compare


@pytest.mark.parametrize(
    "fault", ["learning_rat=1e-3", "n_layer=two", "n_head=3 n_kv_head=2", "schedule=step", "optimizer"]
)
def test_a_wrong_try_is_refused_before_anything_runs(capsys, data_dir, out_dir, fault):
    """A typo, a bad type or a contradiction in any --try ends with exit code 2 and the words of train.py."""
    argv = arguments(data_dir, out_dir, NULL, fault, "seq_len=8")
    code, _, err = call(*argv, popen=no_run)
    own = [f"--{word}" for word in fault.split()]
    settings = [arg for arg in argv if not arg.startswith(("--try", "--seeds"))]
    assert code == 2
    assert err.splitlines()[:-1] == errors_of(capsys, *settings, *own)
    assert err.splitlines()[-1] == f"error: the line above is about --try={fault!r}"
    assert not os.path.exists(out_dir)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--try=seed=7"], "use --seeds"),
        (["--seed=7"], "use --seeds"),
        (["--try=run_id=x"], "run_id is the same for all variants"),
        (["--try=no_twin"], "twin is the same for all variants"),
        (["--try=log_every=2"], "its settings are those of the variant 'log_every=2'"),
        (["--try=n_layer=1"], "its settings are those of the variant 'unchanged'"),
        (["--try="], "its settings are those of the variant 'unchanged'"),
        (["--try=dataset='a"], "No closing quotation"),
        (["--max_minutes=1"], "--max_minutes=1: a comparison sets max_minutes itself"),
        (["--minutes=1"], "--max_steps=8: a comparison sets max_steps itself"),
        (["--eval_every=0"], "needs the validation loss"),
        (["--twin", "--try=ternary=False"], "leave one out"),
        (["--seeds=0"], "seeds = '0' must be"),
        (["--seeds=4,4"], "seeds = '4,4' must be"),
        (["--seeds=1337"], "seeds = '1337' must be"),
        (["--seeds=a"], "seeds = 'a' must be"),
    ],
)
def test_what_a_comparison_cannot_do_is_refused(data_dir, out_dir, more, says):
    """What a comparison decides itself, two equal variants and wrong seeds are refused, with exit code 2."""
    code, _, err = call(*arguments(data_dir, out_dir, NULL), *more, popen=no_run)
    assert code == 2
    assert says in err


@pytest.mark.parametrize("text, seeds", [("2", [1, 2]), ("4,5,6", [4, 5, 6]), ("7,", [7])])
def test_seeds_are_a_number_or_a_list(data_dir, out_dir, text, seeds):
    """A number counts the seeds from 1; a list names them."""
    with mock.patch.object(compare, "run_all", side_effect=SystemExit(0)) as run_all:
        call(*arguments(data_dir, out_dir, NULL, seeds=text))
    assert run_all.call_args[0][1][0].cfg.seeds == seeds
