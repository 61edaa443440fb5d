"""checkpoint.py and record.py: nothing half-written counts, nothing damaged is used, nothing needed is
pruned."""

import contextlib
import hashlib
import io
import math
import os
import pickle
import zipfile

import pytest
import torch
from conftest import settings
from parts import part_of

from model import Transformer
from nanobit import checkpoint, generate, record, resume, weights
from nanobit.checkpoint import MODEL, TRAINER
from nanobit.files import write_json
from nanobit.run_dir import RunDir


def save(run_dir, step):
    part = dict(format=1, step=step, model={"w": torch.full((1000,), float(step))})
    return checkpoint.save(str(run_dir), step, part, dict(format=checkpoint.FORMAT, step=step, optimizer={}))


@pytest.fixture
def run_dir(tmp_path):
    run = RunDir(str(tmp_path))
    run.open()
    run.lock.release()
    return str(tmp_path)


def flip(path, at=-200):
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


@pytest.mark.parametrize("name", [MODEL, TRAINER])
@pytest.mark.parametrize("harm", [flip, truncate, os.remove])
def test_a_damaged_checkpoint_is_passed_over(run_dir, name, harm):
    """bug guarded: torch.load takes a flipped bit for a weight"""
    save(run_dir, 5), save(run_dir, 10)
    harm(os.path.join(checkpoint.step_dir(run_dir, 10), name))
    folder, passed = checkpoint.newest(run_dir, resumable=True)
    assert folder == checkpoint.step_dir(run_dir, 5) and passed[0][0] == 10 and name in passed[0][1]
    folder, _ = checkpoint.newest(run_dir, resumable=False)
    assert folder == checkpoint.step_dir(run_dir, 10 if name == TRAINER else 5), (
        "using a model needs no trainer.pt"
    )


def test_a_damaged_manifest_is_passed_over(run_dir):
    """bug guarded: a flipped bit in the manifest itself ends in a traceback"""
    for at in (-20, -60, -100, -140, -160):
        save(run_dir, 5), save(run_dir, 10)
        path = os.path.join(checkpoint.step_dir(run_dir, 10), "manifest.json")
        for bit in (0x01, 0x80):
            with open(path, "r+b") as file:
                content = bytearray(file.read())
                content[at] ^= bit
                file.seek(0)
                file.write(content)
            assert checkpoint.newest(run_dir, resumable=True)[0] == checkpoint.step_dir(run_dir, 5)
        (
            checkpoint.remove(checkpoint.step_dir(run_dir, 10)),
            checkpoint.remove(checkpoint.step_dir(run_dir, 5)),
        )


@pytest.mark.parametrize("text", ["[]", "null", '{"files": 3}', "[" * 100_000])
def test_a_manifest_of_another_form_is_skipped(run_dir, text):
    """rule: whatever JSON a damaged manifest holds, it is a fault and not an error"""
    save(run_dir, 5), save(run_dir, 10)
    with open(os.path.join(checkpoint.step_dir(run_dir, 10), "manifest.json"), "w") as file:
        file.write(text)
    folder, skipped = checkpoint.newest(run_dir, resumable=True)
    assert folder == checkpoint.step_dir(run_dir, 5) and "manifest.json is damaged" in skipped[0][1]


def test_a_checkpoint_is_flushed_before_it_has_its_name(run_dir, monkeypatch):
    """rule: the files, the manifest and their folder reach the disk before the rename, the rename after it"""
    calls, fsync, rename = [], os.fsync, os.rename

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


def test_the_record_is_flushed(run_dir, monkeypatch):
    """rule: record.flush puts each file of the record on the disk"""
    calls, fsync = [], os.fsync
    for name in record.FILES:
        record.append_text(run_dir, "{}", name)
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), fsync(handle)))
    record.flush(run_dir)
    assert len(calls) == len(record.FILES)


def test_without_a_manifest_there_is_no_checkpoint(run_dir):
    """bug guarded: a folder of a killed save taken for the newest checkpoint"""
    save(run_dir, 5), save(run_dir, 10)
    os.remove(os.path.join(checkpoint.step_dir(run_dir, 10), "manifest.json"))
    assert checkpoint.steps(run_dir) == [5]
    save(run_dir, 10)  # and it does not stand in the way
    assert (
        checkpoint.steps(run_dir) == [10, 5]
        and checkpoint.fault(checkpoint.step_dir(run_dir, 10), MODEL) is None
    )


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_save_that_fails_leaves_what_was_there(run_dir, monkeypatch, function):
    """bug guarded: a full disk destroys the last good checkpoint, or leaves its partial behind"""
    save(run_dir, 5)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError):
        save(run_dir, 10)
    assert os.listdir(os.path.join(run_dir, "checkpoints")) == ["step_000005"]
    assert checkpoint.newest(run_dir, True)[0] == checkpoint.step_dir(run_dir, 5)


