"""Checkpoints: nothing half-written counts, nothing damaged is used, nothing needed is pruned."""

import os

import pytest
from checkpoints import flip, no_room, refusal, save, write
from conftest import settings
from parts import part_of

from nanobit import checkpoint, record, saving, start, weights
from nanobit.checkpoint import MODEL, TRAINER, step_dir
from nanobit.run_dir import Origin, RunDir, steps


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


def folders(run_dir):
    return sorted(os.listdir(os.path.join(run_dir, "checkpoints")))


# what counts as a checkpoint


@pytest.mark.parametrize("name", [MODEL, TRAINER])
@pytest.mark.parametrize("harm", [flip, truncate, os.remove])
def test_a_damaged_checkpoint_is_skipped_and_named(run_dir, name, harm):
    """A flipped bit, which torch.load takes for a weight, a cut and a missing file make a resume use the
    checkpoint before."""
    save(run_dir, 5), save(run_dir, 10)
    harm(os.path.join(step_dir(run_dir, 10), name))
    folder, skipped = checkpoint.newest(run_dir, resumable=True)
    assert folder == step_dir(run_dir, 5)
    assert skipped[0][0] == 10
    assert name in skipped[0][1]


@pytest.mark.parametrize("harm", [flip, truncate, os.remove])
@pytest.mark.parametrize("name, step", [(MODEL, 5), (TRAINER, 10)])
def test_using_a_model_needs_no_trainer(run_dir, name, step, harm):
    """A damaged trainer.pt does not keep the weights of its step from being used."""
    save(run_dir, 5), save(run_dir, 10)
    harm(os.path.join(step_dir(run_dir, 10), name))
    folder, _ = checkpoint.newest(run_dir, resumable=False)
    assert folder == step_dir(run_dir, step)


@pytest.mark.parametrize("bit", [0x01, 0x80])
@pytest.mark.parametrize("at", [-20, -60, -100, -140, -160])
def test_a_flipped_bit_in_a_manifest_is_a_fault(run_dir, at, bit):
    """A checkpoint whose manifest has a flipped bit is skipped, without a traceback."""
    save(run_dir, 5), save(run_dir, 10)
    flip(os.path.join(step_dir(run_dir, 10), "manifest.json"), at, bit)
    assert checkpoint.newest(run_dir, resumable=True)[0] == step_dir(run_dir, 5)


@pytest.mark.parametrize("text", ["[]", "null", '{"files": 3}', "[" * 100_000])
def test_a_manifest_of_another_form_is_skipped(run_dir, text):
    """Whatever JSON a damaged manifest holds, it is a fault and not an error."""
    save(run_dir, 5), save(run_dir, 10)
    with open(os.path.join(step_dir(run_dir, 10), "manifest.json"), "w") as file:
        file.write(text)
    folder, skipped = checkpoint.newest(run_dir, resumable=True)
    assert folder == step_dir(run_dir, 5)
    assert "manifest.json is damaged" in skipped[0][1]


def test_without_a_manifest_there_is_no_checkpoint(run_dir):
    """A folder without a manifest, as a killed save leaves it, is not a checkpoint."""
    save(run_dir, 5), save(run_dir, 10)
    os.remove(os.path.join(step_dir(run_dir, 10), "manifest.json"))
    assert steps(run_dir) == [5]


def test_a_folder_without_a_manifest_does_not_stand_in_the_way(run_dir):
    """A step whose folder has no manifest can be saved again."""
    save(run_dir, 5), save(run_dir, 10)
    os.remove(os.path.join(step_dir(run_dir, 10), "manifest.json"))
    save(run_dir, 10)
    assert steps(run_dir) == [10, 5]
    assert checkpoint.fault(step_dir(run_dir, 10), MODEL) is None


# saving


def test_a_checkpoint_is_flushed_before_it_has_its_name(run_dir, monkeypatch):
    """The files, the manifest and their folder reach the disk before the rename, the rename after it."""
    calls = []
    fsync = os.fsync
    rename = os.rename

    def noted_fsync(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split("-")[0])
        fsync(handle)

    def noted_rename(*args):
        calls.append("rename")
        rename(*args)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(run_dir, 5)
    partial = "step_000005.tmp"
    assert calls == [MODEL, TRAINER, "manifest.json.tmp", partial, "rename", "checkpoints"]


