"""nanobit/data.py: a data set that grows while it is read (tokenize_on_fly), in states that tests write."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import settings, write_data
from data_sets import CPU, damage, meta_with, windows

from nanobit import data, files


def growing(folder, monkeypatch):
    """Write a data set that was stopped in its third shard of 200 tokens; return it, and the meta.json of the
    complete one."""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200)
    data_dir = write_data(folder)
    with open(os.path.join(data_dir, "tiny", "meta.json"), encoding="utf-8") as file:
        whole = json.load(file)
    os.rename(folder / "tiny" / "val_00000.bin", folder / "tiny" / "val_00000.bin.partial")
    shards = {name: whole["shards"][name] for name in ("train_00000.bin", "train_00001.bin")}
    part = dict(complete=False, command="python continue", shards=shards, tokens=dict(train=450, val=150))
    damage(data_dir, "meta.json", meta_with(**part))
    return data_dir, whole


def test_a_data_set_that_nothing_writes_is_used_up_and_then_reported(tmp_path, monkeypatch):
    """Of a data set whose preparation has died, all tokens are used; then one line names the command that
    continues it. A preparation that ends between two looks is not taken for dead."""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    cfg = settings(data_dir=data_dir, tokenize_on_fly=True)
    meta, messages = data.meta(cfg), []
    w = data.Windows(cfg, meta, "train")
    assert (w.total, w.ready) == (None, 24)
    assert w.has(23)
    assert not w.has(24)
    assert w.wait_for(23, say=messages.append) == ""
    assert "python continue" in w.wait_for(24, say=messages.append)
    with pytest.raises(AssertionError):
        w.batch(20, 5, CPU)
    batches = [w.batch(8 * i, 8, CPU) for i in range(3)]

    def ends_now(folder):
        os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
        damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
        return False

    monkeypatch.setattr(data, "is_being_written", ends_now)
    assert w.wait_for(24, say=messages.append) == ""
    assert w.total == 30
    assert not messages
    assert meta["complete"], "train.py saves its digest"
    for i, batch in enumerate(batches):
        assert torch.equal(batch[0], windows(data_dir).batch(8 * i, 8, CPU)[0])
    assert torch.equal(w.batch(24, 40, CPU)[1], windows(data_dir).batch(24, 40, CPU)[1])


def test_a_wait_ends_with_a_signal_or_with_the_data(tmp_path, monkeypatch):
    """A wait for tokens ends with stop() or with the tokens, and is reported once."""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    w, messages, slept = windows(data_dir, tokenize_on_fly=True), [], []
    lock = files.lock(str(tmp_path / "d" / "tiny" / ".lock"))

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 5:  # as a preparation ends: meta.json, then the lock
            os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
            damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
            lock.release()

    monkeypatch.setattr(data.time, "sleep", sleep)
    assert w.wait_for(24, stop=lambda: len(slept) == 2, say=messages.append) == ""
    assert not w.has(24)
    assert len(messages) == 1
    assert "waiting" in messages[0]
    assert w.wait_for(24, say=messages.append) == ""
    assert w.has(24)
    assert len(slept) == 5
    assert len(messages) == 3
    assert "continuing" in messages[2]
    assert max(slept) <= 1


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("train_00002.bin", lambda b: b[:-2] + bytes([b[-2] ^ 1, 0]), "train_00002.bin has changed"),
        ("meta.json", lambda b: b[:50], "meta.json is damaged"),
    ],
)
def test_a_shard_that_comes_damaged_ends_the_wait(tmp_path, monkeypatch, name, change, says):
    """A shard that is damaged when it arrives ends the wait with a line, on all ranks: the caller saves
    first."""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    w = windows(data_dir, tokenize_on_fly=True)
    damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
    os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
    damage(data_dir, name, change)
    assert says in w.wait_for(24), "train.py saves its state, then ends with this line"


def test_validation_on_the_fly_is_the_same_before_and_after(tmp_path, monkeypatch, capsys):
    """The validation set is the same while the split grows and afterwards; all of it cannot be asked of a set
    that grows."""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)

    def found():
        w = windows(data_dir, "val", tokenize_on_fly=True)
        return [x.tolist() for x, _ in w.fixed(64, 3, CPU)]

    before = found()
    with pytest.raises(SystemExit) as stop:  # 10 windows, of which 9 are there
        windows(data_dir, "val", tokenize_on_fly=True, eval_tokens=160)
    assert stop.value.code == 1
    assert "nothing writes it" in capsys.readouterr().err
    os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
    assert found() == before, "renamed after meta.json was read"
    damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
    assert found() == before
    assert sum(map(len, before)) == 4
    ids = np.fromfile(tmp_path / "d/tiny/val_00000.bin", "<u2")
    assert sum(before, []) == ids[:64].reshape(4, 16).tolist()
    with pytest.raises(SystemExit):
        windows(data_dir, tokenize_on_fly=True, eval_tokens=0)
    assert "eval_tokens = 0" in capsys.readouterr().err
    windows(data_dir, tokenize_on_fly=True, eval_tokens=0, eval_every=0)


def test_a_micro_step_whose_tokens_are_not_written_is_none(tmp_path, monkeypatch):
    data_dir, _ = growing(tmp_path / "d", monkeypatch)
    w = windows(data_dir, tokenize_on_fly=True, batch_size=8)
    assert w.micro_batch(2, 0, CPU) is not None
    assert w.micro_batch(3, 0, CPU) is None


def test_the_same_tokens_are_known_while_shards_are_added():
    """Digests agree if the one data set can be an earlier state of the other."""

    def digest(hashes, complete):
        shards = {f"train_{i:05d}.bin": dict(tokens=9, sha256=each) for i, each in enumerate(hashes)}
        return data.digest(dict(complete=complete, shards=shards, dtype="uint16"))

    for saved, now, want in (
        (("ab", False), ("abc", False), True),
        (("ab", False), ("abc", True), True),
        (("abc", False), ("ab", False), True),  # prepared again
        (("abc", True), ("abc", True), True),
        (("ab", False), ("xbc", True), False),
        (("ab", True), ("abc", True), False),
        (("ab", True), ("abc", False), False),
        (("abc", False), ("ab", True), False),
    ):
        assert data.same_tokens(digest(*saved), digest(*now)) is want, (saved, now)
        assert data.same_tokens(digest(*now), digest(*saved)) is want, (saved, now)
