"""worker.js, in Node: what it answers to the messages of a page."""

import json
import os

import pytest
import torch
from parts import part_of, sentencepiece
from web_pages import BOUND, in_float64, js, model_of, needs_node

from nanobit import chat
from nanobit.export.web import html_file
from nanobit.generate import generate
from nanobit.tasks.tictactoe import next_logprobs
from nanobit.tokenizer import make_tokenizer

pytestmark = needs_node
HERE = os.path.dirname(os.path.abspath(__file__))
CHARS = "\0\n" + "".join(map(chr, range(32, 127)))
SPEC = dict(kind="char", sha256="x", eot=0, chars=CHARS, chat=chat.FORMAT)
OPTIONS = dict(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0, seed=5)
MATRIX = "blocks.0.attn.k_proj.weight"
TALK = [dict(role="user", content="How are you?")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of the page of a random model."""
    path = tmp_path_factory.mktemp("page") / "x.html"
    html_file.write(part_of(SPEC, vocab_size=len(CHARS)), str(path))
    return path


def order_of(path, *questions):
    """Return [(type, id)] of what the worker of a page answers to questions, as it comes."""
    return [(answer["type"], answer.get("id")) for answer in all_answers(path, *questions)]


def all_answers(path, *questions):
    """Return what the worker of a page answers to questions, and first that it is ready."""
    parts = html_file.elements(path)
    entry = {name: json.loads(parts[name]) for name in ("model", "tokenizer")} | dict(
        weights=parts["weights"]
    )
    names = [*html_file.WORKER, os.path.join(HERE, "web_worker.js")]
    questions = [dict(question, id=i) for i, question in enumerate(questions)]
    return js("answersOf(entry, questions)", names, entry=entry, questions=questions)


def answers_of(path, *questions):
    """Return what the worker of a page answers to each question, in their order, with the whole of a text."""
    ready, *answers = all_answers(path, *questions)
    assert ready["type"] == "ready"
    ends = [answer for answer in answers if answer["type"] != "text"]
    assert [answer["id"] for answer in ends] == [*range(len(questions))]
    for answer in answers:
        if answer["type"] == "text":
            end = ends[answer["id"]]
            end["text"] = end.get("text", "") + answer["text"]
    return ends


def write(**changes):
    """Return the question for a text."""
    return dict(type="generate", prompt="a cat") | OPTIONS | changes


def test_a_seed_gives_the_same_text(page):
    """The same seed gives the same text, another one another, and all tokens are counted."""
    one, again, other = answers_of(page, write(), write(), write(seed=6))
    assert one["text"] == again["text"] != other["text"]
    assert (one["type"], one["reason"]) == ("done", "length")
    assert one["new_tokens"] == len(one["text"]) == 20


@torch.no_grad()
def test_a_text_is_that_of_python(page):
    """Greedy text after a prompt, and the answer in a conversation, are those of Python."""
    tokenizer = make_tokenizer(SPEC)
    model = model_of(page)
    question = write(messages=TALK, temperature=0)
    answers = answers_of(page, write(temperature=0), question)
    for answer, ids in zip(
        answers, ([0, *tokenizer.encode("a cat")], chat.prompt_ids(tokenizer, SPEC, TALK))
    ):
        with in_float64:
            made = [token.item() for token in generate(model, torch.tensor([ids]), 20, temperature=0.0)]
        assert answer["text"] == tokenizer.decode(made)


def test_an_answer_has_half_of_the_context(page):
    """An answer in a conversation ends after half of the context, however many tokens were asked for."""
    (answer,) = answers_of(page, write(messages=TALK, temperature=0, max_new_tokens=60))
    assert answer["new_tokens"] == 32


def test_a_text_ends_at_the_end_token(page):
    """The token that ends a text ends the answer, and is counted but not shown."""
    (answer,) = answers_of(page, write(max_new_tokens=3000))
    assert answer["reason"] == "end"
    assert answer["new_tokens"] == len(answer["text"]) + 1 < 3000


def test_a_text_can_be_stopped(page):
    """A stop ends the text within a token; what is asked afterwards is answered."""
    stopped, other = answers_of(page, write(stop_after=3), dict(type="next", texts=["a"]))
    assert stopped["reason"] == "stopped"
    assert 3 <= stopped["new_tokens"] <= 4
    assert other["type"] == "next"


@torch.no_grad()
def test_the_next_token(page):
    """The log probabilities of the next token, and of the texts, are those that Python's player asks for."""
    texts = ["abc", "xyz"]
    (answer,) = answers_of(page, dict(type="next", texts=texts))
    with in_float64:
        after, so_far = next_logprobs(model_of(page), make_tokenizer(SPEC), 0, texts)
    assert (torch.tensor(answer["logprobs"], dtype=torch.float64) - after).abs().max() <= BOUND
    assert (torch.tensor(answer["sums"], dtype=torch.float64) - so_far).abs().max() <= BOUND


@pytest.mark.parametrize("ternary", [True, False])
def test_a_matrix(ternary, tmp_path):
    """A matrix comes row after row, with its shape: the codes of a ternary one, the values of another."""
    html_file.write(part_of(ternary=ternary), str(tmp_path / "x.html"))
    held = html_file.values(tmp_path / "x.html")
    names = [MATRIX, "embed.weight"]
    answers = answers_of(tmp_path / "x.html", *(dict(type="matrix", name=name) for name in names))
    for name, answer, is_codes in zip(names, answers, (ternary, False)):
        values = held[name].sign() if is_codes else held[name].float()
        assert answer["shape"] == list(values.shape)
        assert [*answer["codes"].values()] == pytest.approx(values.view(-1).tolist(), rel=1e-6)


def test_a_matrix_does_not_wait_for_a_text(page):
    """A matrix comes while a text is being written."""
    kinds = [kind for kind, _ in order_of(page, write(max_new_tokens=50), dict(type="matrix", name=MATRIX))]
    assert kinds.index("matrix") < kinds.index("done")


def test_an_error_is_an_answer(page):
    """What cannot be done is an answer with the reason, and the next question is answered."""
    missing, unknown, good = answers_of(page, write(prompt="\u4e2d"), dict(type="sing"), write())
    assert missing["type"] == unknown["type"] == "error"
    assert "does not know the character" in missing["message"]
    assert good["type"] == "done"


def test_the_last_turns_of_a_conversation(page):
    """An answer has its half of the context: of a longer conversation the last turns are read."""
    talk = [dict(role="user", content="a"), dict(role="assistant", content="b"), *TALK]
    for n, is_whole in ((8, True), (60, False)):
        whole, last = answers_of(page, *(write(messages=turns, max_new_tokens=n) for turns in (talk, TALK)))
        assert (whole["text"] != last["text"]) == is_whole


@torch.no_grad()
def test_a_text_that_ends_within_a_character(tmp_path):
    """The bytes of a character that is not complete at the end of a text are shown as one that is unknown."""
    spec = sentencepiece()
    part = part_of(spec, vocab_size=320)
    lead = make_tokenizer(spec).encode("\U0001f642")[-4]  # the first byte of four
    head = torch.zeros(320, 64)
    head[lead] = part["model"]["embed.weight"][lead]
    part["config"]["tie_embeddings"] = False
    part["model"]["head.weight"] = head
    html_file.write(part, str(tmp_path / "x.html"))
    answers = answers_of(tmp_path / "x.html", write(prompt="a", max_new_tokens=1))
    assert answers[0]["text"] == "\ufffd"


def test_seconds(page):
    """The seconds of loading, and of all new tokens but the first, are those of the clock."""
    parts = html_file.elements(page)
    entry = {name: json.loads(parts[name]) for name in ("model", "tokenizer")}
    entry["weights"] = parts["weights"]
    names = [*html_file.WORKER, os.path.join(HERE, "web_worker.js")]
    clock = "Object.defineProperty(globalThis, 'performance', {value: {now: () => (calls += 1000)}})"
    expression = f"({clock}, answersOf(entry, [question]))"
    answers = js(expression, names, calls=0, entry=entry, question=write() | dict(id=0))
    assert answers[0]["seconds"] == 1  # one call of the clock after the other
    assert answers[-1]["decode_seconds"] == 1


def test_a_question_that_does_not_fit_is_an_error(page):
    """A question longer than the context is refused, not cut."""
    (answer,) = answers_of(page, write(messages=[dict(role="user", content="a" * 99)]))
    assert answer["type"] == "error"
    assert "tokens" in answer["message"]