def test_pruning_keeps_weights_and_what_is_named(run_dir):
    """bug guarded: the best, the boundary, or the newest checkpoint pruned away"""
    for step in range(1, 8):
        save(run_dir, step)
    checkpoint.prune(run_dir, 2, {3})
    held = [
        s
        for s in checkpoint.steps(run_dir)
        if checkpoint.fault(checkpoint.step_dir(run_dir, s), TRAINER) is None
    ]
    assert held == [7, 6, 3]
    assert all(checkpoint.fault(checkpoint.step_dir(run_dir, s), MODEL) is None for s in range(1, 8))
    checkpoint.prune(run_dir, 0, set())
    assert os.path.exists(os.path.join(checkpoint.step_dir(run_dir, 3), TRAINER)), "0 keeps all"


def test_locate_takes_a_run_a_step_or_a_file(run_dir, capsys):
    save(run_dir, 5), save(run_dir, 10)
    want = checkpoint.step_dir(run_dir, 10)
    assert {checkpoint.locate(p) for p in (run_dir, want, os.path.join(want, MODEL))} == {want}
    flip(os.path.join(want, MODEL))
    assert checkpoint.locate(run_dir) == checkpoint.step_dir(run_dir, 5)
    assert "skipped step 10" in capsys.readouterr().err
    for path, says in (
        (want, "sha256"),
        (run_dir + "/nowhere", "does not exist"),
        (os.path.dirname(want), "is not a checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            checkpoint.locate(path)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_later_steps_are_set_aside_not_lost(run_dir):
    """bug guarded: a run that goes on from step 5 finds step 10 of its former course and resumes from that"""
    for step in (5, 10):
        save(run_dir, step)
    os.makedirs(os.path.join(run_dir, "checkpoints", "step_000015.tmp-1"))
    checkpoint.clean(run_dir, 5)
    aside = checkpoint.step_dir(run_dir, 10) + ".aside"
    assert checkpoint.steps(run_dir) == [5] and checkpoint.fault(aside, MODEL) is None
    save(run_dir, 10)
    checkpoint.clean(run_dir, 5)
    assert len(os.listdir(os.path.join(run_dir, "checkpoints"))) == 3


def test_only_own_temporaries_are_deleted(run_dir, capsys):
    """rule: a folder of the user's stays, a step folder without a manifest is renamed, and that is printed"""
    folder = os.path.join(run_dir, "checkpoints")
    for name in ("mine", "step_000005.bak", "step_000003", "step_000007.tmp-12", "notes.tmp-1"):
        os.makedirs(os.path.join(folder, name))
        open(os.path.join(folder, name, "checkpoint.pt"), "w").close()
    checkpoint.clean(run_dir, 10)
    want = ["mine", "notes.tmp-1", "step_000003.aside", "step_000005.bak"]
    assert sorted(os.listdir(folder)) == want
    assert "step_000003, which has no manifest.json, to step_000003.aside" in capsys.readouterr().out


def test_a_save_keeps_weights_without_a_manifest(run_dir):
    """rule: what lies in the place of a new checkpoint is renamed, not deleted"""
    os.remove(os.path.join(save(run_dir, 5), "manifest.json"))
    assert os.path.exists(os.path.join(save(run_dir, 5) + ".aside", MODEL))


def test_a_checkpoint_that_cannot_be_read_now_stops_a_resume(run_dir, monkeypatch, capsys):
    """rule: EIO or EACCES is not damage: resume = 'auto' exits with 1 and renames nothing"""
    save(run_dir, 5), save(run_dir, 10)
    real = open

    def failing(path, *args, **kwargs):
        if "step_000010" in str(path) and str(path).endswith(".pt"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    for choose in (lambda path: resume.newest_resumable(RunDir(path)), checkpoint.locate):
        with pytest.raises(SystemExit) as stop:
            choose(run_dir)
        assert stop.value.code == 1 and "checkpoint.pt cannot be read now" in capsys.readouterr().err
    assert sorted(os.listdir(os.path.join(run_dir, "checkpoints"))) == ["step_000005", "step_000010"]


def test_whole_weights_are_not_abandoned(run_dir, capsys):
    """rule: if weights are whole and no trainer.pt is, resume = 'auto' exits with 1 and names the choices"""
    save(run_dir, 5), save(run_dir, 10)
    for step in (5, 10):
        flip(os.path.join(checkpoint.step_dir(run_dir, step), TRAINER))
    with pytest.raises(SystemExit) as stop:
        resume.newest_resumable(RunDir(run_dir))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and f"--init_from={checkpoint.step_dir(run_dir, 10)} with another" in said
    assert os.path.isdir(checkpoint.step_dir(run_dir, 10))


def test_weights_without_a_manifest_are_not_abandoned(run_dir, capsys):
    """rule: if manifests are lost and weights are there, resume = 'auto' exits with 1 and renames nothing"""
    os.remove(os.path.join(save(run_dir, 5), "manifest.json"))
    with pytest.raises(SystemExit) as stop:
        resume.newest_resumable(RunDir(run_dir))
    assert stop.value.code == 1 and "no manifest.json that verifies them" in capsys.readouterr().err
    assert os.path.isdir(checkpoint.step_dir(run_dir, 5))


def test_half_a_line_does_not_stay(run_dir, monkeypatch):
    """rule: of a line for which the disk has no room nothing stays, onto which the next would be written"""
    record.append(run_dir, record.SCALARS, step=1, loss=0.5)
    real = open

    class Full:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, text):
            self.file.write(text[:9])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", Full)
    record.append(run_dir, record.SCALARS, step=2, loss=0.5)
    monkeypatch.undo()
    record.append(run_dir, record.SCALARS, step=3, loss=0.5)
    assert [row["step"] for row in record.read(run_dir, record.SCALARS)] == [1, 3]


def test_a_file_that_cannot_be_opened_is_not_emptied(run_dir, monkeypatch):
    """rule: a line that is lost since the disk is gone for a moment takes no other line with it"""
    record.append(run_dir, record.SCALARS, step=1, loss=0.5)
    real = open

    def gone(path, *args, **kwargs):
        raise OSError(116, "Stale file handle", path)

    monkeypatch.setattr("builtins.open", gone)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    record.append(run_dir, record.SCALARS, step=2, loss=0.5)
    monkeypatch.undo()
    assert real is open and record.read(run_dir, record.SCALARS) == [{"step": 1, "loss": 0.5}]


def test_a_link_to_another_disk_is_the_same_run(tmp_path):
    """rule: checkpoints/ may be a link; pruning does not touch what a linked step folder holds"""
    run_dir, elsewhere = str(tmp_path / "r"), str(tmp_path / "disk")
    os.makedirs(run_dir), os.makedirs(elsewhere)
    os.symlink(elsewhere, os.path.join(run_dir, "checkpoints"))
    save(run_dir, 5), save(run_dir, 10)
    cfg = settings(resume=run_dir, run_id="r", out_dir=str(tmp_path))
    run = RunDir(run_dir)
    assert resume.find(cfg, run) == resume.Origin(checkpoint.step_dir(run_dir, 10), True, [])
    run.lock.release()
    os.rename(checkpoint.step_dir(run_dir, 5), str(tmp_path / "kept"))
    os.symlink(str(tmp_path / "kept"), checkpoint.step_dir(run_dir, 5))
    checkpoint.prune(run_dir, 1, set())
    assert os.path.exists(tmp_path / "kept" / TRAINER)


def test_a_checkpoint_that_cannot_be_removed_costs_a_warning(run_dir, monkeypatch, capsys):
    """rule: training does not end because an old file cannot be deleted"""

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    save(run_dir, 5), save(run_dir, 10)
    monkeypatch.setattr(os, "remove", refuse)
    checkpoint.prune(run_dir, 1, set())
    monkeypatch.setattr(os, "rename", refuse)
    checkpoint.remove(checkpoint.step_dir(run_dir, 5))
    assert capsys.readouterr().err.count("warning: ") == 2 and checkpoint.steps(run_dir) == [10, 5]


def test_rewind_drops_what_is_made_again(run_dir):
    """bug guarded: lines that are there twice, or lost, after a resume; a half-written line that breaks
    readers"""
    for step in (1, 2, 3):
        record.append(run_dir, record.SCALARS, step=step, loss=0.5)
        record.append(run_dir, record.BITNET, step=step, total={})
        record.append_text(run_dir, f"step {step}/9 ...")
        if step > 1:
            record.append(run_dir, record.SCALARS, step=step, val_loss=1.0)
            record.append(run_dir, record.SAMPLES, step=step, mode="greedy", prompt="a", generated_text="b")
            record.append_text(run_dir, f"eval {step}/9 ...")
        record.event(run_dir, "save", step=step)
    for name in (record.SCALARS, record.EVENTS):
        with open(os.path.join(run_dir, name), "a", encoding="utf-8") as file:
            file.write('{"step": 4, "lo')
    record.rewind(run_dir, 2)
    assert [(row["step"], "loss" in row) for row in record.read(run_dir, record.SCALARS)] == [
        (1, True),
        (2, True),
    ]
    assert [row["step"] for row in record.read(run_dir, record.BITNET)] == [1, 2]
    assert record.read(run_dir, record.SAMPLES) == [] and len(record.read(run_dir, record.EVENTS)) == 3
    with open(os.path.join(run_dir, "train.log"), encoding="utf-8") as file:
        assert file.read().split("\n") == ["step 1/9 ...", "step 2/9 ...", ""]


AGREE = "n_layer n_head n_kv_head n_embd ffn_dim vocab_size rope_theta norm_eps tie_embeddings".split()


@pytest.mark.parametrize(
    "name", [*AGREE, "ternary", "dataset", "seed", "seq_len", "total_batch_size", "tokenizer", "beta1"]
)
def test_what_must_agree_is_refused_by_name(capsys, name):
    """bug guarded: a resume into another shape, data set or order that goes on without a word"""
    cfg = settings()
    part = {
        "config": vars(cfg) | {name: "else"},
        "tokenizer": {"sha256": "else" if name == "tokenizer" else "0", "eot": 0},
    }
    if name == "beta1":  # may change, and is told
        resume.must_agree(cfg, part, {"sha256": "0", "eot": 0}, resume.RUN, "resume")
        assert "changed: beta1 = 0.9, the checkpoint has 'else'" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        resume.must_agree(cfg, part, {"sha256": "0", "eot": 0}, resume.RUN, "resume")
    assert stop.value.code == 2 and name in capsys.readouterr().err


def test_a_full_disk_costs_a_line_not_the_run(run_dir, monkeypatch, capsys):
    """bug guarded: a log line that cannot be written ends three days of training"""
    record.append(run_dir, record.SCALARS, step=1, loss=0.5)

    def full(path, *args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        record.append(run_dir, record.SCALARS, step=2, loss=0.5)
    record.append(run_dir, record.SCALARS, step=3, loss=0.5)
    assert "No space left" in capsys.readouterr().err
    assert [row["step"] for row in record.read(run_dir, record.SCALARS)] == [1, 3]


def test_a_full_disk_leaves_the_former_best(run_dir, monkeypatch, capsys):
    """bug guarded: best.json that cannot be written ends the run, or is left half written"""
    assert RunDir(run_dir).write_best({"step": 5, "val_loss": 1.0})

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not RunDir(run_dir).write_best({"step": 10, "val_loss": 0.5})
    assert "No space left" in capsys.readouterr().err
    with open(os.path.join(run_dir, "best.json"), encoding="utf-8") as file:
        assert '"step": 5' in file.read()
    assert not any(".tmp-" in name for name in os.listdir(run_dir))


def test_repetition():
    assert generate.repetition([1, 2, 3]) == 0 == generate.repetition([1, 2, 3, 4, 5])
    assert generate.repetition([7] * 13) == 0.9


def test_json_lines_have_no_nan(run_dir):
    """bug guarded: NaN in a JSON line, which other readers refuse"""
    record.append(run_dir, record.BITNET, step=1, total={"act_absmax": float("inf")}, layers=[float("nan")])
    assert record.read(run_dir, record.BITNET) == [
        {"step": 1, "total": {"act_absmax": None}, "layers": [None]}
    ]
    record.append(run_dir, record.SCALARS, step=1, loss=float("nan"), grad_norm=float("inf"))
    assert record.read(run_dir, record.SCALARS) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_second_process_is_refused(run_dir, capsys):
    """bug guarded: the same command twice writes two runs into one folder"""
    run = RunDir(run_dir)
    run.open()
    with pytest.raises(SystemExit):
        RunDir(run_dir).open()
    assert "another process" in capsys.readouterr().err
    run.lock.release()
    again = RunDir(run_dir)
    again.open()
    again.lock.release()


def test_an_older_or_newer_format_is_told(tmp_path, capsys):
    """bugs guarded: a traceback where the state of an older version is resumed; weights that are still good
    refused, or that lack a newer setting"""
    for step, number, readable in ((1, 1, True), (2, checkpoint.FORMAT + 1, False)):
        part = part_of(n_layer=7) | dict(format=number, step=step)
        del part["config"]["n_expert"]
        folder = checkpoint.save(str(tmp_path), step, part, part)
        with pytest.raises(SystemExit):
            checkpoint.load(folder, checkpoint.TRAINER)
        assert f"has checkpoint format {number}, this version reads" in capsys.readouterr().err
        if readable:
            found = checkpoint.load(folder)
            assert found["step"] == step and (found["config"]["n_layer"], found["config"]["n_expert"]) == (
                7,
                0,
            )
        else:
            with pytest.raises(SystemExit):
                checkpoint.load(folder)


DAMAGED = (
    '{"stfp": 3, "loss": 1}',
    '{"step": null, "loss": 1}',
    '{"step": "3", "loss": 1}',
    '{"step": -3, "loss": 1}',
    '{"step": 3, "lpss": 1}',
    '{"step": 3, "loss": 1, "l\ufffd": 0.1}',
    '{"step": 3, "loss": ' + "1" * 5000 + "}",
    '{"step": 3, "loss": ' + "[" * 100000,
    "[3]",
    "\0" * 40,
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_left_out(run_dir, line):
    """bug guarded: a line that ends every reader, and so every resume, with a traceback"""
    record.append(run_dir, record.SCALARS, step=1, loss=0.5)
    record.append_text(run_dir, line, record.SCALARS)
    record.append(run_dir, record.SCALARS, step=4, loss=0.5)
    assert [row["step"] for row in record.read(run_dir, record.SCALARS)] == [1, 4]
    lost = record.rewind(run_dir, 4, {})
    assert lost == [f"{record.SCALARS}: 1 lines before step 4 are missing or damaged"]
    assert record.rewind(run_dir, 4, {}) == [], "a damaged line is dropped, and reported once"


def test_a_value_of_another_type_is_unknown(run_dir):
    """bug guarded: a reader that sorts, adds or hashes what is no number or text"""
    big = "1" + "0" * 400
    record.append_text(
        run_dir, f'{{"step": 1, "loss": {big}, "lr": "x", "time": 1e999, "mfu": NaN}}', record.SCALARS
    )
    assert record.read(run_dir, record.SCALARS) == [dict(step=1, loss=None, lr=None, time=None, mfu=None)]
    record.append(run_dir, record.BITNET, step=1, total={"zero": 0.5, "plus": [1]})
    assert record.read(run_dir, record.BITNET)[0]["total"] == {"zero": 0.5, "plus": None}
    record.event(run_dir, "anomaly", step=1, what=[1])
    assert record.read(run_dir, record.EVENTS)[0]["what"] is None


def test_a_finish_without_its_result_is_none(run_dir):
    """bug guarded: a finished run that cannot print its result again"""
    for fields in (dict(why="max_steps"), dict(result={}), dict(why=3, result={})):
        record.event(run_dir, "finish", step=9, **fields)
        assert RunDir(run_dir).finished(settings(max_steps=9), 9, 0) == ""
    record.event(run_dir, "finish", step=9, why="max_steps", result={})
    assert RunDir(run_dir).finished(settings(max_steps=9), 9, 0) == "max_steps"


def test_lost_lines_are_counted(run_dir):
    """bugs guarded: lines of earlier steps that are gone without a word; those made again counted as lost"""

    def write():
        record.rewind(run_dir, None)
        for step in range(1, 7):
            if step == 4:  # what a checkpoint of step 3 holds
                before.update(record.counts)
            record.append(run_dir, record.SCALARS, step=step, loss=0.5)
            record.append_text(run_dir, f"step {step}/9 ...")
            record.event(run_dir, "save", step=step)

    before = {}
    write()
    assert record.rewind(run_dir, 3, before) == []
    for damage, lost in (
        (lambda lines: lines[1:], 1),
        (lambda lines: [], 3),
        (lambda lines: [lines[0], "\0\0" + lines[1], *lines[2:]], 1),
        (lambda lines: [*lines[:4], "{}"], 0),
    ):
        write()
        path = os.path.join(run_dir, record.SCALARS)
        with open(path, encoding="utf-8") as file:
            lines = damage(file.read().split("\n")[:-1])
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        says = f"{record.SCALARS}: {lost} of 3 lines before step 3 are missing or damaged"
        assert record.rewind(run_dir, 3, before) == ([says] if lost else [])
    write()
    os.remove(os.path.join(run_dir, "train.log"))
    assert record.rewind(run_dir, 3, before) == [
        "train.log: 3 of 3 lines before step 3 are missing or damaged"
    ]


def test_only_the_own_temporaries_of_a_run_are_removed(run_dir):
    """bugs guarded: half-written files of killed processes that stay for ever; a user's file taken for one"""
    own = ["best.json.tmp-12", "config.json.tmp-7", f"{record.SCALARS}.tmp", f"{record.SAMPLES}.tmp-1"]
    foreign = ["notes.tmp", "best.json.tmp-x", "mine.json.tmp-1"]
    for name in own + foreign:
        with open(os.path.join(run_dir, name), "w", encoding="utf-8") as file:
            file.write("{")
    record.rewind(run_dir, 3)
    left = [name for name in own + foreign if os.path.exists(os.path.join(run_dir, name))]
    assert left == foreign


def write(run_dir, step=60, content=None, trainer=None, **changes):
    """a checkpoint whose checkpoint.pt is a random model's with these changes, or these bytes, and whose
    manifest agrees; returns its folder"""
    part = part_of() | dict(format=checkpoint.FORMAT, step=step)
    part["config"]["run_id"] = "r"
    part |= {key: part[key] | value if type(value) is dict else value for key, value in changes.items()}
    state = dict(format=checkpoint.FORMAT, step=step, data={}, optimizer=[], best={}, stale_evals=0)
    folder = checkpoint.save(run_dir, step, part, state | (trainer or {}))
    if content is not None:
        with open(os.path.join(folder, MODEL), "wb") as file:
            file.write(content)
        entry = {MODEL: dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())}
        write_json(os.path.join(folder, "manifest.json"), {"files": entry})
    return folder


def refusal(function, *args):
    """the lines on stderr of what exits with 2"""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    return err.getvalue()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def bomb():
    """a checkpoint.pt of a few kilobytes with 100 MB of zeros in the place of a tensor of 4 kB"""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.ones(1000)))) as small:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name in small.namelist():
                file.writestr(name, bytes(10**8) if name.endswith("data/0") else small.read(name))
    return out.getvalue()


