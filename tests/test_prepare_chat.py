"""prepare/chat.py: rows that are skipped, and files, models and flags that are refused."""

import os

import pytest
from conftest import run
from parts import part_of, tiktoken
from talks import (
    CHAR,
    MANY,
    WINDOW,
    model,
    prepare_chat,
    talk,
    write_rows,
)

from nanobit.export import hf
from nanobit.files import read_json

BAD = {
    "no role": (dict(messages=[dict(content="a")]), "message 1 is not an object with role and content"),
    "two users": (dict(messages=talk("a") + talk("b", "c")), "message 2 has the role 'user', expected"),
    "no answer": (dict(messages=talk("a")), "no answer"),
    "empty answer": (dict(prompt="a", completion=" "), "message 2 (assistant) is empty"),
    "other form": (dict(text="a story"), "a row has text; expected"),
    "half a pair": (
        b'{"prompt": "a", "completion": "\\ud83d"}',
        "message 2 (assistant) has half a surrogate pair",
    ),
    "NUL": (b'{"prompt": "a\\u0000b", "completion": "c"}', "message 1 (user) has a NUL character"),
    "not JSON": (b'{"prompt": "a", ', "not JSON"),
    "a list": (b'["a", "b"]', "a row is list"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "a"}', "not JSON"),
}


@pytest.mark.parametrize("row, says", BAD.values(), ids=BAD)
def test_malformed_rows_are_named(row, says, chat_models, tmp_path):
    """A row that is not a conversation is skipped, counted, and named by file and line with the reason."""
    path = write_rows(tmp_path / "a.jsonl", [*MANY, row])
    out, err = prepare_chat(path, chat_models["char"], tmp_path)
    assert f"skipped: line {len(MANY) + 1} of {path}: {says}" in err
    assert "(malformed)" in err
    assert "skipped rows: 1 malformed" in out
    assert read_json(tmp_path / "chat" / "meta.json")["skipped"]["malformed"] == 1


def test_a_skipped_row_is_a_short_line(chat_models, tmp_path):
    """A row is named in a line of a bounded length, whatever it holds."""
    long = dict(messages=[dict(role="x" * 10_000, content="a")])
    _, err = prepare_chat(write_rows(tmp_path / "a.jsonl", [*MANY, long]), chat_models["char"], tmp_path)
    assert "has the role 'xxx" in err
    assert max(map(len, err.splitlines())) < 500


def test_what_is_skipped_has_a_limit(chat_models, tmp_path):
    """More malformed and duplicate rows than max_bad_rows end a preparation; empty and long ones do not."""
    long = dict(messages=talk("a" * WINDOW, "b"))
    path = write_rows(tmp_path / "a.jsonl", [*MANY, *MANY[:2], b"{}", b"", b"", long, long | dict(id=2)])
    out, err = prepare_chat(path, chat_models["char"], tmp_path / "data", max_bad_rows=4)
    assert f"skipped: line {len(MANY) + 1} of {path} (duplicate)" in err
    assert "skipped rows: 3 duplicate, 2 empty, 1 malformed" in out
    _, err = prepare_chat(path, chat_models["char"], tmp_path, max_bad_rows=2, code=2)
    assert "error: max_bad_rows = 2: skipped rows: 2 duplicate, 1 malformed" in err
    assert "or allow more with --max_bad_rows=" in err
    assert "--column" not in err
    assert not os.path.exists(tmp_path / "chat")


def test_letters_that_the_tokenizer_lacks_are_counted(chat_models, tmp_path):
    """A conversation with a character that a tokenizer of characters lacks is skipped, up to the limit."""
    path = write_rows(
        tmp_path / "a.jsonl", [*MANY, *(dict(prompt=f"{i} \u00e9", completion="a") for i in range(3))]
    )
    out, err = prepare_chat(path, chat_models["char"], tmp_path / "data")
    assert "the tokenizer has no character" in err
    assert "skipped rows: 3 not encoded" in out
    assert "max_bad_rows = 2" in prepare_chat(path, chat_models["char"], tmp_path, max_bad_rows=2, code=2)[1]


