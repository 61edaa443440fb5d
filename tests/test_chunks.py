"""nanobit/prepare/chunks.py: which split a text is in, rows without text, and a lost connection."""

import json
import time

import pytest

import config
from nanobit.prepare import chunks, sources


def test_a_text_stays_in_its_split():
    """The split of a text is the same in every version: what was held out is never trained on."""
    texts = ["", "a", "to be", "the cat", "12 birds", "\u65e5\u672c", "a line\n"]
    assert [text for text in texts if chunks.split_of(text, 0.5) == "train"] == ["", "to be", "a line\n"]


def test_skipped_rows_survive_a_kill(tmp_path, monkeypatch, capsys):
    """From each mark on, the rows without text are counted to the same sums, and only the first of a kind are
    shown."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 10)
    rows = ['{"text": "abcdef"}', '{"text": null}', '{"text": ""}'] * 9 + ['{"text": NaN}'] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    flags = dict(column="text", separator="", val_fraction=0.0, max_documents=0, keep_crlf=False)
    cfg = config.SimpleNamespace(**flags, max_bad_rows=24)
    streams = [sources.Files([str(tmp_path / "a.jsonl")], cfg)] * 2

    def marks(start):
        return [mark for _, mark, _ in chunks.chunks(cfg, streams, start)]

    whole = json.loads(json.dumps(marks(chunks.START)))
    assert whole[-1]["skipped"] == {"null": 24, "empty": 18}
    for n, mark in enumerate(whole, 1):
        assert marks(mark) == whole[n:]
    assert capsys.readouterr().err.count("(null)") == chunks.SHOWN
    cfg.max_bad_rows = 23
    with pytest.raises(SystemExit):
        marks(whole[5])
    assert "max_bad_rows = 23: skipped rows: 18 empty, 24 null" in capsys.readouterr().err


class Flaky:
    """A source of 40 documents that loses its connection twice, each time after a few more."""

    def __init__(self):
        self.at, self.falls = 0, [7, 23]

    def pieces(self, state):
        for self.at in range((state or 0) + 1, 41):
            if self.falls and self.at > self.falls[0]:
                self.falls.pop(0)
                raise ConnectionError("reset by peer")
            yield "train", f"document {self.at}" * 20, True, True

    def state(self):
        return self.at

    def fraction(self):
        return self.at / 40


@pytest.mark.parametrize("reader", ["chunks", "texts"])
def test_a_lost_connection_is_taken_up_again(monkeypatch, reader):
    """No document is lost or repeated when the hub is lost and comes back."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 1000)
    cfg, mark = (
        config.SimpleNamespace(max_documents=0, val_fraction=0.0),
        dict(stream=0, state=None, documents=0),
    )
    if reader == "texts":  # which a tokenizer is trained on
        found = list(chunks.texts(config.SimpleNamespace(**vars(cfg), tokenizer="char"), [Flaky()]))
    else:
        found = [piece[1] for pieces, _, _ in chunks.chunks(cfg, [Flaky()], mark) for piece in pieces]
    assert found == [f"document {i}" * 20 for i in range(1, 41)]
