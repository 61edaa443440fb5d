"""data.py and prepare/: the order of batches, and files that are not what they should be."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import CHARS, run, settings, write_data

from nanobit import data, files
from nanobit.tokenizer import make_tokenizer
from prepare import arithmetic

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 64, 1000, 4097])
def test_permute_is_a_permutation(n):
    """bug guarded: windows drawn with replacement, or a walk that leaves the range"""
    a, b = (data.permute(np.arange(n), n, np.arange(start, start + 8, dtype=np.uint64)) for start in (1, 2))
    assert sorted(a.tolist()) == sorted(b.tolist()) == list(range(n))
    if n >= 31:
        assert a.tolist() != b.tolist() and a.tolist() != list(range(n))
    if n >= 1000:  # neighbours that stay neighbours: 2 / n by chance
        assert (np.abs(np.diff(a.astype(np.int64))) == 1).mean() < 6 / n


def windows(data_dir, split="train", **changes):
    cfg = settings(data_dir=data_dir, **changes)
    return data.Windows(cfg, data.meta(cfg), split)


def test_every_window_comes_once_an_epoch_and_in_another_order_the_next(data_dir):
    """bugs guarded: replacement, a lost last window, the same order each epoch, epochs that begin at a
    batch"""
    w = windows(data_dir)
    assert w.total == (500 - 1) // 16 == 31
    first, second = ([place for place in w.places(range(e * 31, e * 31 + 31))] for e in (0, 1))
    assert sorted(first) == sorted(second) == [(0, i) for i in range(31)] and first != second
    assert windows(data_dir, seed=2).places(range(31)) != first


def test_a_shard_gives_all_the_windows_it_holds(tmp_path):
    """bug guarded: the last window, whose last target is the last token, lost or read past the end"""
    for n, want in ((512, 31), (513, 32), (514, 32)):
        w = windows(write_data(tmp_path / str(n), n_train=n))
        assert w.total == want and w.batch(0, want, CPU)[1].shape == (want, 16)


def test_shards_are_permuted_apart_and_well(tmp_path, monkeypatch):
    """bugs guarded: the same order in every shard; too few rounds, which leave neighbours together"""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 257)
    w = windows(write_data(tmp_path / "d", n_train=514))
    order = [i for _, i in w.places(range(32))]
    assert w.counts == [16, 16] and order[:16] != order[16:]
    rng, near = np.random.default_rng(0), []
    for _ in range(300):
        key = rng.integers(0, 2**63, 8).astype(np.uint64)
        near.append((np.abs(np.diff(data.permute(np.arange(1000), 1000, key).astype(np.int64))) == 1).mean())
    assert np.mean(near) * 1000 / 2 == pytest.approx(1, abs=0.15), "four rounds: 1.36"


def test_large_ids_are_read_as_they_were_written(tmp_path):
    """bug guarded: ids above 65,535 cut to 16 bits"""
    data_dir = write_data(tmp_path / "d", vocab_size=100_000)
    w = windows(data_dir, vocab_size=100_000)
    want = np.random.default_rng(0).integers(0, 100_000, 500)
    assert w.read(0, 3).tolist() == want[48:65].tolist() and want.max() > 65_535


def test_a_batch_depends_on_its_numbers_alone(data_dir):
    """bugs guarded: hidden state in the loader; other tokens with another batch_size or number of devices"""
    w = windows(data_dir)
    x, y = w.batch(28, 8, CPU)  # across the end of the epoch
    parts = [windows(data_dir).batch(28 + i, 2, CPU) for i in (0, 2, 4, 6)]
    assert torch.equal(x, torch.cat([p[0] for p in parts])) and torch.equal(
        y, torch.cat([p[1] for p in parts])
    )
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (8, 16)


def test_shards_come_in_order_and_hold_their_windows(tmp_path, monkeypatch):
    """bugs guarded: a window across two shards, shards that are skipped, a permutation over all shards"""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200)
    data_dir = write_data(tmp_path / "d")  # shards of 200, 200, 100 tokens: 12, 12, 6 windows
    w = windows(data_dir)
    assert w.counts == [12, 12, 6] and w.total == 30
    places = w.places(range(30))
    assert [shard for shard, _ in places] == [0] * 12 + [1] * 12 + [2] * 6
    ids = np.fromfile(os.path.join(data_dir, "tiny", "train_00001.bin"), "<u2")
    x, y = w.batch(12, 12, CPU)
    for (_, i), row, target in zip(places[12:24], x, y):
        assert row.tolist() == ids[i * 16 : i * 16 + 16].tolist()
        assert target.tolist() == ids[i * 16 + 1 : i * 16 + 17].tolist()


def test_validation_is_fixed_and_spread(data_dir):
    """bug guarded: fresh random validation batches, or only the beginning of the split"""
    w = windows(data_dir, "val")
    a, b = ([x.tolist() for x, _ in w.fixed(64, 3, CPU)] for _ in range(2))
    assert a == b and [len(batch) for batch in a] == [3, 1]
    assert sum(len(x) for x, _ in w.fixed(0, 5, CPU)) == w.total == 12
    assert w.read(0, 9).tolist()[:16] == a[1][0], "4 of 12 windows: 0, 3, 6, 9"


def damage(data_dir, name, change):
    path = os.path.join(data_dir, "tiny", name)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(change(content))


def meta_with(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


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
    """bug guarded: an id over the vocabulary ends in a CUDA assert, a short file in garbage"""
    windows(data_dir)  # scans and caches what is right
    damage(data_dir, name, change)
    with pytest.raises(SystemExit) as stop:
        windows(data_dir)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(text in error for text in says), error


def growing(folder, monkeypatch):
    """a data set that was stopped in its third shard of 200 tokens, and the meta.json of the complete one"""
    from nanobit.prepare import token_files

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200)
    data_dir = write_data(folder)
    with open(os.path.join(data_dir, "tiny", "meta.json"), encoding="utf-8") as file:
        whole = json.load(file)
    os.rename(folder / "tiny" / "val_00000.bin", folder / "tiny" / "val_00000.bin.partial")
    shards = {name: whole["shards"][name] for name in ("train_00000.bin", "train_00001.bin")}
    part = dict(complete=False, command="python go on", shards=shards, tokens=dict(train=450, val=150))
    damage(data_dir, "meta.json", meta_with(**part))
    return data_dir, whole


def test_a_data_set_that_nothing_writes_is_used_up_and_then_told(tmp_path, monkeypatch):
    """bugs guarded: training that waits for ever for a dead preparation, or ends before it has used what is
    there; a preparation taken for dead that ends between two looks; a position taken modulo the shards of the
    moment"""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    cfg = settings(data_dir=data_dir, tokenize_on_fly=True)
    meta, told = data.meta(cfg), []
    w = data.Windows(cfg, meta, "train")
    assert (w.total, w.ready) == (None, 24) and w.has(23) and not w.has(24)
    assert w.wait_for(23, say=told.append) == "" and "python go on" in w.wait_for(24, say=told.append)
    with pytest.raises(AssertionError):
        w.batch(20, 5, CPU)
    batches = [w.batch(8 * i, 8, CPU) for i in range(3)]

    def ends_now(folder):
        os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
        damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
        return False

    monkeypatch.setattr(data, "is_being_written", ends_now)
    assert w.wait_for(24, say=told.append) == "" and w.total == 30 and not told
    assert meta["complete"], "train.py saves its digest"
    for i, batch in enumerate(batches):
        assert torch.equal(batch[0], windows(data_dir).batch(8 * i, 8, CPU)[0])
    assert torch.equal(w.batch(24, 40, CPU)[1], windows(data_dir).batch(24, 40, CPU)[1])


def test_a_wait_ends_with_a_signal_or_with_the_data(tmp_path, monkeypatch):
    """bug guarded: a wait that cannot be interrupted, that takes the tokens for lost while they come, or
    that says so every second"""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    w, told, slept = windows(data_dir, tokenize_on_fly=True), [], []
    lock = files.lock(str(tmp_path / "d" / "tiny" / ".lock"))

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 5:  # as a preparation ends: meta.json, then the lock
            os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
            damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
            lock.release()

    monkeypatch.setattr(data.time, "sleep", sleep)
    assert w.wait_for(24, stop=lambda: len(slept) == 2, say=told.append) == "" and not w.has(24)
    assert len(told) == 1 and "waiting" in told[0]
    assert w.wait_for(24, say=told.append) == "" and w.has(24) and len(slept) == 5
    assert len(told) == 3 and "going on" in told[2] and max(slept) <= 1


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("train_00002.bin", lambda b: b[:-2] + bytes([b[-2] ^ 1, 0]), "train_00002.bin has changed"),
        ("meta.json", lambda b: b[:50], "meta.json is damaged"),
    ],
)
def test_a_shard_that_comes_damaged_ends_the_wait(tmp_path, monkeypatch, name, change, says):
    """bug guarded: a run that trains on it, or that is lost, on some ranks, because it exits in the wait"""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)
    w = windows(data_dir, tokenize_on_fly=True)
    damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
    os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
    damage(data_dir, name, change)
    assert says in w.wait_for(24), "train.py saves its state, then ends with this line"


def test_validation_on_the_fly_is_the_same_before_and_after(tmp_path, monkeypatch, capsys):
    """bug guarded: another validation set once the split has grown; all of it asked of a set that grows"""
    data_dir, whole = growing(tmp_path / "d", monkeypatch)

    def found():
        w = windows(data_dir, "val", tokenize_on_fly=True)
        return [x.tolist() for x, _ in w.fixed(64, 3, CPU)]

    before = found()
    with pytest.raises(SystemExit) as stop:  # 10 windows, of which 9 are there
        windows(data_dir, "val", tokenize_on_fly=True, eval_tokens=160)
    assert stop.value.code == 1 and "nothing writes it" in capsys.readouterr().err
    os.rename(tmp_path / "d/tiny/val_00000.bin.partial", tmp_path / "d/tiny/val_00000.bin")
    assert found() == before, "renamed after meta.json was read"
    damage(data_dir, "meta.json", lambda _: json.dumps(whole).encode())
    assert found() == before and sum(map(len, before)) == 4
    ids = np.fromfile(tmp_path / "d/tiny/val_00000.bin", "<u2")
    assert sum(before, []) == ids[:64].reshape(4, 16).tolist()
    with pytest.raises(SystemExit):
        windows(data_dir, tokenize_on_fly=True, eval_tokens=0)
    assert "eval_tokens = 0" in capsys.readouterr().err
    windows(data_dir, tokenize_on_fly=True, eval_tokens=0, eval_every=0)


def test_the_same_tokens_are_known_while_shards_are_added():
    """bug guarded: a run that cannot be resumed once its data set has grown, or that goes on with others"""

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


def test_missing_and_short_data_say_what_to_do(data_dir, capsys, tmp_path):
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
        (dict(seq_len=300, split="val"), "or none (train.py --eval_every=0 --patience=0)"),
        (dict(vocab_size=20), "vocab_size = 20 is less than the 28"),
    ):
        with pytest.raises(SystemExit):
            windows(**dict(data_dir=data_dir) | changes)
        assert says in capsys.readouterr().err


def test_a_text_that_is_read_many_times_is_worth_a_line(data_dir):
    """rule: a warning for more than ten epochs of a text, but not of problems and games"""
    rows = windows(data_dir)
    epoch = rows.total * rows.seq_len
    assert not rows.repetition(12 * epoch)
    rows.meta["documents"] = {"train": 1, "val": 1}
    assert not rows.repetition(10 * epoch)
    assert "reads its text 12 times" in rows.repetition(12 * epoch)
    rows.cfg.max_minutes = 5.0
    assert not rows.repetition(12 * epoch), "max_minutes may end the run long before"


def test_tokenizer_names_the_character_it_does_not_have():
    """bug guarded: a KeyError for a prompt with another character"""
    t = make_tokenizer({"kind": "char", "chars": CHARS})
    assert t.decode(t.encode("to be\n")) == "to be\n"
    with pytest.raises(ValueError, match="'É'"):
        t.encode("É")


def read_lines(folder, split):
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    ids = np.concatenate(
        [np.fromfile(os.path.join(folder, n), "<u2") for n in meta["shards"] if n.startswith(split)]
    )
    assert meta["tokens"][split] == ids.size
    return make_tokenizer(meta["tokenizer"]).decode(ids.tolist()).split("\n")


@pytest.mark.parametrize("flags", [[], ["--ops=+-x", "--digits=3", "--train_problems=30000"]])
def test_held_out_problems_never_appear_in_training(tmp_path, flags):
    """bug guarded: a score on problems that were trained on, in this order or with the operands exchanged"""
    run("prepare/arithmetic.py", f"--data_dir={tmp_path}", "--name=sums", *flags)
    folder = str(tmp_path / "sums")
    trained, held = (set(read_lines(folder, split)) - {""} for split in ("train", "val"))
    for text in trained | held:
        question, _, answer = text.partition("=")
        assert str(eval(question.replace("x", "*"))) == answer
    questions = {text.partition("=")[0] for text in trained}
    for text in held:
        question = text.partition("=")[0]
        op = next(char for char in question if not char.isdigit())
        a, _, b = question.partition(op)
        assert not {question, f"{b}{op}{a}"} & questions
    assert held == set(open(tmp_path / "sums" / "problems.txt", encoding="utf-8").read().split("\n")) - {""}
    two_digits = [text for text in held if len(text.split("=")[0]) == 5]
    assert flags or len(two_digits) >= 1000 and len(held) < 0.15 * 10_000
    assert all(
        arithmetic.is_held_out(b, "+", a) == arithmetic.is_held_out(a, "+", b) for a, b in ((3, 14), (27, 8))
    )


def test_preparation_is_repeatable_and_refuses_nonsense(tmp_path):
    """bug guarded: another data set at every call, half a data set that looks whole"""
    for name in ("a", "b"):
        run(
            "prepare/arithmetic.py",
            f"--data_dir={tmp_path}",
            f"--name={name}",
            "--train_problems=100",
            "--val_problems=9",
        )
    shards = [
        json.load(open(tmp_path / name / "meta.json", encoding="utf-8"))["shards"] for name in ("a", "b")
    ]
    assert shards[0] == shards[1]
    for flag in ("--ops=/", "--digits=0", "--train_problems=0", "--op=+"):
        _, err = run("prepare/arithmetic.py", f"--data_dir={tmp_path}", flag, code=2)
        assert err.startswith("error: ")
    # a refusal, or another data set under this name, leaves what is there
    _, err = run("prepare/arithmetic.py", f"--data_dir={tmp_path}", "--name=a", "--digits=1", code=2)
    assert "too few problems" in err
    _, err = run("prepare/arithmetic.py", f"--data_dir={tmp_path}", "--name=a", "--train_problems=99", code=2)
    assert "holds another data set" in err and (tmp_path / "a" / "meta.json").exists()
    (tmp_path / "file").write_text("")
    _, err = run("prepare/arithmetic.py", f"--data_dir={tmp_path}/file", code=2)
    assert "cannot write" in err
