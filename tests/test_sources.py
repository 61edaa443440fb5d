"""prepare/sources.py: documents of files and of the hub, and wrong input."""

import os
import time

import pytest
import sources
import stream
from conftest import run
from documents import TIKTOKEN, documents_of, text_flags


@pytest.mark.parametrize("name", ["docs.txt", "part*.txt", "separated.txt", "docs.parquet", "*.jsonl"])
def test_every_kind_of_file(corpus, tmp_path, name):
    """bug guarded: a reader that loses the last document, or the text around the border of what is held
    out"""
    folder, documents = corpus
    flags = text_flags(folder, tmp_path, name, column="body" if "json" in name else "text")
    flags += ["--separator=<|end|>"] if name == "separated.txt" else []
    run("prepare/text.py", *flags, patch="import sources; sources.LONGEST = 1000")
    found = documents_of(tmp_path / "text")
    whole = "".join(documents)
    if name == "part*.txt":
        assert "".join(found["train"] + found["val"]) == whole and len(found["train"]) == 3
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    elif name == "docs.txt":
        assert found["train"][0] + found["val"][0] == whole and found["train"][0].endswith("\n")
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    else:
        assert sorted(found["train"] + found["val"]) == sorted(documents)


def test_hub_folder(corpus, tmp_path):
    """bug guarded: the hub's own val split mixed with training text, max_documents of the wrong split"""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    run("prepare/tinystories.py", *flags, "--max_documents=170")
    found = documents_of(tmp_path / "tinystories")
    assert found == {"train": documents[:170], "val": documents[:20]}
    run("prepare/fineweb_edu.py", *flags, "--config=", "--val_fraction=0.2", "--name=hashed")
    found = documents_of(tmp_path / "hashed")
    assert sorted(found["train"] + found["val"]) == sorted(documents) and 30 < len(found["val"]) < 90
    assert found["val"] == [text for text in documents if stream.split_of(text, 0.2) == "val"]


BAD = {
    "latin1.txt": (b"good line\n" * 300 + b"caf\xe9\n", [], "byte 3,003 (0xe9) is not UTF-8"),
    "empty.txt": (b"", [], "no text in 1 file"),
    "list.jsonl": (b'{"body": "a"}\n[1]\n', [], "line 2 has no 'body'"),
    "torn.jsonl": (b'{"body": "a"}\n{"body": "b', [], "line 2 is not JSON"),
    "number.jsonl": (b'{"body": 3}\n', [], "is int, not text"),
    "half.jsonl": (b'{"body": "\\ud800"}\n', [], "surrogate"),
    "fake.parquet": (b"text", [], "is no parquet file"),
    "nul.txt": (b"a\0b\n" * 20, [], "NUL"),
    "vocab.txt": (b"abc\n" * 50, ["--tokenizer=sentencepiece", "--vocab_size=4000"], "vocab_size = 4000"),
    "tokenizer.txt": (b"abc\n" * 50, ["--tokenizer=gpt-2"], "tokenizer = 'gpt-2' is unknown"),
    "model.txt": (b"abc\n" * 50, ["--tokenizer={path}"], "is no SentencePiece model"),
    "binary.txt": (b"\x80" * 3000, ["--val_fraction=0.5"], "is not UTF-8"),
    "trained.jsonl": (b'{"body": "a"}\n[1]\n', ["--tokenizer=sentencepiece"], "line 2 has no 'body'"),
    "fraction.txt": (b"abc\n" * 50, ["--val_fraction=1"], "val_fraction = 1.0 must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, name):
    """bug guarded: a traceback, or half a data set left in place, for text that cannot be used"""
    content, more, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    more = [flag.format(path=tmp_path / name) for flag in more]
    _, err = run("prepare/text.py", *text_flags(tmp_path, tmp_path / "data", name), *more, code=2)
    assert expected in err and err.count("error:") == 1
    assert not os.path.exists(tmp_path / "data" / "text")


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """bug guarded: a meta.json without tokens, which training waits for, where the first document is no
    text"""
    (tmp_path / "latin1.txt").write_bytes(BAD["latin1.txt"][0])
    flags = text_flags(tmp_path, tmp_path / "data", "latin1.txt", "gpt2")
    run("prepare/text.py", *flags, patch=TIKTOKEN, code=2)
    assert not os.path.exists(tmp_path / "data" / "text")


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--config=odd", "'odd'"),
        ("--split=tran", "train"),
        ("--column=body", "it has text, id"),
        ("--repo=./nowhere", "is neither a folder nor on the hub"),
    ],
)
def test_bad_hub_options(corpus, tmp_path, flag, expected):
    """bug guarded: a traceback of the datasets library for a mistyped name"""
    flags = [f"--repo={corpus[0] / 'hub'}", f"--data_dir={tmp_path}", "--tokenizer=char", "--config="]
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
    _, err = run("prepare/fineweb_edu.py", *flags, flag, patch=offline, code=2)
    assert err.startswith("error:") and err.count("\n") == 1 and expected in err
    assert not os.path.exists(tmp_path / "fineweb_edu")


def test_the_network_is_not_the_users_mistake():
    """bug guarded: a dead hub told as a file that is not there"""
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert sources.is_network(LocalEntryNotFoundError("offline"))
    assert sources.is_network(ConnectionError("refused"))
    assert not sources.is_network(FileNotFoundError("x")) and not sources.is_network(ValueError("http"))


def test_a_hub_that_fails_once_is_asked_again(monkeypatch):
    """bug guarded: a preparation that ends because one answer was 503, or that waits for what is not there"""

    class HfHubHTTPError(OSError):  # as huggingface_hub names and derives them
        pass

    class RepositoryNotFoundError(HfHubHTTPError):
        pass

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    answers = [HfHubHTTPError("503"), "found"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert sources.patiently(call) == "found"
    answers[:] = [RepositoryNotFoundError("404, private or gated"), "asked again"]
    with pytest.raises(RepositoryNotFoundError):
        sources.patiently(call)
    assert answers == ["asked again"]


def test_endless_line_in_a_file(tmp_path, capsys):
    """bug guarded: a file of one line is read into memory as a whole, or torn inside a character"""
    path = str(tmp_path / "endless.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("a" + "\u65e5" * 1_500_000)
    pieces = list(sources.Files([path], "text", "", 0.1).pieces(None))
    assert "".join(text for _, text, _, _ in pieces) == "a" + "\u65e5" * 1_500_000
    assert max(len(text.encode()) for _, text, _, _ in pieces) <= sources.LONGEST
    assert [(first, last) for _, _, first, last in pieces][0] == (True, False)
    assert capsys.readouterr().out.count("warning") == 1
