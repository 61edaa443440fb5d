"""nanobit/prepare/hub.py: documents of a local hub folder, and a hub that fails or lacks what is asked."""

import os
import time
from types import SimpleNamespace

import pytest
from documents import documents_of, prepare

from nanobit.prepare import chunks, hub


def test_hub_folder(corpus, tmp_path):
    """A val_split is held out whole, apart from the training text; max_documents counts for each split."""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    prepare(*flags, "--max_documents=170", script="tinystories")
    found = documents_of(tmp_path / "tinystories")
    assert found == {"train": documents[:170], "val": documents[:20]}
    prepare(*flags, "--config=", "--val_fraction=0.2", "--name=hashed", script="fineweb_edu")
    found = documents_of(tmp_path / "hashed")
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 30 < len(found["val"]) < 90
    assert found["val"] == [text for text in documents if chunks.split_of(text, 0.2) == "val"]


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
    """A mistyped name is one line, not a traceback of datasets."""
    flags = [f"--repo={corpus[0] / 'hub'}", f"--data_dir={tmp_path}", "--tokenizer=char", "--config="]
    _, err = prepare(*flags, flag, script="fineweb_edu", code=2)
    assert err.startswith("error:")
    assert err.count("\n") == 1
    assert expected in err
    assert not os.path.exists(tmp_path / "fineweb_edu")


def test_a_hub_file_that_cannot_be_read_is_a_line(tmp_path, capsys):
    """A file of the hub that datasets cannot read is one line with the way to read it."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    cfg = dict(repo=str(tmp_path), config="", column="text", revision="", max_documents=0)
    with pytest.raises(SystemExit):
        list(hub.Hub(SimpleNamespace(**cfg), "train", "").pieces(None))
    line = capsys.readouterr().err.splitlines()[-1]  # datasets logs one before it
    assert line.startswith("error: repo =")
    assert "prepare/text.py --files= reads its files" in line


def test_the_network_is_not_the_users_mistake():
    """A hub that cannot be reached is distinguished from a file that does not exist."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert hub.is_network(LocalEntryNotFoundError("offline"))
    assert hub.is_network(ConnectionError("refused"))
    assert not hub.is_network(FileNotFoundError("x"))
    assert not hub.is_network(ValueError("http"))


class HfHubHTTPError(OSError):  # as huggingface_hub names and derives them
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


def asked(monkeypatch, answers):
    """Return what hub.ask makes of these answers, the first first; those that are errors are raised."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return hub.ask(call, "repo = 'x'")


def test_a_hub_that_fails_once_is_asked_again(monkeypatch):
    """An answer such as 503 does not end a preparation."""
    assert asked(monkeypatch, [HfHubHTTPError("503"), "found"]) == "found"


def test_a_hub_is_not_asked_again_for_what_does_not_exist(monkeypatch, capsys):
    answers = [RepositoryNotFoundError("404, private or gated"), "asked again"]
    with pytest.raises(SystemExit) as stop:
        asked(monkeypatch, answers)
    assert stop.value.code == 2
    assert "is neither a folder nor on the hub" in capsys.readouterr().err
    assert answers == ["asked again"]


def test_a_hub_that_cannot_be_reached_is_exit_code_1(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        asked(monkeypatch, [ConnectionError("refused")])
    assert stop.value.code == 1
    assert "repo = 'x': the hub cannot be reached" in capsys.readouterr().err
