"""How a run continues: what it may continue from, and what must agree with that."""

import copy
import math
import os
from types import SimpleNamespace

import pytest
import torch
from checkpoints import flip, refusal, save, write
from conftest import settings
from parts import CHAR, part_of

from model import Transformer
from nanobit import optim, resume, schedule, start
from nanobit.checkpoint import TRAINER, step_dir
from nanobit.run_dir import RunDir


def give_up(run_dir, capsys):
    """Return the lines on stderr of a resume = 'auto' that exits with 1."""
    with pytest.raises(SystemExit) as stop:
        resume.newest_resumable(RunDir(run_dir))
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_now_stops_a_resume(run_dir, unreadable, capsys):
    """EIO or EACCES is not damage: resume = 'auto' exits with 1 and renames nothing."""
    assert "checkpoint.pt cannot be read now" in give_up(run_dir, capsys)
    assert sorted(os.listdir(os.path.join(run_dir, "checkpoints"))) == ["step_000005", "step_000010"]


def test_whole_weights_are_not_abandoned(run_dir, capsys):
    """If weights are whole and no trainer.pt is, resume = 'auto' exits with 1 and names the choices."""
    for step in (5, 10):
        flip(os.path.join(save(run_dir, step), TRAINER))
    assert f"--init_from={step_dir(run_dir, 10)} with another" in give_up(run_dir, capsys)
    assert os.path.isdir(step_dir(run_dir, 10))


def test_weights_without_a_manifest_are_not_abandoned(run_dir, capsys):
    """If manifests are lost and weights exist, resume = 'auto' exits with 1 and renames nothing."""
    os.remove(os.path.join(save(run_dir, 5), "manifest.json"))
    assert "no manifest.json that verifies them" in give_up(run_dir, capsys)
    assert os.path.isdir(step_dir(run_dir, 5))


def test_a_link_to_another_disk_is_the_same_run(tmp_path):
    """A run whose folder checkpoints/ is a link resumes as itself, not as a branch."""
    run_dir = str(tmp_path / "r")
    os.makedirs(run_dir)
    os.makedirs(tmp_path / "disk")
    os.symlink(tmp_path / "disk", os.path.join(run_dir, "checkpoints"))
    save(run_dir, 5), save(run_dir, 10)
    run = RunDir(run_dir)
    origin = start.find(settings(resume=run_dir, run_id="r", out_dir=str(tmp_path)), run)
    assert origin == resume.Origin(step_dir(run_dir, 10), True, [])
    run.lock.release()


AGREE = "n_layer n_head n_kv_head n_embd ffn_dim vocab_size rope_theta norm_eps tie_embeddings".split()
AGREE += "ternary dataset seed seq_len total_batch_size tokenizer".split()


def compared(name):
    """Compare the settings of a run with those of a checkpoint that differs in this one."""
    cfg = settings()
    sha256 = {"tokenizer": "else"}.get(name, "0")
    part = dict(config=vars(cfg) | {name: "else"}, tokenizer=dict(sha256=sha256, eot=0))
    return resume.must_agree(cfg, part, dict(sha256="0", eot=0), resume.RUN, "resume", "; take those")


@pytest.mark.parametrize("name", AGREE)
def test_what_must_agree_is_refused_by_name(name):
    """A resume into another shape, data set, tokenizer or order of the tokens exits with 2 and names it."""
    err = refusal(compared, name)
    assert name in err
    assert ("take those" in err) == (name != "tokenizer")  # which no setting of the run would change


def test_what_may_change_is_printed(capsys):
    """Another setting of a resumed run is printed with its former value."""
    assert compared("beta1") == {"beta1": "else"}
    assert "changed: beta1 = 0.9, the checkpoint has 'else'" in capsys.readouterr().out


def test_parts_of_two_steps_are_not_resumed(run_dir):
    """checkpoint.pt and trainer.pt of different steps are refused, though the manifest agrees."""
    folder = write(run_dir, 60, trainer=dict(step=50))
    cfg = settings()
    model = Transformer(cfg)
    err = refusal(resume.restore, cfg, resume.Origin(folder), RunDir(run_dir), {}, {}, model, [], None)
    assert "checkpoint.pt is of step 60, trainer.pt of step 50" in err


