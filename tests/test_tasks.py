"""nanobit/tasks/text.py and arithmetic.py: what they score, against plain loops and by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CHARS, settings

from model import Transformer
from nanobit.tasks import arithmetic
from nanobit.tasks import text as tasks
from nanobit.tokenizer import make_tokenizer

CHAR = make_tokenizer({"kind": "char", "chars": CHARS})
PAIR = dict(
    sentence_good="a cat sits", sentence_bad="a cat sit", UID="agreement_1", linguistics_term="agreement"
)


class Bigram:
    """A model whose probabilities of the next token depend on the last one alone: {(last, next):
    probability}; the rest of each 1 is spread evenly over the other tokens."""

    def __init__(self, chances, ids, seq_len=64):
        table = torch.full((len(ids), len(ids)), float("nan"))
        for last, row in ids.items():
            given = {ids[b]: chance for (a, b), chance in chances.items() if a == last}
            table[row] = (1 - sum(given.values())) / (len(ids) - len(given))
            for column, chance in given.items():
                table[row, column] = chance
        self.logits = table.log() + 3.0  # not normalized
        self.cfg, self.embed = SimpleNamespace(seq_len=seq_len), SimpleNamespace(weight=self.logits)

    def __call__(self, idx, cache=None):
        assert idx.shape[1] <= self.cfg.seq_len
        if cache is None:
            return self.logits[idx]
        cache.length += idx.shape[1]
        return self.logits[idx][:, -1:]


def plain_score(model, ids, n):
    """Return (nats, greedy) of the last n ids, one at a time, nothing padded."""
    ids, nats, greedy = torch.tensor(ids)[-model.cfg.seq_len - 1 :], 0.0, True
    logits = model(ids[None, :-1])[0].double()
    for place in range(len(ids) - n, len(ids)):
        nats += logits[place - 1].log_softmax(-1)[ids[place]].item()
        greedy &= logits[place - 1].argmax().item() == ids[place].item()
    return nats, greedy


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@torch.no_grad()
def test_log_likelihoods_equal_a_plain_loop(batch_size):
    """Batched scores equal those of a plain loop, whatever the lengths, the padding and the batch size."""
    torch.manual_seed(0)
    model, texts = Transformer(settings(ternary=False)).eval(), []
    for length in (2, 3, 9, 9, 16, 17, 18, 40):
        ids = torch.randint(28, (length,)).tolist()
        texts += [(tuple(ids), n) for n in {1, min(length - 1, 5), min(length - 1, 16)}]
        ids[-1] = model(torch.tensor([ids[-17:-1]]))[0, -1].argmax().item()
        texts.append((tuple(ids), 1))
    found = tasks.log_likelihoods(model, texts, batch_size)
    want = [plain_score(model, *text) for text in texts]
    assert {greedy for _, greedy in want} == {False, True}
    for text, (nats, greedy) in zip(texts, want):
        assert found[text] == (pytest.approx(nats, abs=1e-4), greedy)


def test_what_is_scored_is_never_cut(capsys):
    """A text whose scored tokens do not fit the context is refused."""
    model, ids = Bigram({}, CHAR.ids, seq_len=8), tuple(CHAR.encode("\nabcdefgh"))
    assert tasks.log_likelihoods(model, [(ids, 8)], 1)[ids, 8][0] == pytest.approx(-8 * math.log(28))
    with pytest.raises(SystemExit):
        tasks.log_likelihoods(model, [(ids + ids, 9)], 1)
    assert "has 9 tokens, the model reads 8" in capsys.readouterr().err


def test_lambada_by_hand():
    """LAMBADA's accuracy and perplexity are per word, with the space, as worked out by hand."""
    model = Bigram({("a", " "): 0.5, (" ", "b"): 0.6, ("b", "c"): 0.3, ("b", "d"): 0.4}, CHAR.ids)
    texts = ["q a b", "q a bd", "q a bc"]  # the last: d is likelier
    result, lines = tasks.lambada(model, CHAR, 0, [dict(text=text) for text in texts], 2)
    nats = [math.log(0.5 * 0.6 * last) for last in (1, 0.4, 0.3)]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["n"] == 3
    assert result["perplexity"] == pytest.approx(math.exp(-sum(nats) / 3), rel=1e-6)
    assert result["tokens"] == 8
    assert result["val_loss"] == pytest.approx(-sum(nats) / 8, rel=1e-6)
    assert result["contexts_cut"] == 0
    assert len(lines) == 2