def test_the_limit_is_for_all_kinds_together(chat_models, tmp_path):
    """Rows that are not conversations, and rows of letters that the tokenizer lacks, have one limit."""
    lacking = [dict(prompt=f"{i} \u00e9", completion="a") for i in range(2)]
    path = write_rows(tmp_path / "a.jsonl", [*MANY, b"{}", *lacking])
    prepare_chat(path, chat_models["char"], tmp_path / "data", max_bad_rows=3)
    _, err = prepare_chat(path, chat_models["char"], tmp_path, max_bad_rows=2, code=2)
    assert "max_bad_rows = 2: skipped rows: 1 malformed, 2 not encoded" in err


@pytest.mark.parametrize(
    "content, says",
    [
        (
            "Once upon a time\nthere was a cat.\n",
            "is 'Once upon a time'; expected one JSON object a line; plain",
        ),
        ('[\n {"prompt": "a", "completion": "b"}\n]\n', "of a JSON array: jq -c '.[]'"),
        ('\n{\n "prompt": "a",\n "completion": "b"\n}\n', "of objects on several lines: jq -c . FILE"),
        ("a\0b", "is not text: byte 1 is NUL"),
    ],
)
def test_files_of_another_kind(content, says, chat_models, tmp_path):
    """A file that does not hold one object a line is refused in one line, with what to do."""
    (tmp_path / "a.txt").write_text(content)
    _, err = prepare_chat(tmp_path / "a.txt", chat_models["char"], tmp_path, code=2)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not os.path.exists(tmp_path / "chat")


def test_a_context_shorter_than_a_turn(chat_models, tmp_path):
    """If no conversation fits in a window, that is the reason in the error."""
    path = write_rows(tmp_path / "a.jsonl", [dict(prompt="a" * 200, completion="b")])
    _, err = prepare_chat(path, chat_models["char"], tmp_path / "data", val_fraction=0, code=2)
    assert f"skipped: line 1 of {path}: its first turn has 221 tokens (too long)" in err
    assert "no text is left to train on; skipped rows: 1 too long; a window of 128 tokens" in err
    assert not os.path.exists(tmp_path / "data" / "chat")


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(window=129), "window = 129: expected 2 to 128, the context of ckpt"),
        (dict(window=1), "window = 1: expected 2 to 128"),
        (dict(val_files="nothing.jsonl"), "'nothing.jsonl' matches no file, for example --val_files="),
        (dict(ckpt="nothing"), "ckpt = 'nothing'"),
    ],
)
def test_bad_flags(flags, says, chat_models, talk_rows, tmp_path):
    _, err = prepare_chat(talk_rows, **dict(ckpt=chat_models["char"], data_dir=tmp_path) | flags, code=2)
    assert says in err
    assert err.count("error:") == 1


def test_all_files_held_out(chat_models, talk_rows, tmp_path):
    _, err = prepare_chat(talk_rows, chat_models["char"], tmp_path, val_files=talk_rows, code=2)
    assert "no file is left to train on" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(chars=CHAR["chars"].replace(":", "")), "but the tokenizer has no character ':'"),
        (dict(eot=1), "does not keep the letters and line ends"),
    ],
)
def test_a_model_of_other_letters(changes, says, talk_rows, tmp_path):
    """A model whose tokenizer lacks the letters of `User: ` is refused before anything is written."""
    _, err = prepare_chat(talk_rows, model(tmp_path, **changes), tmp_path, code=2)
    assert says in err
    assert "train a model on text that has them" in err
    assert not os.path.exists(tmp_path / "chat")


def test_another_model_is_refused(chat_models, tmp_path):
    """A model does not train on conversations in the tokens of another, nor are these made under one name."""
    path = write_rows(tmp_path / "a.jsonl", MANY)
    prepare_chat(path, chat_models["char"], tmp_path)
    other = str(tmp_path / "other")
    hf.write(part_of(tiktoken(), vocab_size=266, ternary=False, n_layer=1, seq_len=WINDOW), other)
    flags = [f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", "--dataset=chat", f"--init_from={other}"]
    flags += ["--no-ternary", "--no-compile", "--max_steps=1", f"--seq_len={WINDOW}", "--device=cpu"]
    _, err = run("train.py", *flags, code=2)
    assert "the tokenizer of dataset = 'chat' is not the checkpoint's; name one" in err
    _, err = prepare_chat(path, chat_models["tiktoken"], tmp_path, code=2)
    assert "holds another data set (prepare/chat.py --files=" in err
