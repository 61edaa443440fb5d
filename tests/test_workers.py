"""nanobit/prepare/workers.py: the tokens of long texts, made in pieces, and how worker processes end."""

import time

import numpy as np
import prepare_faults
import pytest
from conftest import run
from documents import text_flags
from parts import sentencepiece

from nanobit.prepare import vocab, workers
from nanobit.tokenizer import make_tokenizer


def test_bos_is_before_the_first_piece_of_a_text_only(monkeypatch):
    """A long text that is tokenized in pieces has bos at its beginning only."""
    ours = make_tokenizer(sentencepiece())
    monkeypatch.setattr(workers, "PIECE_CHARS", 8)
    monkeypatch.setattr(workers, "worker", (ours, {"eot": 2, "bos": 1}, np.dtype("<u2")), raising=False)
    pieces = [("train", "the cat\nsat on", True, False), ("train", " the mat", False, True)]
    ids = workers.encode_chunk(pieces)["train"][0].tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {1, 2} & {*ids[1:-1]}
    assert ours.decode(ids[1:-1]) == "the cat\nsat on the mat"


@pytest.mark.parametrize("text", ["a" * 700_000, "ab " * 200_000, "\u65e5\u672c" * 150_000, "x\n" * 150_000])
def test_an_endless_line(tmp_path, text):
    """A text without line ends is tokenized in a time that grows with its length, and comes back
    unchanged."""
    from types import SimpleNamespace

    import sentencepiece

    cfg = SimpleNamespace(tokenizer="sentencepiece", vocab_size=380, max_documents=0, val_fraction=0.0)
    with open(vocab.__file__, encoding="utf-8") as file:
        content = vocab.train(cfg, sentencepiece, [file.read()])
    (tmp_path / "tokenizer.model").write_bytes(content)
    spec = dict(kind="sentencepiece", content=content, eot=2)
    workers.load(spec, "<u2")
    began = time.time()
    ids, documents, size = workers.encode_chunk([("train", text, True, True)])["train"]
    assert make_tokenizer(spec).decode(ids[:-1].tolist()) == text
    assert ids[-1] == 2
    assert (documents, size) == (1, len(text.encode()))
    assert time.time() - began < 20


def test_a_full_disk_ends_the_workers(corpus, tmp_path):
    """With worker processes, too, a full disk is one line, and the program ends."""
    flags = text_flags(corpus[0], tmp_path, workers=2)
    _, err = run(
        "prepare/text.py", *flags, code=1, patch=prepare_faults.small() + prepare_faults.full_disk(after=3)
    )
    assert "No space left" in err
    assert err.count("\n") == 1