def test_lambada_tells_how_many_contexts_were_cut():
    """A context is cut on the left only if it does not fit, and the cuts are counted."""
    model = Bigram({("a", " "): 0.5}, CHAR.ids, seq_len=8)
    # what is read: the end-of-text token and the text but its last character
    for text, cut in (("xxxxa b", 0), ("xxxxxa b", 0), ("xxxxxxa b", 1), ("x" * 40 + "a b", 1)):
        result, lines = tasks.lambada(model, CHAR, 0, [dict(text=text)], 2)
        assert result["contexts_cut"] == cut
        assert len(lines) == 2 + cut
        assert result["perplexity"] == pytest.approx(28 / 0.5, rel=1e-6)


class Pieces:
    """A tokenizer whose tokens may span a space: always the longest piece that fits."""

    def __init__(self, *pieces):
        self.ids = {piece: i for i, piece in enumerate(pieces)}

    def encode(self, text):
        if not text:
            return []
        piece = max((piece for piece in self.ids if text.startswith(piece)), key=len)
        return [self.ids[piece], *self.encode(text[len(piece) :])]


def test_lambada_scores_a_token_across_the_border_with_the_word():
    """A token that spans the border between context and word is scored with the word."""
    pieces = Pieces("\n", "a", "b", " ", "c", "b c", "d")
    model = Bigram({("a", "b c"): 0.25, ("b c", "d"): 0.5, ("b", "d"): 0.9}, pieces.ids)
    result, lines = tasks.lambada(model, pieces, 0, [dict(text="ab cd")], 1)
    assert result["tokens"] == 2
    assert result["perplexity"] == pytest.approx(8, rel=1e-6)
    assert any("1 passages have a token across the border" in line for line in lines)


def pair(good, bad, paradigm, phenomenon):
    return dict(sentence_good=good, sentence_bad=bad, UID=paradigm, linguistics_term=phenomenon)


def test_blimp_by_hand():
    """BLiMP compares sums of log-likelihoods, a tie counts half, and paradigms have equal weight."""
    model = Bigram({("a", "b"): 0.5, ("\n", "z"): 0.01}, CHAR.ids)
    examples = [
        pair("ab", "ac", "one", "x"),  # right
        pair("ac", "ab", "one", "x"),  # wrong
        pair("ad", "ac", "one", "x"),  # a tie
        pair("ad", "ad", "one", "x"),  # a tie
        pair("ac", "abc", "two", "x"),  # right as a whole: the shorter; per token the other is likelier
        pair("zc", "ac", "three", "y"),  # wrong by the first token, after the end of a text
    ]
    result, lines = tasks.blimp(model, CHAR, 0, examples, 4)
    assert result["accuracy_by_paradigm"] == dict(one=0.5, two=1.0, three=0.0)
    assert result["accuracy_by_phenomenon"] == dict(x=0.75, y=0.0)
    assert result["accuracy"] == 0.5
    assert result["n"] == 6
    assert result["tokens"] == 12
    assert len(lines) == 3


def test_a_text_has_one_score_whatever_its_batch():
    """A text that occurs twice is scored once, so that equal sentences tie."""
    torch.manual_seed(0)
    model = Transformer(settings()).eval()
    examples = [pair("the same", "the same", "one", "x"), pair("a", "a longer one", "one", "x")]
    assert tasks.blimp(model, CHAR, 0, examples, 2)[0]["accuracy"] in (0.25, 0.75)
    asked = []
    model.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    tasks.blimp(model, CHAR, 0, examples, 2)
    assert sum(asked) == 3


def test_arithmetic_by_hand():
    """An answer counts only if it is right to the last character and ends there, and is counted under its
    kind."""
    chars = "\n+=0123456789"
    tokenizer = make_tokenizer({"kind": "char", "chars": chars})
    model = Bigram({("=", "1"): 0.5, ("1", "2"): 0.5, ("2", "\n"): 0.5}, tokenizer.ids)  # says 12 to all
    problems = [("5+7=", "12"), ("7+5=", "12"), ("10+2=", "12"), ("1+0=", "1"), ("10+113=", "123")]
    result, lines = arithmetic.score(model, tokenizer, 0, problems, 2)
    assert result["accuracy"] == 3 / 5
    assert result["n"] == 5
    assert result["accuracy_by_kind"] == {"+1": 2 / 3, "+2": 1.0, "+3": 0.0}
    assert "  wrong: 1+0=12, right is 1" in lines
    assert "  wrong: 10+113=12, right is 123" in lines
