"""nanobit/prepare/conversations.py: windows with masks, held-out conversations, killed and continued."""

import gzip
import os

import numpy as np
import prepare_faults
import pytest
from documents import Preparation, prepare
from talks import (
    CHAR,
    KINDS,
    MANY,
    WINDOW,
    chat_flags,
    conversations_in,
    cut,
    prepare_chat,
    talk,
    talks,
    windows_of,
    write_rows,
)

from nanobit import chat
from nanobit.files import read_json
from nanobit.prepare import conversations, token_files
from nanobit.tokenizer import make_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_come_back(kind, chat_models, talk_rows, tmp_path):
    """Each conversation is in one window, whole or up to its last answer that fits, with its mask."""
    out, _ = prepare_chat(
        talk_rows, chat_models[kind], tmp_path, val_fraction=0.2, patch=prepare_faults.small()
    )
    windows, meta = windows_of(tmp_path / "chat")
    spec = KINDS[kind]()
    tokenizer = make_tokenizer(spec)
    encoded = [chat.encode(tokenizer, spec, messages) for messages in talks()]
    fitting = [cut(ids, mask, spec["eot"]) for ids, mask in encoded]
    expected = [part for part in fitting if part]
    found = {split: conversations_in(arrays, expected) for split, arrays in windows.items()}
    assert sorted(found["train"] + found["val"]) == list(range(len(expected)))
    assert {split: len(numbers) for split, numbers in found.items()} == meta["documents"]
    assert 0.1 < len(found["val"]) / len(expected) < 0.3
    assert meta.get("skipped", {}).get("too long", 0) == fitting.count(None)
    shortened = sum(part is not None and part[0] != ids for part, (ids, _) in zip(fitting, encoded))
    assert meta["cut"] == shortened > 0
    assert f"{shortened} conversations end after the last whole answer" in out
    assert meta["window"] == WINDOW
    assert meta["tokenizer"]["chat"] == chat.FORMAT
    assert len(meta["shards"]) > 3