def test_code_in_a_checkpoint_is_not_run(run_dir, tmp_path, monkeypatch):
    """rule: a pickle that would run code, bytes of another kind and a zip bomb cost one line, and nothing
    happens, in checkpoint.pt and in trainer.pt"""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    for content in (
        saved(Evil()),
        pickle.dumps(Evil()),
        b"",
        os.urandom(999),
        saved(torch.ones(9))[:200],
        bomb(),
    ):
        err = refusal(checkpoint.load, write(run_dir, content=content))
        assert err.startswith("error: ") and err.count("\n") == 1 and "none of which was run" in err
    folder = write(run_dir, trainer=dict(best=Evil()))
    assert "none of which was run" in refusal(checkpoint.load, folder, TRAINER)
    assert not os.path.exists(tmp_path / "evil")
    pickle.loads(pickle.dumps(Evil()))
    assert os.path.exists(tmp_path / "evil"), "it would have run"


@pytest.mark.parametrize(
    "error, code, says",
    [
        (MemoryError(), 1, "(MemoryError: ); the memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "you tried); the memory"),
        (RuntimeError("failed finding\ncentral directory"), 2, "(RuntimeError: failed finding central dir"),
        (pickle.UnpicklingError("run it with weights_only=False"), 2, "(UnpicklingError): it is damaged"),
    ],
)
def test_a_lack_of_memory_is_not_damage(run_dir, monkeypatch, capsys, error, code, says):
    """rule: a checkpoint that does not fit in memory exits with 1; what the library reports is printed,
    except its advice to run the code in the file"""

    def failing(*args, **kwargs):
        raise error

    folder = write(run_dir)
    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(SystemExit) as stop:
        checkpoint.load(folder)
    err = capsys.readouterr().err
    assert stop.value.code == code and says in err and err.count("\n") == 1


