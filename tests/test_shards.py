"""shards.py: a changed token is noticed, each byte is read once on a machine, and few files are open."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CHARS, settings, train, write_data

from nanobit import data, shards
from nanobit.data_set import Damaged, read_meta
from nanobit.prepare import token_files

CPU = torch.device("cpu")


def read_by(monkeypatch):
    """Return the list of the names of the shards that are read from now on."""
    read, real = [], shards.check_shard

    def spy(folder, name, *rest):
        read.append(name)
        return real(folder, name, *rest)

    monkeypatch.setattr(shards, "check_shard", spy)
    return read


@pytest.fixture
def place(data_dir):
    """Return the folder of a data set that no process has checked."""
    shards.remembered.clear()
    return os.path.join(data_dir, "tiny")


def check(place, **how):
    shards.check_shards(place, read_meta(place), **how)


def change(place, name="train_00000.bin", keep_time=False, new=None):
    """Give another valid id to a token of a shard."""
    path = os.path.join(place, name)
    stat, ids = os.stat(path), np.fromfile(path, "<u2")
    ids[7] = (ids[7] + 1) % len(CHARS) if new is None else new
    ids.tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 10**9)))


def test_a_changed_token_is_noticed_at_first_use(place):
    """The sha256 in meta.json is compared when a machine first uses a shard."""
    change(place)
    with pytest.raises(Damaged, match="train_00000.bin has changed: its sha256 .* copy it again"):
        check(place)
    assert shards.read_checked(os.path.join(place, ".checked.json")) == {shards.host_of(place): {}}


def test_a_token_changed_later_is_noticed(place, monkeypatch):
    """A shard is read again when its time has changed, and it alone."""
    check(place)
    change(place, "val_00000.bin")
    read = read_by(monkeypatch)
    for _ in range(2):
        with pytest.raises(Damaged, match="val_00000.bin has changed"):
            check(place)
    assert read == ["val_00000.bin"] * 2


def test_a_smaller_vocabulary_is_noticed(place):
    """A shard is read again when meta.json claims another number of ids than when it was checked."""
    check(place)
    meta = read_meta(place)
    with pytest.raises(Damaged, match="holds token id .* vocab_size is 3"):
        shards.check_shards(place, meta | dict(vocab_size=3))


def test_verify_finds_what_kept_size_and_time(place, capsys):
    """--verify_data reads all shards again, and the cache forgets those that are damaged."""
    check(place)
    check(place, verify=True)
    assert "2 shards read again" in capsys.readouterr().err
    change(place, keep_time=True)
    check(place)
    check(place, split="val", verify=True)
    for verify in (True, False):
        with pytest.raises(Damaged, match="train_00000.bin has changed"):
            check(place, verify=verify)


def test_what_is_known_survives_an_interrupted_check(tmp_path, monkeypatch):
    """A check that is interrupted forgets nothing; only a shard whose check fails is read again."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 100)
    place, real, read = os.path.join(write_data(tmp_path), "tiny"), shards.check_shard, []

    def interrupted(folder, name, *rest):
        read.append(name)
        if len(read) == 2:
            raise KeyboardInterrupt
        return real(folder, name, *rest)

    check(place)
    monkeypatch.setattr(shards, "check_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(place, verify=True)
    shards.remembered.clear()
    check(place)
    assert len(read) == 2


def deny(monkeypatch, name):
    """Let the opening of files of this name fail, as on a disk with a fault."""
    real = open

    def denied(path, *how, **more):
        if os.path.basename(path) == name:
            raise OSError(5, "Input/output error", path)
        return real(path, *how, **more)

    monkeypatch.setattr("builtins.open", denied)


@pytest.mark.parametrize("name", ["meta.json", "train_00000.bin"])
def test_nothing_is_deleted_for_what_cannot_be_read_now(place, monkeypatch, name):
    """For a file that exists and cannot be read, the remedy is to repair that, not to delete it."""
    deny(monkeypatch, name)
    with pytest.raises(Damaged, match=f"{name} cannot be read now .* run the same command again$"):
        check(place)


def test_a_run_whose_shard_cannot_be_read_now_saves_and_ends(data_dir, monkeypatch, capsys):
    """The same during a run, which saves before it ends."""
    w, saved = windows(data_dir), []
    w.shards.files.clear()
    w.shards.on_damage = lambda: saved.append(True)
    deny(monkeypatch, "train_00000.bin")
    with pytest.raises(SystemExit) as stop:
        w.batch(0, 31, CPU)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert saved == [True]
    assert "cannot be read now (Input/output error)" in error
    assert "delete" not in error


def test_each_machine_reads_each_byte_once(place, monkeypatch):
    """Each machine reads each shard once, and keeps the entries of other machines in the cache."""
    read = read_by(monkeypatch)
    for host, want in (("one", 2), ("one", 2), ("two", 4), ("two", 4), ("one", 4)):
        monkeypatch.setattr(shards.platform, "node", lambda host=host: host)
        shards.remembered.clear()
        check(place)
        assert len(read) == want
    touched = os.path.join(place, "val_00000.bin")
    os.utime(touched)
    check(place)
    assert len(read) == 5, "its time is another, its bytes are the same"


def test_only_the_split_in_use_is_read(place, monkeypatch):
    """A check of one split reads that split only, and keeps the entries of the others."""
    read = read_by(monkeypatch)
    check(place, split="val")
    assert read == ["val_00000.bin"]
    check(place)
    assert read == ["val_00000.bin", "train_00000.bin"]
    check(place, split="val", verify=True)
    shards.remembered.clear()
    check(place)
    assert len(read) == 3


def test_only_new_shards_of_a_growing_set_are_read(tmp_path, monkeypatch):
    """Of a growing set, only the shards that are new are read."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 100)
    place, read = os.path.join(write_data(tmp_path), "tiny"), read_by(monkeypatch)
    meta = read_meta(place)
    for n in (1, 1, 3):
        part = meta | dict(shards={name: meta["shards"][name] for name in sorted(meta["shards"])[:n]})
        shards.check_shards(place, part)
    assert read == [f"train_{i:05d}.bin" for i in range(3)]


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "3", "x", "[" * 100_000, '{"train_00000.bin": [1000, 1, 28]}', "{HOST: 3}", "{HOST: {}}"]
    + [f'{{HOST: {{"train_00000.bin": {entry}}}}}' for entry in ("5", "null", '["a"]', "{}")],
)
def test_a_damaged_cache_is_none(place, content):
    """A damaged cache, or that of an earlier version, counts as empty."""
    path = os.path.join(place, ".checked.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write(content.replace("HOST", json.dumps(shards.host_of(place))))
    check(place)
    assert len(shards.read_checked(path)[shards.host_of(place)]) == 2


def test_a_cache_that_cannot_be_written_is_no_error(place, monkeypatch, capsys):
    """A cache that cannot be written costs a warning; this process still reads each shard once."""

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_json", full)
    read = read_by(monkeypatch)
    check(place)
    check(place)
    assert len(read) == 2
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_a_long_check_says_what_it_does(place, monkeypatch, capsys):
    """A check of many bytes is announced."""
    monkeypatch.setattr(shards, "LARGE", 1000)
    check(place)
    assert "tiny: checking 2 shards, 0.0 GB, once on each machine" in capsys.readouterr().err


def windows(data_dir, split="train", **changes):
    cfg = settings(data_dir=data_dir, **changes)
    return data.Windows(cfg, data.meta(cfg), split)


def test_few_files_are_open(tmp_path, monkeypatch):
    """However many shards are read in turn, few files are open, and the tokens are those of the right
    shard."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 20)
    w = windows(write_data(tmp_path, n_train=1000))
    files, real = [], w.shards.open
    monkeypatch.setattr(w.shards, "open", lambda shard: files.append(real(shard)) or files[-1])
    for shard in [*range(50), *np.random.default_rng(0).integers(0, 50, 100).tolist()]:
        ids = np.fromfile(tmp_path / "tiny" / f"train_{shard:05d}.bin", "<u2")
        assert w.read(shard, 0).tolist() == ids[:17].tolist()
        assert sum(not file.closed for file in files) <= shards.MAX_OPEN == len(w.shards.files)
    n = len(files)
    for shard in [*w.shards.files] * 3:
        w.read(shard, 0)
    assert len(files) == n, "those in use stay open"


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete an open file")
def test_shards_in_use_outlive_their_names(data_dir):
    """A run does not end because its data set is deleted."""
    w = windows(data_dir)
    for name in os.listdir(os.path.join(data_dir, "tiny")):
        os.remove(os.path.join(data_dir, "tiny", name))
    assert w.batch(0, 8, CPU)[0].shape == (8, 16)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda path: os.truncate(path, 40), "has become shorter"),
        (
            lambda path: change(os.path.dirname(path), keep_time=True, new=len(CHARS)),
            f"holds token id {len(CHARS)} since",
        ),
    ],
)
def test_damage_behind_the_check_is_one_line(data_dir, capsys, damage, says):
    """Damage after the check ends the run with one line, after it has saved."""
    w, saved = windows(data_dir), []
    w.shards.on_damage = lambda: saved.append(True)
    damage(os.path.join(data_dir, "tiny", "train_00000.bin"))
    with pytest.raises(SystemExit) as stop:
        w.batch(0, 31, CPU)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert saved == [True]
    assert "train_00000.bin " + says in error, error
    assert error.count("\n") == 1, error


def test_train_verifies_its_data_if_asked(data_dir, out_dir):
    """train.py passes --verify_data on."""
    place = os.path.join(data_dir, "tiny")
    check(place)
    change(place, keep_time=True)
    _, err = train(data_dir, out_dir, "r", code=2, verify_data=True)
    assert err.startswith("error: shard "), err
    assert err.count("\n") == 1, err


def test_a_copy_of_a_data_set_is_read_again(data_dir, tmp_path):
    """A copied cache does not vouch for copied shards, although their sizes and times are the same."""
    data.meta(settings(data_dir=data_dir))
    shutil.copytree(data_dir, tmp_path / "copy")
    path = tmp_path / "copy" / "tiny" / "train_00000.bin"
    time = os.stat(path).st_mtime_ns
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    with pytest.raises(SystemExit):
        data.meta(settings(data_dir=str(tmp_path / "copy")))
