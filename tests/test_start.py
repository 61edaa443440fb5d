"""nanobit/start.py and resume.py: how a run starts, resumes, branches off and is made longer."""

import os

import faults
import pytest
import torch
from conftest import (
    EVENTS,
    lines,
    result_of,
    rows,
    settings,
    train,
    write_data,
)
from written import SAMPLES, best_of, events, trained_steps, val_losses

from nanobit import run_dir, start
from nanobit.checkpoint import step_dir


def test_auto_starts_if_there_is_nothing_to_resume(finished):
    """resume = 'auto' starts a run whose folder does not exist."""
    assert events(f"{finished[1]}/a", "start")[0]["step"] == 0
    assert trained_steps(f"{finished[1]}/a") == list(range(1, 11))


def test_a_run_is_not_overwritten(finished):
    """The same command again, without resume, exits with 2 and names both ways out."""
    _, err = train(*finished, "a", code=2, sample_every=0)
    assert "already holds a run, up to step 10" in err
    assert "--resume=auto" in err
    assert "--run_id=" in err


def test_a_finished_run_prints_its_result_again(finished):
    """resume = 'auto' of a finished run prints what ended it, and its result, and exits with 0."""
    out, _ = train(*finished, "a", max_steps=10, resume="auto", sample_every=0)
    assert "is finished: step 10, ended by max_steps" in out
    assert result_of(out)["step"] == 10


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            dict(n_embd=64, n_layer=3),
            ["n_embd = 64, the checkpoint has 32", "n_layer = 3, the checkpoint has 1"],
        ),
        (dict(seed=1), ["seed = 1, the checkpoint has 1337"]),
        (dict(ternary=False), ["ternary = False"]),
        (dict(total_batch_size=128), ["total_batch_size = 128, the checkpoint has 64"]),
    ],
)
def test_another_model_is_not_resumed(finished, changes, says):
    """A resume into another model, seed or batch exits with 2, and names each setting with both values."""
    _, err = train(*finished, "a", code=2, resume="auto", sample_every=0, **changes)
    assert [text for text in says if text not in err] == []
    assert f"--resume={finished[1]}/a alone takes the settings of the run; --init_from= takes" in err


def test_a_run_is_not_made_shorter_than_its_checkpoint(finished):
    """A max_steps below the step of the checkpoint exits with 2."""
    _, err = train(*finished, "a", code=2, resume="auto", sample_every=0, max_steps=8)
    assert "max_steps = 8 is less than the 10 steps" in err
    assert "raise it" in err