def test_the_record_is_flushed_before_a_checkpoint(run_dir, monkeypatch):
    """A checkpoint that survives a power cut has the lines of the record before it."""
    record.event(run_dir, "start")
    calls = []
    fsync = os.fsync

    def noted_fsync(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    assert saving.try_save(settings(), RunDir(run_dir), 5, ({}, {}), "schedule", set())
    assert "events.jsonl" in calls[: calls.index(MODEL)]


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_save_that_fails_leaves_what_was_there(run_dir, monkeypatch, function):
    """A full disk keeps the last good checkpoint, and no partial of the new one."""
    save(run_dir, 5)
    monkeypatch.setattr(os, function, no_room)
    with pytest.raises(OSError):
        save(run_dir, 10)
    assert folders(run_dir) == ["step_000005"]
    assert checkpoint.newest(run_dir, True)[0] == step_dir(run_dir, 5)


def test_a_save_keeps_weights_without_a_manifest(run_dir):
    """What lies in the place of a new checkpoint is renamed, not deleted."""
    os.remove(os.path.join(save(run_dir, 5), "manifest.json"))
    assert os.path.exists(os.path.join(save(run_dir, 5) + ".aside", MODEL))


# pruning and cleaning


def test_pruning_keeps_the_newest_and_what_is_named(run_dir):
    """Pruning keeps trainer.pt of the newest checkpoints and of the steps that are named to it."""
    for step in range(1, 8):
        save(run_dir, step)
    saving.prune(run_dir, 2, {3})
    resumable = [s for s in steps(run_dir) if not checkpoint.fault(step_dir(run_dir, s), TRAINER)]
    assert resumable == [7, 6, 3]


def test_pruning_keeps_all_weights(run_dir):
    """Pruning never removes a checkpoint.pt."""
    for step in range(1, 8):
        save(run_dir, step)
    saving.prune(run_dir, 2, {3})
    assert [checkpoint.fault(step_dir(run_dir, step), MODEL) for step in range(1, 8)] == [None] * 7


def test_keep_last_0_keeps_all(run_dir):
    """Pruning removes nothing with keep_last = 0."""
    for step in range(1, 8):
        save(run_dir, step)
    saving.prune(run_dir, 0, set())
    assert [checkpoint.fault(step_dir(run_dir, step), TRAINER) for step in range(1, 8)] == [None] * 7


def test_pruning_leaves_a_linked_folder_alone(run_dir, tmp_path):
    """Pruning does not touch what a linked step folder holds."""
    save(run_dir, 5), save(run_dir, 10)
    os.rename(step_dir(run_dir, 5), tmp_path / "kept")
    os.symlink(tmp_path / "kept", step_dir(run_dir, 5))
    saving.prune(run_dir, 1, set())
    assert os.path.exists(tmp_path / "kept" / TRAINER)


def test_a_checkpoint_that_cannot_be_removed_costs_a_warning(run_dir, monkeypatch, capsys):
    """Training does not end because an old file cannot be deleted."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    save(run_dir, 5), save(run_dir, 10)
    monkeypatch.setattr(os, "remove", refuse)
    saving.prune(run_dir, 1, set())
    monkeypatch.setattr(os, "rename", refuse)
    saving.remove(step_dir(run_dir, 5))
    assert capsys.readouterr().err.count("warning: ") == 2
    assert steps(run_dir) == [10, 5]


def test_later_steps_are_renamed_not_lost(run_dir):
    """A run that continues from step 5 renames its step 10, from which it must not resume again."""
    save(run_dir, 5), save(run_dir, 10)
    saving.rename_later(run_dir, 5)
    assert steps(run_dir) == [5]
    assert checkpoint.fault(step_dir(run_dir, 10) + ".aside", MODEL) is None
    save(run_dir, 10)
    saving.rename_later(run_dir, 5)
    assert len(folders(run_dir)) == 3, "step 5, and step 10 of two courses of the run"


def test_only_own_temporaries_are_deleted(run_dir, capsys):
    """A folder of the user's stays, a step folder without a manifest is renamed, and that is printed."""
    folder = os.path.join(run_dir, "checkpoints")
    for name in ("mine", "step_000005.bak", "step_000003", "step_000007.tmp-12", "notes.tmp-1"):
        os.makedirs(os.path.join(folder, name))
        open(os.path.join(folder, name, "checkpoint.pt"), "w").close()
    saving.remove_partials(run_dir)
    saving.rename_later(run_dir, 10)
    assert folders(run_dir) == ["mine", "notes.tmp-1", "step_000003.aside", "step_000005.bak"]
    assert "step_000003, which has no manifest.json, to step_000003.aside" in capsys.readouterr().out


def test_partials_are_removed_before_the_disk_is_checked(run_dir, monkeypatch):
    """What a killed save has left does not count against the space that a restart needs."""
    partial = step_dir(run_dir, 5) + ".tmp-1"
    os.makedirs(partial)

    def check_disk(cfg, path, params, steps_left):
        assert not os.path.exists(partial)
        raise SystemExit(2)

    monkeypatch.setattr(saving, "check_disk", check_disk)
    facts = dict(params=dict(total=1))
    with pytest.raises(SystemExit):
        start.prepare_folder(settings(max_steps=9), RunDir(run_dir), Origin(), saving.State(), facts)


# finding a checkpoint


@pytest.mark.parametrize("path", ["", "checkpoints/step_000010", f"checkpoints/step_000010/{MODEL}"])
def test_locate_takes_a_run_a_step_or_a_file(run_dir, path):
    """A run folder stands for its newest checkpoint, as the step folder and its checkpoint.pt do."""
    save(run_dir, 5), save(run_dir, 10)
    assert checkpoint.locate(os.path.join(run_dir, path).rstrip("/")) == step_dir(run_dir, 10)


def test_locate_names_the_damaged_checkpoints_it_skips(run_dir, capsys):
    """A run folder stands for its newest intact checkpoint, and the newer ones are named."""
    save(run_dir, 5), save(run_dir, 10)
    flip(os.path.join(step_dir(run_dir, 10), MODEL))
    assert checkpoint.locate(run_dir) == step_dir(run_dir, 5)
    assert "skipped step 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path, says",
    [
        ("checkpoints/step_000010", "sha256"),
        ("nowhere", "does not exist"),
        ("checkpoints", "is not a checkpoint"),
    ],
)
def test_locate_refuses_what_is_not_an_intact_checkpoint(run_dir, path, says):
    """A path to a damaged checkpoint, to nothing or to another folder exits with 2, and with the reason."""
    save(run_dir, 5), save(run_dir, 10)
    flip(os.path.join(step_dir(run_dir, 10), MODEL))
    assert says in refusal(checkpoint.locate, os.path.join(run_dir, path))


