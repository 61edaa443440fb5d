"""Conversations as a task: the loss on answers, and the last numbers of worked problems, by source."""

import json
import string

import pytest
import torch
import torch.nn.functional as F
from conftest import run, settings
from scripted_models import save

from model import Transformer
from nanobit import chat
from nanobit.prepare import token_files
from nanobit.tasks import answers
from nanobit.tokenizer import make_tokenizer

SPEC = token_files.char_tokenizer("\0" + string.printable[:95] + "\n") | {"eot": 0}
TOKENIZER = make_tokenizer(SPEC)


def talk(*texts):
    """Return the messages of these texts, of which the user writes the first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ROWS = [
    {"messages": talk("Hi", "Hello", "And?", "No."), "source": "small talk:1"},
    {"messages": talk("Bye", "See you"), "source": "small talk"},
    {"prompt": "What is 3 + 4?", "completion": "3 + 4 = 7\nThe answer is 7.", "source": "sums:a"},
    {"instruction": "What is 999 + 1?", "output": "The answer is 1,000."},
]


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def examples(tmp_path):
    return answers.read(write(tmp_path / "rows.jsonl", *ROWS))


@torch.no_grad()
def test_the_loss_is_that_of_the_targets_of_training(examples, monkeypatch):
    """The loss by source is that of the tokens of mask 1, each conversation read alone."""
    monkeypatch.setattr(answers, "exact_numbers", lambda *_: {})
    torch.manual_seed(0)
    model = Transformer(settings(vocab_size=97, seq_len=64, ternary=False)).eval()
    nats, n = {}, {}
    for source, messages in examples:
        ids, mask = chat.encode(TOKENIZER, SPEC, messages)
        ids, mask = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")[mask[1:]]
        nats[source] = nats.get(source, 0) + losses.sum().item()
        n[source] = n.get(source, 0) + len(losses)
    result, lines = answers.score(model, TOKENIZER, SPEC, examples, 2)
    assert result["loss_by_source"] == {
        source: pytest.approx(nats[source] / n[source], abs=1e-5) for source in ("", "small talk", "sums")
    }
    assert result["tokens"] == sum(n.values())
    assert result["val_loss"] == pytest.approx(sum(nats.values()) / sum(n.values()), abs=1e-5)
    assert "accuracy" not in result
    assert lines[0].startswith("loss on 5 answers ")


def test_what_does_not_fit_is_left_out(examples, monkeypatch, capsys):
    """A character that the tokenizer lacks leaves a conversation out, the context an answer; if nothing is
    left, that is an error."""
    monkeypatch.setattr(answers, "exact_numbers", lambda *_: {})
    model = Transformer(settings(vocab_size=97, seq_len=12)).eval()
    more = [*examples, ("x", talk("\u00e9", "e")), ("y", talk("a", "b" * 11))]
    result, lines = answers.score(model, TOKENIZER, SPEC, more, 2)
    assert lines[0].startswith(
        "left out: 1 conversations cannot be read; the first: the tokenizer has no char"
    )
    assert lines[1] == "left out: 3 answers are longer than the context of 12 tokens"
    assert result["loss_by_source"].keys() == {"small talk"}
    with pytest.raises(SystemExit):
        answers.score(model, TOKENIZER, SPEC, more[-2:], 2)
    assert "cannot be scored on the conversations: 1 conversations" in capsys.readouterr().err


def test_worked_problems_are_right_by_their_last_number(examples, monkeypatch):
    """The last number counts, with or without commas; other conversations are not asked."""
    asked = []

    def write_on(model, tokenizer, eot, ids, n, temperature):
        asked.append(tokenizer.decode(ids[1:]))
        yield " 3 + 4 = 7,"
        yield " so it is 1000."

    monkeypatch.setattr(answers, "write_on", write_on)
    hits = answers.exact_numbers(None, TOKENIZER, SPEC, examples)
    assert hits == {"sums": [False], "": [True]}
    assert asked == ["User: What is 3 + 4?\nAssistant:", "User: What is 999 + 1?\nAssistant:"]


@pytest.mark.parametrize(
    "text, number",
    [
        ("", ""),
        ("none", ""),
        ("a 7, b 12.", "12"),
        ("$1,234.50!", "1234.50"),
        ("so -3", "-3"),
        ("x 5-2", "-2"),
    ],
)
def test_the_last_number(text, number):
    assert answers.last_number(text) == number


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is empty"),
        ("a text\n", "line 1: Expecting value"),
        (json.dumps(ROWS[0]) + '\n\n{"messages": []}\n', "line 3: no answer"),
        ("\n\xff", "line 2: 'utf-8' codec"),
    ],
)
def test_a_bad_file_is_one_line(content, says, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        answers.read(str(path))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_byte_order_mark_and_empty_lines_are_skipped(tmp_path):
    """A byte order mark and empty lines do not count, as in prepare/chat.py."""
    path = tmp_path / "talks.jsonl"
    row = json.dumps(dict(prompt="a", completion="b"))
    path.write_text(f"\ufeff\n{row}\n\n{row}\n", encoding="utf-8")
    assert len(answers.read(str(path))) == 2


def test_evaluate_scores_conversations(tmp_path):
    """evaluate.py --conversations= scores any model, and excludes data sets and other splits."""
    path = write(tmp_path / "rows.jsonl", *ROWS)
    ckpt = save(tmp_path / "run", SPEC, seq_len=64)
    out, _ = run("evaluate.py", ckpt, f"--conversations={path}")
    result = json.loads(out.strip().split("\n")[-1])
    assert result["dataset"] == "rows.jsonl"
    assert result["n"] == 2
    assert result["accuracy_by_source"].keys() == {"", "sums"}
    assert result["loss_by_source"].keys() == {"", "small talk", "sums"}
    assert "4 conversations" in out
    assert "of 2 worked problems" in out
    err = run("evaluate.py", ckpt, f"--conversations={path}", "--split=train", code=2)[1]
    assert "has the split val only" in err
    err = run("evaluate.py", ckpt, f"--conversations={tmp_path}/x.jsonl", code=2)[1]
    assert "x.jsonl' cannot be read: No such file" in err