SIZES = [
    dict(n_layer=10**8),
    dict(n_layer=0),
    dict(n_layer=3),
    dict(n_head=0),
    dict(n_head=-2),
    dict(n_head=64),
    dict(n_kv_head=0),
    dict(n_head=2.5),
    dict(n_embd=2**30),
    dict(ffn_dim=2**40),
    dict(vocab_size=2**31),
    dict(vocab_size=0),
    dict(vocab_multiple=2**40),
    dict(seq_len=2**40),
    dict(seq_len=0),
    dict(n_expert=10**9),
    dict(n_expert=10**9, n_expert_active=2**62),
    dict(dropout=5.0),
    dict(rope_theta=0.0),
    dict(dataset=["x"]),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_are_compared_with_the_tensors(run_dir, sizes):
    """rule: what a checkpoint.pt claims is compared with what it holds, before anything is built"""
    err = refusal(weights.trained, write(run_dir, config=sizes))
    assert err.startswith("error: ") and err.count("\n") == 1
    assert next(iter(sizes)) in err or "shape" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(tokenizer=dict(kind=["\x1b[2J"])), "tokenizer ['\\x1b[2J']"),
        (dict(config=3), "damaged"),
        (dict(model=3), "damaged"),
        (dict(tokenizer=None), "damaged"),
        (dict(tokenizer=dict(eot=10**6)), "eot = 1000000"),
        (dict(model={"norm.weight": torch.ones(3)}), "norm.weight: shape (3,) in the file, (64,) by"),
        (dict(model={"more\x1b": torch.ones(3)}), "more\\x1b: shape (3,) in the file, none by"),
        (dict(model={"norm.weight": torch.ones(1).expand(64)}), "norm.weight is torch.float32"),
        (dict(model={"norm.weight": torch.ones(64, dtype=torch.int8)}), "norm.weight is torch.int8"),
        (dict(model={"norm.weight": torch.full((64,), math.nan)}), "norm.weight holds NaN"),
        (
            dict(model={"blocks.1.attn.q_proj.weight": torch.full((64, 64), math.inf)}),
            "q_proj.weight holds NaN",
        ),
    ],
)
def test_what_a_checkpoint_lacks_is_named(run_dir, changes, says):
    """rule: a part that is missing, of another type or not finite is named in one line, with all text from
    the file escaped"""
    err = refusal(weights.trained, write(run_dir, **changes))
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_a_tensor_that_is_missing_is_named(run_dir):
    tensors = part_of()["model"]
    del tensors["blocks.1.ffn_norm.weight"]
    part = part_of() | dict(format=checkpoint.FORMAT, step=1, model=tensors)
    folder = checkpoint.save(run_dir, 1, part, {})
    assert "blocks.1.ffn_norm.weight: shape none in the file" in refusal(weights.trained, folder)