def test_a_checkpoint_that_cannot_be_read_now_is_not_skipped(run_dir, unreadable, capsys):
    """EIO or EACCES is not damage: locate exits with 1 instead of using an older checkpoint."""
    with pytest.raises(SystemExit) as stop:
        checkpoint.locate(run_dir)
    assert stop.value.code == 1
    assert "checkpoint.pt cannot be read now" in capsys.readouterr().err
    assert folders(run_dir) == ["step_000005", "step_000010"]


def test_the_best_needs_a_best_json(run_dir):
    """RUN/best exits with 2 if no best.json names a checkpoint."""
    write(run_dir, 50), write(run_dir, 60)
    assert "has no best.json that names a checkpoint" in refusal(checkpoint.locate, f"{run_dir}/best")


def test_the_best_is_found_by_its_name(run_dir):
    """RUN/best stands for the step of best.json."""
    write(run_dir, 50), write(run_dir, 60)
    RunDir(run_dir).write_best({"step": 50, "val_loss": 1.0})
    for path in (f"{run_dir}/best", f"{run_dir}/best/"):
        assert checkpoint.locate(path) == step_dir(run_dir, 50)


@pytest.mark.parametrize(
    "path, step, is_hinted", [("", 60, True), ("checkpoints/step_000060", 60, True), ("best", 50, False)]
)
def test_whoever_uses_another_step_is_shown_the_best(run_dir, capsys, path, step, is_hinted):
    """A command prints the step that it uses and, if that is not the best one, the flag that selects it."""
    write(run_dir, 50), write(run_dir, 60)
    RunDir(run_dir).write_best({"step": 50, "val_loss": 1.0})
    hint = ""
    if is_hinted:
        hint = f"; its best evaluation was at step 50: --ckpt={os.path.join(run_dir, 'best')}"
    assert weights.trained(os.path.join(run_dir, path).rstrip("/"))[0]["step"] == step
    assert capsys.readouterr().err == f"using run r, step {step}{hint}\n"


@pytest.mark.parametrize("content", ["null", '{"step": "x"}', '{"step": 70}', "{"])
def test_a_damaged_best_json_names_no_step(run_dir, content):
    """A best.json of another form, or that names a step without a checkpoint, names no step."""
    write(run_dir, 60)
    with open(os.path.join(run_dir, "best.json"), "w", encoding="utf-8") as file:
        file.write(content)
    assert checkpoint.best_step(run_dir) is None


# formats


@pytest.fixture(params=[1, checkpoint.FORMAT + 1])
def other_format(request, tmp_path):
    """Return (folder, format) of a checkpoint of an older or a newer version, from before there were
    experts."""
    part = part_of(n_layer=7) | dict(format=request.param, step=3)
    del part["config"]["n_expert"]
    return saving.save(str(tmp_path), 3, part, part), request.param


def test_state_of_another_format_is_not_resumed(other_format):
    """A trainer.pt of an older or a newer format exits with 2, and names both formats."""
    folder, number = other_format
    says = f"has checkpoint format {number}, this version reads"
    assert says in refusal(checkpoint.load, folder, TRAINER)


def test_weights_of_an_older_format_are_used_those_of_a_newer_are_not(other_format):
    """Weights of an older version are read, and settings that it lacked have their defaults; weights of a
    newer one exit with 2."""
    folder, number = other_format
    if number > checkpoint.FORMAT:
        refusal(checkpoint.load, folder)
        return
    part = checkpoint.load(folder)
    assert part["step"] == 3
    assert part["config"]["n_layer"] == 7
    assert part["config"]["n_expert"] == 0
