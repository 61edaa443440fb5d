"""nanobit/data.py: the order of batches, and data sets that are damaged, missing or short."""

import hashlib
import os

import numpy as np
import pytest
import torch
from conftest import settings, write_data
from data_sets import CPU, damage, meta_with, windows

from nanobit import data


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    """permute maps range(n) onto itself, in another order for each key, and leaves few neighbours
    together."""
    a, b = (data.permute(np.arange(n), n, np.arange(start, start + 8, dtype=np.uint64)) for start in (1, 2))
    assert sorted(a.tolist()) == sorted(b.tolist()) == list(range(n))
    if n >= 31:
        assert a.tolist() != b.tolist()
        assert a.tolist() != list(range(n))
    if n >= 1000:  # neighbours that stay neighbours: 2 / n by chance
        assert (np.abs(np.diff(a.astype(np.int64))) == 1).mean() < 6 / n


def test_every_window_comes_once_an_epoch_and_in_another_order_the_next(data_dir):
    """An epoch reads each window once; the next epoch, and another seed, read them in another order."""
    w = windows(data_dir)
    assert w.total == (500 - 1) // 16 == 31
    first, second = ([place for place in w.places(range(e * 31, e * 31 + 31))] for e in (0, 1))
    assert sorted(first) == sorted(second) == [(0, i) for i in range(31)]
    assert first != second
    assert windows(data_dir, seed=2).places(range(31)) != first


def test_a_shard_gives_all_the_windows_it_holds(tmp_path):
    """The last target of the last window may be the last token of a shard."""
    for n, want in ((512, 31), (513, 32), (514, 32)):
        w = windows(write_data(tmp_path / str(n), n_train=n))
        assert w.total == want
        assert w.batch(0, want, CPU)[1].shape == (want, 16)


def test_shards_are_permuted_apart_and_well(tmp_path, monkeypatch):
    """Each shard has its own order, and neighbours stay together no more often than at random."""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 257)
    w = windows(write_data(tmp_path / "d", n_train=514))
    order = [i for _, i in w.places(range(32))]
    assert w.counts == [16, 16]
    assert order[:16] != order[16:]
    rng, near = np.random.default_rng(0), []
    for _ in range(300):
        key = rng.integers(0, 2**63, 8).astype(np.uint64)
        near.append((np.abs(np.diff(data.permute(np.arange(1000), 1000, key).astype(np.int64))) == 1).mean())
    assert np.mean(near) * 1000 / 2 == pytest.approx(1, abs=0.15), "four rounds: 1.36"


def test_large_ids_are_read_as_they_were_written(tmp_path):
    """Ids above 65,535 are not cut to 16 bits."""
    data_dir = write_data(tmp_path / "d", vocab_size=100_000)
    w = windows(data_dir, vocab_size=100_000)
    want = np.random.default_rng(0).integers(0, 100_000, 500)
    assert w.read(0, 3).tolist() == want[48:65].tolist()
    assert want.max() > 65_535


def test_a_batch_depends_on_its_numbers_alone(data_dir):
    """A batch has no hidden state: any split into smaller batches reads the same tokens."""
    w = windows(data_dir)
    x, y = w.batch(28, 8, CPU)  # across the end of the epoch
    parts = [windows(data_dir).batch(28 + i, 2, CPU) for i in (0, 2, 4, 6)]
    assert torch.equal(x, torch.cat([p[0] for p in parts]))
    assert torch.equal(y, torch.cat([p[1] for p in parts]))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.shape == (8, 16)


def test_a_batch_of_many_windows_takes_little_time(data_dir, monkeypatch):
    """The last sample of a batch is known without a walk through all of them, which no signal can end."""
    w = windows(data_dir)
    asked = []
    monkeypatch.setattr(w, "has", asked.append)
    with pytest.raises(AssertionError):
        w.places(range(10**15, 10**18))
    assert asked == [10**18 - 1]


def test_shards_come_in_order_and_hold_their_windows(tmp_path, monkeypatch):
    """No window lies across two shards, and shards come one after the other."""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200)
    data_dir = write_data(tmp_path / "d")  # shards of 200, 200, 100 tokens: 12, 12, 6 windows
    w = windows(data_dir)
    assert w.counts == [12, 12, 6]
    assert w.total == 30
    places = w.places(range(30))
    assert [shard for shard, _ in places] == [0] * 12 + [1] * 12 + [2] * 6
    ids = np.fromfile(os.path.join(data_dir, "tiny", "train_00001.bin"), "<u2")
    x, y = w.batch(12, 12, CPU)
    for (_, i), row, target in zip(places[12:24], x, y):
        assert row.tolist() == ids[i * 16 : i * 16 + 16].tolist()
        assert target.tolist() == ids[i * 16 + 1 : i * 16 + 17].tolist()