# what trainer.pt holds, whoever wrote it


def trained(optimizer, **changes):
    """Return (cfg, model, optimizers) after an update without gradients, and their trainer.pt of step 6."""
    part = part_of(optimizer=optimizer, **changes)
    cfg = SimpleNamespace(**part["config"] | dict(run_id="r", max_steps=9), origin={})
    model = Transformer(cfg)
    optimizers = optim.make_optimizers(cfg, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers:
        one.step()
    states = copy.deepcopy([one.state_dict() for one in optimizers])
    return cfg, model, optimizers, dict(optimizer=states, step=6, data=DATA, best={}, counts={})


DATA = dict(complete=True, shards={})


def resumed(run_dir, cfg, model, optimizers, trainer):
    """Return (State, former) of a resume from a checkpoint of step 6 with this trainer.pt."""
    part = dict(config=vars(cfg) | dict(origin=None), model=model.state_dict())
    folder = write(run_dir, 6, trainer=trainer, **part)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    args = cfg, resume.Origin(folder), RunDir(run_dir), CHAR, DATA, model, optimizers, scaler
    return resume.restore(*args)


def first(trainer):
    """Return the state of the first parameter of the last optimizer, an AdamW."""
    return trainer["optimizer"][-1]["state"][0]


def state_of(trainer):
    """Return the state dict of the last optimizer."""
    return trainer["optimizer"][-1]


DAMAGE = {
    "no optimizer": lambda t: t.update(optimizer=[]),
    "one more optimizer": lambda t: t["optimizer"].append(state_of(t)),
    "no state": lambda t: [one["state"].clear() for one in t["optimizer"]],
    "another optimizer": lambda t: t["optimizer"].reverse() or first(t).clear(),
    "no groups": lambda t: state_of(t).update(param_groups=[]),
    "other parameters": lambda t: state_of(t)["param_groups"][0]["params"].pop(),
    "groups without parameters": lambda t: state_of(t)["param_groups"][0].clear(),
    "one more parameter": lambda t: state_of(t)["state"].update({10**6: first(t)}),
    "a negative parameter": lambda t: state_of(t)["state"].update({-1: first(t)}),
    "no exp_avg": lambda t: first(t).pop("exp_avg"),
    "exp_avg of another shape": lambda t: first(t).update(exp_avg=torch.zeros(3)),
    "exp_avg without a place": lambda t: first(t).update(
        exp_avg=torch.zeros(1).expand_as(first(t)["exp_avg"])
    ),
    "exp_avg of integers": lambda t: first(t).update(exp_avg=first(t)["exp_avg"].long()),
    "exp_avg of text": lambda t: first(t).update(exp_avg="x"),
    "more updates than steps": lambda t: first(t).update(step=torch.tensor(7.0)),
    "negative updates": lambda t: first(t).update(step=torch.tensor(-1.0)),
    "updates that are not a number": lambda t: first(t).update(step=torch.tensor(math.nan)),
    "a negative step": lambda t: t.update(step=-5),
    "another step": lambda t: t.update(step=5),
    "no data": lambda t: t.update(data={}),
    "data without shards": lambda t: t.update(data=dict(complete=True)),
    "shards of another type": lambda t: t.update(data=dict(complete=True, shards=3)),
    "a best of another type": lambda t: t.update(best=None),
    "an optimizer of another type": lambda t: t.update(optimizer={"state": {}}),
    "a scaler of another type": lambda t: t.update(scaler=[]),
    "data of another type": lambda t: t.update(data=3),
    "a best loss of text": lambda t: t.update(best=dict(step=3, val_loss="x")),
    "a best step of text": lambda t: t.update(best=dict(step="x", val_loss=1.0)),
    "counts of text": lambda t: t.update(counts={"scalars.jsonl": "x"}),
    "counts as a list": lambda t: t.update(counts=[3]),
    "negative counts": lambda t: t.update(counts={"scalars.jsonl": -1}),
    "one number of skips": lambda t: t.update(skipped=[0]),
    "skips of text": lambda t: t.update(skipped=["x", 0]),
    "more skips than a float holds": lambda t: t.update(skipped=[10**400, 0]),
    "negative evaluations": lambda t: t.update(stale_evals=-1),
    "a scaler without its scale": lambda t: t.update(scaler=dict(growth_factor=2.0)),
    "a scale of text": lambda t: t.update(scaler=dict(scale="x")),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_trainer_that_does_not_fit_is_one_line(run_dir, name, optimizer):
    """State of training of another form, or that does not fit the model, exits with 2 and one line, and
    changes neither the model nor its optimizers."""
    cfg, model, optimizers, trainer = trained(optimizer)
    before = copy.deepcopy((model.state_dict(), [one.state_dict() for one in optimizers]))
    DAMAGE[name](trainer)
    err = refusal(resumed, run_dir, cfg, model, optimizers, trainer)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    now = model.state_dict(), [one.state_dict() for one in optimizers]
    torch.testing.assert_close(now, before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_trainer_that_fits_is_resumed(run_dir, optimizer):
    """The state of the optimizers is given back, with the settings of today instead of its own."""
    cfg, model, optimizers, trainer = trained(optimizer)
    first(trainer)["exp_avg"] += 3
    state_of(trainer)["param_groups"][0]["amsgrad"] = True
    state, _ = resumed(run_dir, cfg, model, optimizers, trainer | dict(best=dict(step=3, val_loss=1.0)))
    assert state.step == 6
    torch.testing.assert_close(optimizers[-1].state_dict()["state"], state_of(trainer)["state"])
    assert not optimizers[-1].param_groups[0]["amsgrad"]


def test_a_resume_knows_what_was_reported_and_its_stage(run_dir):
    """The skipped steps that the log has are not reported twice, and the last update was still of stage 1."""
    cfg, model, optimizers, trainer = trained("adamw")
    cfg.max_steps = 12
    state, former = resumed(run_dir, cfg, model, optimizers, trainer | dict(skipped=[3, 2]))
    assert (state.skipped, state.skips_reported) == (3, 2)
    assert (schedule.stage(cfg, 6), former.stage) == (2, 1)


def test_a_renamed_step_folder_is_not_resumed(run_dir):
    """A step folder that has the name of another step is refused: the record would be cut there."""
    cfg, model, optimizers, trainer = trained("adamw")
    os.rename(write(run_dir, 6, trainer=trainer), step_dir(run_dir, 7))
    args = cfg, resume.Origin(step_dir(run_dir, 7)), RunDir(run_dir), CHAR, DATA, model, optimizers, None
    assert "the name of the folder must agree" in refusal(resume.restore, *args)


@pytest.mark.parametrize(
    "routers",
    [
        None,
        [],
        [torch.zeros(()), 1, 2],
        [torch.zeros(3), 1],
        ["x", 1],
        [torch.zeros(2, 6), "x"],
        [torch.zeros(2, 6), -1],
    ],
)
def test_a_mixture_needs_the_sums_of_its_routers(run_dir, routers):
    """A trainer.pt of a mixture without the sums of its routers, or with others, exits with 2."""
    cfg, model, optimizers, trainer = trained("adamw", n_expert=3, n_expert_active=2)
    err = refusal(resumed, run_dir, cfg, model, optimizers, trainer | dict(routers=routers))
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_mixture_gets_the_sums_of_its_routers(run_dir):
    """A mixture that resumes has the sums of its routers, or none yet."""
    cfg, model, optimizers, trainer = trained("adamw", n_expert=3, n_expert_active=2)
    for shape in ((), (2, 6)):
        routers = [torch.ones(shape), 4]
        state, _ = resumed(run_dir, cfg, model, optimizers, trainer | dict(routers=routers))
        assert torch.equal(state.routers, routers[0])
        assert state.n_router_samples == 4
