"""How a run continues: what it may continue from, and what must agree with that."""

import os

import pytest
from checkpoints import flip, refusal, save, write
from conftest import settings

from model import Transformer
from nanobit import resume, start
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
    return resume.must_agree(cfg, part, dict(sha256="0", eot=0), resume.RUN, "resume")


@pytest.mark.parametrize("name", AGREE)
def test_what_must_agree_is_refused_by_name(name):
    """A resume into another shape, data set, tokenizer or order of the tokens exits with 2 and names it."""
    assert name in refusal(compared, name)


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
