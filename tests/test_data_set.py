"""data_set.py: every damage of meta.json is one line, and never another data set."""

import json
import os
import random

import pytest
from conftest import settings, write_data
from parts import tiktoken

from nanobit import data
from nanobit.data_set import Damaged, read_meta
from nanobit.tokenizer import make_tokenizer


def place(data_dir):
    return os.path.join(data_dir, "tiny")


def write_meta(data_dir, content):
    with open(os.path.join(place(data_dir), "meta.json"), "wb") as file:
        file.write(content if type(content) is bytes else json.dumps(content).encode())


def put(*path, value):
    """Return a change of a meta.json: this value at a path of fields; ... removes the field."""

    def change(meta):
        inner = meta
        for key in path[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return meta

    return change


SHARD = ("shards", "train_00000.bin")
DAMAGES = [
    (lambda _: b'{"a":' * 100_000, "RecursionError"),
    (lambda _: b"1" * 5000, "ValueError"),
    (lambda _: b"\xff", "UnicodeDecodeError"),
    (lambda _: b"[]", "its content is [], expected an object"),
    (lambda _: {}, "complete is missing"),
    (put("complete", value="no"), "complete = 'no', expected true or false"),
    (put("dtype", value="float32"), "dtype = 'float32', expected 'uint16' or 'uint32'"),
    (put("dtype", value=["uint16"]), "dtype = ['uint16']"),
    (put("vocab_size", value=2**31), "vocab_size = 2147483648, expected a whole number from 1 to"),
    (put("vocab_size", value=70_000), "vocab_size = 70000, but dtype = 'uint16' has 65536 ids"),
    (put("vocab_size", value=29), "tokenizer.chars are 28, but vocab_size = 29"),
    (put("vocab_size", value=True), "vocab_size = True"),
    (put("eot", value=1.5), "eot = 1.5"),
    (put("eot", value=28), "eot = 28, but vocab_size = 28"),
    (put("bos", value=28), "bos = 28, but vocab_size = 28"),
    (put("tokens", value={}), "tokens.train = 0, but its shards have 500"),
    (put("tokens", value=3), "tokens is 3, expected an object"),
    (put("tokens", "val", value=201), "tokens.val = 201, but its shards have 200"),
    (put("bytes", value=None), "bytes is None"),
    (put("bytes", "val", value=-1), "bytes.val = -1"),
    (put(*SHARD, "tokens", value="9"), "shards.train_00000.bin.tokens = '9'"),
    (put(*SHARD, "tokens", value=-5), "shards.train_00000.bin.tokens = -5"),
    (put(*SHARD, "sha256", value=...), "shards.train_00000.bin.sha256 is missing"),
    (put("shards", "../../x_00000.bin", value={}), "shards has the entry '../../x_00000.bin'"),
    (put("shards", "val_00002.bin", value=dict(tokens=1, sha256="0" * 64)), "tokens.val = 200, but its"),
    (put("tokenizer", "kind", value="word"), "tokenizer.kind = 'word', expected 'char' or"),
    (put("tokenizer", "kind", value="sentencepiece"), "tokenizer.file is missing"),
    (put("tokenizer", "chars", value=5), "tokenizer.chars = 5"),
    (put("tokenizer", "chars", value=...), "tokenizer.chars is missing"),
    (put("tokenizer", "chars", value="\nabcdefghijklmnopqrstuvwxyZ "), "or their sha256 is another"),
    (put("tokenizer", value=dict(kind="tiktoken", sha256="0" * 64, file="../x")), "tokenizer.file = '../x'"),
    (put("command", value=["\x1b[2J"]), r"command = ['\x1b[2J']"),
    (put("tokens", "\x1b[2J\n", value=1), r"tokens has the entry '\x1b[2J\n'"),
]


@pytest.mark.parametrize("change, says", DAMAGES, ids=[says for _, says in DAMAGES])
def test_a_damaged_meta_is_one_line(data_dir, change, says):
    """Every damage of meta.json is one line that names the field, never a traceback or a wrong value."""
    meta = read_meta(place(data_dir))
    write_meta(data_dir, change(meta))
    with pytest.raises(Damaged) as found:
        read_meta(place(data_dir))
    text = str(found.value)
    assert says in text, text
    assert "meta.json is damaged" in text, text
    assert "prepare it again" in text, text
    assert text.isprintable(), "what a file holds reaches the terminal escaped"


def test_a_changed_byte_of_meta_is_noticed_or_harmless(data_dir):
    """No changed byte of meta.json leads to other tokens or another model."""
    whole, rng, noticed = read_meta(place(data_dir)), random.Random(0), 0
    with open(os.path.join(place(data_dir), "meta.json"), "rb") as file:
        content = file.read()
    free = {"bytes", "dataset", "source", "eot"}  # the tokens that are trained on do not depend on these
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        write_meta(data_dir, bytes(damaged))
        try:
            found = read_meta(place(data_dir))
        except Damaged as error:
            assert str(error).isprintable()
            noticed += 1
            continue
        for key in whole.keys() - free - {"shards", "tokenizer"}:
            assert found[key] == whole[key], key
        assert found["tokenizer"]["chars"] == whole["tokenizer"]["chars"]
        assert found["shards"].keys() == whole["shards"].keys(), "their sums are compared with the shards"
    assert noticed > 100


def test_a_growing_and_an_older_meta_are_read(data_dir):
    """The meta.json of a set that grows, of an earlier version, or with more fields is valid."""
    meta = read_meta(place(data_dir))
    shards = {"train_00000.bin": meta["shards"]["train_00000.bin"]}
    for changes in (
        dict(complete=False, tokens=dict(train=700, val=100), shards=shards, command="python x"),
        dict(complete=False, tokens={}, bytes={}, shards={}),
        dict(bytes={}, masks={"train_00000.mask": 3}),
    ):
        write_meta(data_dir, meta | changes)
        assert read_meta(place(data_dir)) == meta | changes
    write_meta(data_dir, {key: meta[key] for key in meta.keys() - {"dataset", "source"}})
    read_meta(place(data_dir))


def test_the_vocabulary_is_that_of_the_tokenizer(capsys):
    """vocab_size in meta.json must be that of the tokenizer, or it could ask for 275 GB of embedding."""
    tokenizer = make_tokenizer(tiktoken())
    data.check_vocabulary(settings(), dict(vocab_size=266), tokenizer)
    with pytest.raises(SystemExit) as stop:
        data.check_vocabulary(settings(), dict(vocab_size=2**24), tokenizer)
    assert stop.value.code == 2
    assert "its tokenizer has 266 ids" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [dict(pattern="("), dict(content=b"a b c"), dict(special=3)])
def test_a_tokenizer_that_cannot_be_made_is_one_line(capsys, changes):
    """A damaged tokenizer is one line, not the traceback of its library."""
    with pytest.raises(SystemExit) as stop:
        make_tokenizer(tiktoken() | changes)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "tokenizer is damaged" in error
    assert error.count("\n") == 1


def test_a_task_of_text_is_no_data_to_train_on(data_dir):
    """A task of text is named as such, with the command that uses it."""
    write_meta(data_dir, dict(task="lambada", examples=3, complete=True))
    with pytest.raises(Damaged, match="evaluate.py --dataset=tiny"):
        read_meta(place(data_dir))


def test_large_vocabularies_have_large_ids(tmp_path):
    """A vocabulary of 300,000 ids is stored as uint32."""
    assert read_meta(place(write_data(tmp_path, vocab_size=300_000)))["dtype"] == "uint32"