def test_parts_of_two_steps_are_not_resumed(run_dir):
    """rule: checkpoint.pt and trainer.pt of different steps are refused, though the manifest agrees"""
    folder = write(run_dir, 60, trainer=dict(step=50))
    model = Transformer(settings())
    err = refusal(resume.restore, settings(), resume.Origin(folder), RunDir(run_dir), {}, {}, model, [], None)
    assert "checkpoint.pt is of step 60, trainer.pt of step 50" in err


def test_the_best_is_found_by_its_name(run_dir, capsys):
    """rule: RUN/best is the step of best.json, and whoever uses another step is shown that flag"""
    write(run_dir, 50), write(run_dir, 60)
    assert "has no best.json that names a checkpoint" in refusal(checkpoint.locate, f"{run_dir}/best")
    RunDir(run_dir).write_best({"step": 50, "val_loss": 1.0})
    assert checkpoint.locate(f"{run_dir}/best") == checkpoint.step_dir(run_dir, 50)
    hint = f"; its best evaluation was at step 50: --ckpt={os.path.join(run_dir, 'best')}"
    for path, step, says in (
        (run_dir, 60, hint),
        (checkpoint.step_dir(run_dir, 60), 60, hint),
        (f"{run_dir}/best", 50, ""),
    ):
        assert weights.trained(path)[0]["step"] == step
        assert capsys.readouterr().err == f"using run r, step {step}{says}\n"
    for content in ("null", '{"step": "x"}', '{"step": 70}', "{"):
        with open(os.path.join(run_dir, "best.json"), "w", encoding="utf-8") as file:
            file.write(content)
        assert checkpoint.best_step(run_dir) is None