def test_validation_is_fixed_and_spread(data_dir):
    """Validation reads the same windows each time, spread over the split."""
    w = windows(data_dir, "val")
    a, b = ([x.tolist() for x, _ in w.fixed(64, 3, CPU)] for _ in range(2))
    assert a == b
    assert [len(batch) for batch in a] == [3, 1]
    assert sum(len(x) for x, _ in w.fixed(0, 5, CPU)) == w.total == 12
    assert w.read(0, 9).tolist()[:16] == a[1][0], "4 of 12 windows: 0, 3, 6, 9"
    (five,) = (x.tolist() for x, _ in w.fixed(80, 5, CPU))
    assert five == [w.read(0, i).tolist()[:16] for i in (0, 2, 4, 7, 9)], "5 of 12 windows"


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("train_00000.bin", lambda b: b[:-2], ["train_00000.bin has 998 bytes", "1,000"]),
        ("train_00000.bin", lambda b: b"", ["train_00000.bin has 0 bytes"]),
        ("train_00000.bin", lambda b: b"\xff\xff" + b[2:], ["token id 65535", "vocab_size is 28"]),
        ("train_00000.bin", lambda b: b"\x1c\x00" + b[2:], ["token id 28", "vocab_size is 28"]),
        ("meta.json", lambda b: b[:50], ["meta.json is damaged"]),
        ("meta.json", lambda b: b"\xff" + b, ["meta.json is damaged"]),
        ("meta.json", meta_with(complete=False), ["is not complete", "--tokenize_on_fly"]),
        ("meta.json", meta_with(complete=False, command="python x.py"), ["continue it: python x.py"]),
        ("meta.json", meta_with(shards={}), ["no split 'train'"]),
    ],
)
def test_damaged_data_is_refused(data_dir, capsys, name, change, says):
    """A damaged data set is one error line with the file and the fault, not a failed assertion of a GPU."""
    windows(data_dir)  # scans and caches what is right
    damage(data_dir, name, change)
    with pytest.raises(SystemExit) as stop:
        windows(data_dir)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert all(text in error for text in says), error


def test_missing_and_short_data_say_what_to_do(data_dir, capsys, tmp_path):
    """Missing or too short data are one line with the remedy."""
    for changes, says in (
        (dict(dataset="arithmetic", data_dir=str(tmp_path)), "python prepare/arithmetic.py"),
        (dict(prepare="python prepare/x.py --y", dataset="x"), "make it: python prepare/x.py --y"),
        (dict(dataset="x", data_dir=str(tmp_path)), "holds no data set; --data_dir names another"),
        (dict(dataset="mine"), "--name=mine --data_dir="),
        (dict(seq_len=600), "seq_len can be at most 499; or prepare more text"),
        (
            dict(seq_len=300, split="val"),
            "at most 199; or prepare more text, or hold out more (--val_fraction=)",
        ),
        (dict(seq_len=300, split="val"), "(--val_fraction=), or train.py --eval_every=0 --patience=0"),
        (dict(vocab_size=20), "vocab_size = 20 is less than the 28"),
    ):
        with pytest.raises(SystemExit):
            windows(**dict(data_dir=data_dir) | changes)
        assert says in capsys.readouterr().err


def test_a_text_that_is_read_many_times_is_worth_a_line(data_dir):
    """A warning for more than ten epochs of a text, but not of problems and games."""
    rows = windows(data_dir)
    epoch = rows.total * rows.seq_len
    assert not rows.repetition(12 * epoch)
    rows.meta["documents"] = {"train": 1, "val": 1}
    assert not rows.repetition(10 * epoch)
    assert "reads its text 12 times" in rows.repetition(12 * epoch)
    rows.cfg.max_minutes = 5.0
    assert not rows.repetition(12 * epoch), "max_minutes may end the run long before"


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
def test_a_micro_step_has_its_share_of_the_batch(data_dir, monkeypatch, world, rank):
    """Micro-step m of rank r reads the samples, and has the seed, of micro-step m * world + r of one rank."""
    alone, cfg = windows(data_dir, batch_size=2, total_batch_size=4 * 2 * 16), settings(seed=0)
    assert alone.cfg.accumulation == 4
    monkeypatch.setattr(data.distributed, "WORLD", world)
    monkeypatch.setattr(data.distributed, "RANK", rank)
    w = windows(data_dir, batch_size=2)
    w.cfg.accumulation = 4 // world
    for step in (0, 3):
        for micro in range(4 // world):
            number = micro * world + rank
            assert torch.equal(
                w.micro_batch(step, micro, CPU)[0], alone.batch(step * 8 + number * 2, 2, CPU)[0]
            )
            text = f"{cfg.seed}/{step}/{number}".encode()
            want = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
            assert data.seed(cfg, step, micro) == want
    beyond = w.micro_batch(0, 4 // world, CPU)[0]
    assert torch.equal(beyond, w.micro_batch(1, 0, CPU)[0]), "the next step's first"