def test_the_bytes_are_those_of_answers(chat_models, tmp_path):
    """meta.json counts the bytes of answers, for bits per byte, without their first space."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=talk("a", "bc", "d", "efg", system="h"))])
    prepare_chat(path, chat_models["char"], tmp_path, val_fraction=0)
    _, meta = windows_of(tmp_path / "chat")
    assert meta["bytes"] == {"train": 5}
    assert meta["counted"] == {"train": 5 + 2 * 2}  # the spaces and the ends


def test_the_bytes_of_a_cut_conversation_are_those_that_fit(chat_models, tmp_path):
    """The bytes of answers that are cut off do not count."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=talk("a", "bc", "d", "e" * 500))])
    prepare_chat(path, chat_models["char"], tmp_path, val_fraction=0)
    _, meta = windows_of(tmp_path / "chat")
    assert meta["bytes"] == {"train": 2}


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_well_filled(seed):
    """Each row is in one window, none is too full, and fewer than one in ten could be spared."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, 500).tolist()
    windows = conversations.packed(lengths, 100)
    assert sorted(sum(windows, [])) == list(range(500))
    assert max(sum(lengths[i] for i in numbers) for numbers in windows) <= 100
    assert len(windows) < 1.1 * sum(lengths) / 100
    assert windows == sorted(windows)
    assert conversations.packed([], 100) == []


def test_names_of_roles_in_a_text_are_text(chat_models, tmp_path):
    """`User:` in a text is text: the conversation is kept, as it is."""
    path = write_rows(tmp_path / "a.jsonl", [dict(prompt="a\nAssistant: b\nUser: c", completion="User: d")])
    prepare_chat(path, chat_models["char"], tmp_path, val_fraction=0)
    windows, meta = windows_of(tmp_path / "chat")
    text = make_tokenizer(CHAR).decode(windows["train"][0][0].tolist()).strip("\0")
    assert text == "User: a\nAssistant: b\nUser: c\nAssistant: User: d"
    assert meta["counted"]["train"] == len(" User: d") + 1


def test_held_out_files(chat_models, tmp_path):
    """Files of val_files are held out whole, even if files names them too; copies of their rows are not
    trained on."""
    write_rows(tmp_path / "a.jsonl", MANY)
    write_rows(tmp_path / "b.jsonl", [*MANY[:3], dict(prompt="new", completion="one")])
    held_out = f"{tmp_path}/../{tmp_path.name}/b.jsonl"  # not as files writes it
    flags = dict(val_files=held_out, data_dir=tmp_path / "data")
    out, err = prepare_chat(tmp_path / "*.jsonl", chat_models["char"], **flags)
    windows, meta = windows_of(tmp_path / "data" / "chat")
    tokenizer = make_tokenizer(CHAR)
    rows = [chat.messages_of(row) for row in [*MANY, dict(prompt="new", completion="one")]]
    parts = [cut(*chat.encode(tokenizer, CHAR, messages), CHAR["eot"]) for messages in rows]
    short = [i for i, part in enumerate(parts) if part]
    numbers = {
        split: conversations_in(arrays, [parts[i] for i in short]) for split, arrays in windows.items()
    }
    assert [short[i] for i in numbers["val"]] == [i for i in short if i < 3 or i == len(MANY)]
    assert [short[i] for i in numbers["train"]] == [i for i in short if 3 <= i < len(MANY)]
    assert meta["skipped"]["duplicate"] == 3
    assert f"line 1 of {tmp_path / 'a.jsonl'} (duplicate)" in err


def test_copies_are_on_one_side(chat_models, tmp_path):
    """Which conversations are held out depends on their text alone, not on their place."""
    splits = []
    for name, rows in (("a", MANY), ("b", MANY[::-1])):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        prepare_chat(path, chat_models["char"], tmp_path / name, val_fraction=0.3)
        splits.append(read_json(tmp_path / name / "chat" / "meta.json"))
    assert splits[0]["documents"] == splits[1]["documents"]
    assert splits[0]["counted"] == splits[1]["counted"]


def test_packed_files(chat_models, tmp_path):
    """A compressed file, or one with a byte order mark, gives what the file itself does."""
    path = write_rows(tmp_path / "a.jsonl", MANY)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    data = tmp_path / "data"
    for name in ("a.jsonl", "b.jsonl.gz"):
        prepare_chat(tmp_path / name, chat_models["char"], data, name=name)
    shards = [read_json(data / name / "meta.json")["shards"] for name in ("a.jsonl", "b.jsonl.gz")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("has_workers", [False, True])
def test_killed_and_continued(has_workers, chat_models, tmp_path):
    """A preparation that is killed again and again writes the same bytes as one that is not."""
    copies = [dict(messages=m) for m in talks() + talks(40)] + [b"{}"]
    path = write_rows(tmp_path / "rows.jsonl", copies)
    patch = prepare_faults.small()
    prepare_chat(path, chat_models["sentencepiece"], tmp_path / "whole", patch=patch)
    flags = chat_flags(path, chat_models["sentencepiece"], tmp_path / "killed")
    place, whole = tmp_path / "killed" / "chat", tmp_path / "whole" / "chat"
    written = 0
    for _ in range(1 if has_workers else 2):
        hold = prepare_faults.hold_at(written + 3000)
        child = Preparation(flags, place, patch + hold, script="chat", has_workers=has_workers)
        child.until(lambda: child.written() >= written + 1500)  # noqa: B023
        child.kill()
        written = child.written()
        assert not os.path.exists(place / "meta.json")
    out, _ = prepare(*flags, script="chat", patch=patch)
    assert "continuing after" in out
    assert "skipped rows: 40 duplicate, 1 malformed" in out
    names = sorted(os.listdir(whole))
    assert names == sorted(os.listdir(place))
    assert sum(name.endswith(".mask") for name in names) > 2
    for name in names:
        if name != "meta.json":
            assert (place / name).read_bytes() == (whole / name).read_bytes(), name
    metas = [read_json(folder / "meta.json") | dict(seconds=0) for folder in (place, whole)]
    assert metas[0] == metas[1]
    assert "is complete" in prepare(*flags, script="chat")[0]


@pytest.mark.parametrize("n_windows", [1, 2, 3, 4])
def test_the_end_can_be_repeated(n_windows, tmp_path, monkeypatch):
    """The token after the last window is written once, though a preparation is killed after it is counted."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 10)  # two windows of 4 and a token
    progress = dict(window=4, vocab_size=20, eot=7, shards={}, masks={})
    ids = np.arange(4 * n_windows, dtype="<u2").reshape(-1, 4)
    split = conversations.MaskedSplit(str(tmp_path), "train", 0, progress)
    split.write(ids, np.ones(ids.shape, np.uint8))
    split.end_shard()
    split.sync()
    again = conversations.MaskedSplit(str(tmp_path), "train", split.n, progress)
    again.end_shard()
    again.finish()
    n_shards = -(-n_windows // 2)
    assert again.n == split.n == 4 * n_windows + n_shards
    assert sorted(progress["shards"]) == [f"train_{i:05d}.bin" for i in range(n_shards)]
    assert sorted(os.listdir(tmp_path)) == sorted([*progress["shards"], *progress["masks"]])
    for i, name in enumerate(sorted(progress["shards"])):
        expected = [*ids[2 * i : 2 * i + 2].ravel(), 7]
        assert np.fromfile(tmp_path / name, "<u2").tolist() == expected
        mask = np.fromfile(tmp_path / name.replace(".bin", ".mask"), np.uint8)
        assert mask.tolist() == [1] * (len(expected) - 1) + [0]


def test_a_preparation_that_fails_leaves_no_file(chat_models, tmp_path):
    """A preparation that ends before a token is known to be on the disk leaves no token file and no mask."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=m) for m in talks(40)])
    patch = prepare_faults.small() + prepare_faults.full_disk(after=1)
    _, err = prepare_chat(path, chat_models["char"], tmp_path / "data", patch=patch, code=1)
    assert "No space left" in err
    assert not os.path.exists(tmp_path / "data" / "chat")
