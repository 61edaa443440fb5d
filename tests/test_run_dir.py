"""The folder of a run: one process at a time, and a best.json that is whole."""

import json
import os
import re
import shutil
import subprocess

import pytest
from checkpoints import no_room, refusal
from conftest import settings

from nanobit import record
from nanobit.run_dir import RunDir, git_commit, step_dir, step_folders


def test_a_second_process_is_refused(run_dir):
    """The same command twice does not write two runs into one folder."""
    run = RunDir(run_dir)
    run.open()
    assert "another process" in refusal(RunDir(run_dir).open)
    run.lock.release()


def test_a_folder_is_free_again_once_its_lock_is_released(run_dir):
    """A run may be opened by the next process when the former one has ended."""
    for _ in range(2):
        run = RunDir(run_dir)
        run.open()
        run.lock.release()


def test_a_full_disk_leaves_the_former_best(run_dir, monkeypatch, capsys):
    """best.json that cannot be written costs a warning, and its former content stays whole."""
    assert RunDir(run_dir).write_best({"step": 5, "val_loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        assert not RunDir(run_dir).write_best({"step": 10, "val_loss": 0.5})
    assert "No space left" in capsys.readouterr().err
    with open(os.path.join(run_dir, "best.json"), encoding="utf-8") as file:
        assert json.load(file)["step"] == 5
    assert not any(".tmp-" in name for name in os.listdir(run_dir))


@pytest.mark.parametrize("fields", [dict(why="max_steps"), dict(result={}), dict(why=3, result={})])
def test_a_finish_without_its_result_is_none(run_dir, fields):
    """A run whose last event lacks the reason or the result is not finished."""
    record.event(run_dir, "finish", step=9, **fields)
    assert RunDir(run_dir).finished(settings(max_steps=9), 9, 0) == ""


def test_a_finished_run_knows_its_reason(run_dir):
    """A run whose last event is whole is finished, for the reason in that event."""
    record.event(run_dir, "finish", step=9, why="max_steps", result={})
    assert RunDir(run_dir).finished(settings(max_steps=9), 9, 0) == "max_steps"


def test_a_folder_with_another_name_is_not_a_step(run_dir):
    """Only the names that step_dir gives are step folders: another one would stand for a missing folder."""
    for step in (5, 300, 1_234_567):
        os.makedirs(step_dir(run_dir, step))
    for name in ("step_0000300", "step_0000400", "step_400", "step_000400.old", "step_\u0660" + 5 * "0"):
        os.makedirs(os.path.join(run_dir, "checkpoints", name))
    assert step_folders(run_dir) == [1_234_567, 300, 5]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_of_a_run_names_uncommitted_code(tmp_path):
    """Two states of the code have two names, committed or not; the rest of the repository does not count."""

    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *who, *command], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    for name in ("model.py", "README.md"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    clean = git_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "README.md").write_text("2\n")
    assert git_commit(tmp_path) == clean
    names = set()
    for text in ("2\n", "3\n"):
        (tmp_path / "model.py").write_text(text)
        names.add(git_commit(tmp_path))
    assert len(names) == 2
    assert all(re.fullmatch(rf"{clean}\+[0-9a-f]{{8}}", name) for name in names)
    (tmp_path / "nanobit").mkdir()
    for text in ("4\n", "5\n"):
        (tmp_path / "nanobit" / "mine.py").write_text(text)
        names.add(git_commit(tmp_path))
    (tmp_path / "model.py").unlink()
    names.add(git_commit(tmp_path))
    assert len(names) == 5
