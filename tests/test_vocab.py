"""nanobit/prepare/vocab.py: which tokenizer and special tokens a data set gets, and of what size."""

import hashlib
import json
import os

from documents import prepare, text_flags
from parts import sentencepiece

import config
from nanobit.prepare import vocab


def test_a_tokenizer_trained_here_keeps_its_layout(tmp_path):
    """A second data set by the tokenizer of a first one, or of an export, begins its texts with the same
    token."""
    content = sentencepiece()["content"]
    sha256, path = hashlib.sha256(content).hexdigest(), tmp_path / "tokenizer.model"
    path.write_bytes(content)
    cfg = config.SimpleNamespace(tokenizer=str(path))
    for entry, marks in (
        ({}, {"eot": 2, "bos": 1}),
        ({"eot": 2}, {"eot": 2}),
        ({"eot": 2, "bos": 7}, {"eot": 2, "bos": 7}),
    ):
        spec = {"kind": "sentencepiece", "sha256": sha256}
        for name, beside in (
            ("meta.json", {"tokenizer": spec} | entry),
            ("config.json", {"nanobit": {"tokenizer": spec | entry}}),
        ):
            (tmp_path / name).write_text(json.dumps(beside))
            assert vocab.sentencepiece(cfg, str(path), [])[2] == marks
            (tmp_path / name).unlink()
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": {"sha256": "another"}, "eot": 2}))
    assert vocab.sentencepiece(cfg, str(path), [])[2] == {"eot": 2, "bos": 1}


def test_a_folder_without_a_sentencepiece_model(corpus, tmp_path):
    """A folder without a tokenizer.model is not taken for a hub repository, and a tokenizer.json is named as
    not supported."""
    folder = tmp_path / "llama3"
    os.makedirs(folder)
    flags = text_flags(corpus[0], tmp_path, tokenizer=folder)
    assert "the folder has no tokenizer.model; expected one" in prepare(*flags, code=2)[1]
    (folder / "tokenizer.json").write_text("{}")
    for name in (folder, folder / "tokenizer.json"):
        _, err = prepare(*text_flags(corpus[0], tmp_path, tokenizer=name), code=2)
        assert "tokenizer.json, as of Llama 3, is not supported" in err
        assert err.count("\n") == 1


def test_a_small_text_gets_a_small_vocabulary(capsys):
    """What is suggested is not warned of, and what is warned of is not suggested."""
    assert [vocab.suited(size) for size in (0, 50_000, 110_000, 10**7)] == [
        "--tokenizer=char",
        "--tokenizer=char",
        "--vocab_size=512",
        "--vocab_size=32768",
    ]
    vocab.warn_if_large(512, 110_000 // 3, 110_000)
    assert not capsys.readouterr().out
    vocab.warn_if_large(4096, 8409, 30_000)
    assert "each 2.1 times on average; --tokenizer=char" in capsys.readouterr().out