def test_a_path_with_another_run_id_branches_off(finished):
    """A new run from the checkpoint of another records it, makes the later steps itself, and prints what
    changed."""
    data_dir, out_dir = finished
    origin = step_dir(f"{out_dir}/a", 5)
    out, _ = train(data_dir, out_dir, "b", max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "changed: grad_clip = 0.5, the checkpoint has 1.0" in out
    event = lines(f"{out_dir}/b", EVENTS)[0]
    assert event["event"] == "resume"
    assert event["step"] == 5
    assert event["path"] == origin
    assert trained_steps(f"{out_dir}/b") == [6, 7, 8, 9, 10]


def test_a_path_inside_the_run_rewinds_it(copied):
    """A run that resumes from an earlier checkpoint of its own renames the later ones, and writes each line
    once; it then is what a branch from there is."""
    data_dir, out_dir = copied
    origin = step_dir(f"{out_dir}/a", 5)
    for run_id in ("b", "a"):
        out, _ = train(data_dir, out_dir, run_id, max_steps=10, resume=origin, sample_every=0, grad_clip=0.5)
    assert "later than the step" in out
    assert trained_steps(f"{out_dir}/a") == list(range(1, 11))
    assert rows(f"{out_dir}/a")[-1] == rows(f"{out_dir}/b")[-1]


WORSE = dict(sample_every=0, learning_rate=3.0, stage2_lr_ratio=1.0, min_lr_ratio=1.0)


def test_a_branch_has_its_own_best(finished):
    """The best of a branch is among its own evaluations, though they are worse than that of its origin."""
    data_dir, out_dir = finished
    train(data_dir, out_dir, "c", max_steps=12, resume=f"{out_dir}/a", **WORSE)
    assert best_of(f"{out_dir}/c")["step"] == 12


def test_the_best_stays_if_it_is_not_beaten(copied):
    """A run that continues with worse evaluations keeps its best."""
    data_dir, out_dir = copied
    former = best_of(f"{out_dir}/a")
    train(data_dir, out_dir, "a", max_steps=12, resume="auto", **WORSE)
    assert former["step"] <= 10
    assert best_of(f"{out_dir}/a") == former


def test_other_validation_windows_begin_a_new_best(copied):
    """The best loss of other validation windows is not compared with that of the former ones."""
    data_dir, out_dir = copied
    former = best_of(f"{out_dir}/a")
    train(data_dir, out_dir, "a", max_steps=14, resume="auto", eval_tokens=48, **WORSE)
    losses = {step: loss for step, loss in val_losses(f"{out_dir}/a").items() if step >= former["step"]}
    best = best_of(f"{out_dir}/a")
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert best["val_loss"] != former["val_loss"]


@pytest.mark.parametrize("resume, changes", [("checkpoints/step_000005", dict(seed=1)), ("nothing", {})])
def test_a_refused_start_leaves_no_folder(finished, resume, changes):
    """A start that exits with 2 leaves no folder of a run behind."""
    data_dir, out_dir = finished
    train(data_dir, out_dir, "d", code=2, resume=f"{out_dir}/a/{resume}", **changes)
    assert not os.path.exists(f"{out_dir}/d")


def test_other_tokens_under_the_same_name_are_refused(finished, tmp_path):
    """A data set that was made again in another way is not the one of the run, and exits with 2."""
    other = write_data(tmp_path / "other", n_train=501)
    _, err = train(other, finished[1], "a", code=2, max_steps=10, resume="auto", sample_every=0)
    assert "its tokens are not those" in err


# a finished run that is made longer


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Return (folder, stdout) of a run of 10 steps that was continued to 16."""
    folder = tmp_path_factory.mktemp("longer")
    where = write_data(folder / "data"), str(folder / "runs")
    changes = dict(resume="auto", sample_every=8, save_every=0, stage_boundary=0.75)
    train(*where, "r", max_steps=10, **changes)
    out, _ = train(*where, "r", max_steps=16, **changes)
    return f"{where[1]}/r", out


def test_a_longer_run_prints_where_its_schedule_jumps(longer):
    """A run that is made longer prints that it is back in stage 1, and both learning rates."""
    assert "back in stage 1 until step 12" in longer[1]
    assert "the learning rate is 1.11e-03 from here; before it was 1.50e-05" in longer[1]


def test_a_longer_run_loses_no_evaluation(longer):
    """The evaluation of the former end, and the best, stay, though nothing is due there any more."""
    losses = val_losses(longer[0])
    assert list(losses) == [0, 6, 10, 12, 16]
    del losses[0]
    best = best_of(longer[0])
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]


def test_a_longer_run_keeps_the_checkpoint_of_its_former_end(data_dir, out_dir):
    """The last checkpoint of the first run stays after its evaluation, the best until then, is beaten."""
    changes = dict(resume="auto", save_every=0, sample_every=0, schedule="linear")
    train(data_dir, out_dir, "r", max_steps=4, **changes)
    train(data_dir, out_dir, "r", max_steps=8, patch=faults.validation_loss(2, 0.5), eval_every=8, **changes)
    assert best_of(f"{out_dir}/r") == {"step": 8, "val_loss": 0.5}
    assert run_dir.steps(f"{out_dir}/r") == [8, 4]


def test_a_longer_run_loses_no_sample(longer):
    """The samples of the former end stay."""
    assert {row["step"] for row in lines(longer[0], SAMPLES)} == {8, 10, 16}


def test_conversations_without_a_trained_model_are_a_warning(capsys):
    """Training on conversations from random weights is reported: it is nearly always a forgotten flag."""
    layer = torch.nn.Linear(1, 1)
    start.load(settings(), None, run_dir.Origin(), {"chat": "user-assistant"}, {}, layer, [], None)
    assert "warning: conversations are for a trained model" in capsys.readouterr().out
    start.load(settings(), None, run_dir.Origin(), {}, {}, layer, [], None)
    assert not capsys.readouterr().out


def test_the_first_lines_say_whether_graphs_are_used():
    """The line on the device names CUDA graphs if the run uses them."""
    facts = dict(params=dict(total=9, ternary=8), device="H200", dtype="bfloat16", compile=True)
    assert "bfloat16, compiled" in start.opening(settings(), facts | dict(graphs=False))
    assert "micro-steps as CUDA graphs, compiled" in start.opening(settings(), facts | dict(graphs=True))
