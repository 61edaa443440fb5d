"""nanobit/prepare/formats.py: the documents of every format of file, from any state on, and damaged ones."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from text_files import of_files, written

from nanobit.prepare import formats, hub

ROWS = ["a b\r\nc", "", "caf\u00e9", 'x, "y"\nz', " \n", "\u65e5\u672c", "\r", "last"]
TABLE = io.StringIO(newline="")
csv.writer(TABLE).writerows([["id", "text"], *enumerate(ROWS), ["short row"], []])
OBJECTS = "\r\n".join(json.dumps({"text": text}) for text in [*ROWS, None, float("nan"), "\ud800", "end"])
CONTENTS = {
    "whole.txt": "\ufeff" + "one\r\n\r\ntwo words\rthree\n" * 40,
    "whole.txt.gz": "one\r\n\r\ntwo words\rthree\n" * 40,
    "endless.txt": "\u65e5" * 90 + "\r\n" + "a b" * 50,
    "parts.txt": "\ufeffone\r\n\r\n\r\ntwo\n\nth\u00e9\r\rfour\r\n",
    "parts.txt.gz": "one\r\n\r\n\r\ntwo\n\nth\u00e9\r\rfour\r\n",
    "rows.jsonl": OBJECTS,
    "rows.jsonl.gz": OBJECTS,
    "rows.jsonl.zst": OBJECTS,
    "rows.csv": "\ufeff" + TABLE.getvalue(),
    "rows.tsv.gz": TABLE.getvalue().replace(",", "\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_file_continues_from_each_of_its_states(tmp_path, monkeypatch, name):
    """What is read from a state on is what would have been read without a stop, of all formats."""
    monkeypatch.setattr(formats, "LONGEST", 16)
    path = written(tmp_path / name, CONTENTS[name].encode())
    options = dict(separator="\\n\\n" if name.startswith("parts") else "")
    pieces, states = of_files([path, path], **options)
    assert len(pieces) > 7
    for n, state in enumerate(json.loads(json.dumps(states)), 1):
        assert of_files([path, path], state, **options)[0] == pieces[n:]


@pytest.mark.parametrize("name", CONTENTS)
def test_line_ends_become_newlines(tmp_path, monkeypatch, name):
    """A text with the line ends of Windows or old Macs is the same text, unless they are kept."""
    path = written(tmp_path / name, CONTENTS[name].encode())
    separator = "\\n\\n" if name.startswith("parts") else ""

    def texts(**more):
        pieces, _ = of_files([path], separator=separator, **more)
        return [text for split, text, _, _ in pieces if split is not None]

    kept = texts(keep_crlf=True)
    assert any("\r" in text for text in kept)
    for longest in range(4, 30):  # wherever a file is cut into blocks
        monkeypatch.setattr(formats, "LONGEST", longest)
        assert not any("\r" in text or "\ufeff" in text for text in texts())
        if not separator:
            unified = [text.replace("\r\n", "\n").replace("\r", "\n") for text in kept]
            assert "".join(texts()) == "".join(unified)


def test_a_separator_of_line_ends_matches_them_all(tmp_path, monkeypatch):
    """'\\n\\n' ends a document in a text of any line ends, wherever blocks of the file are cut."""
    monkeypatch.setattr(formats, "LONGEST", 5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(["a", "b", "\r", "\n", "\r\n", "\r\n\r\n"], 30))
        path = written(tmp_path / "a.txt", text.encode())
        found = [text for _, text, _, _ in of_files([path], separator="\\n\\n")[0]]
        parts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
        assert found == [part for part in parts if part.strip()]


def test_rows_without_text_are_said_with_file_and_line(tmp_path):
    """A null, a NaN, an empty text and half a surrogate pair are no documents, in any format."""
    path = written(tmp_path / "rows.jsonl", OBJECTS.encode())
    bad = {place.split()[1]: why for split, why, place, _ in of_files([path])[0] if split is None}
    assert bad == {"2": "empty", "5": "empty", "7": "empty"} | {
        "9": "null",
        "10": "null",
        "11": "half a surrogate pair",
    }
    table = written(tmp_path / "rows.csv", TABLE.getvalue().encode())
    bad = [(why, place.split()[1]) for split, why, place, _ in of_files([table])[0] if split is None]
    assert bad == [("empty", "4"), ("empty", "9"), ("empty", "11"), ("null", "13")]


UNQUOTED = 'id\ttext\n1\t"Hello, he said\n2\tplain two\n3\tplain three\n4\t{}\n'


@pytest.mark.parametrize(
    "last", ['the "end" of', 'the "end"', 'ends with a quote"', "no other quote", '"a" b']
)
def test_a_quote_without_its_other_half_joins_no_rows(tmp_path, capsys, last):
    """A .tsv file whose quotes are characters is refused in a line that names --plain_quotes, with which each
    line is a row."""
    path = written(tmp_path / "a.tsv", UNQUOTED.format(last).encode())
    with pytest.raises(SystemExit):
        of_files([path])
    err = capsys.readouterr().err
    assert "a.tsv: the row at line 2 cannot be read" in err
    assert "--plain_quotes" in err
    texts = [text for _, text, _, _ in of_files([path], plain_quotes=True)[0]]
    assert texts == ['"Hello, he said', "plain two", "plain three", last]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_of_pandas_is_read_with_its_quotes(tmp_path, name):
    """Quoted cells, of several lines and with delimiters too, are the texts that were written."""
    texts = ['"Hello", he said', "one\ntwo", 'a\tb, "c"\nd', "plain", "x\ty"]
    table = io.StringIO(newline="")
    rows = [("id", "text", "more"), *((n, text, "z") for n, text in enumerate(texts))]
    csv.writer(table, delimiter="," if name == "a.csv" else "\t", lineterminator="\n").writerows(rows)
    path = written(tmp_path / name, table.getvalue().encode())
    assert [text for _, text, _, _ in of_files([path])[0]] == texts
    path = written(tmp_path / f"one_{name}", b'text\n"one\ntwo"\n')
    assert [text for _, text, _, _ in of_files([path])[0]] == ["one\ntwo"]


def not_utf8(path):
    """Write a .parquet file whose second of three texts is not UTF-8."""
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"first", b"a\xed\xa0\x80b", b"third"])
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())})
    pyarrow.parquet.write_table(table, path)


def test_a_text_that_is_not_utf8_in_parquet(tmp_path):
    """A text that is not UTF-8 is skipped in files and on the hub, and the rows after it are read."""
    not_utf8(tmp_path / "train-00000-of-00001.parquet")
    pieces, _ = of_files([tmp_path / "train-00000-of-00001.parquet"])
    assert [text for _, text, _, _ in pieces] == ["first", "not UTF-8", "third"]
    cfg = dict(repo=str(tmp_path), config="", column="text", revision="", max_documents=0)
    source = hub.Hub(SimpleNamespace(**cfg), "train", "")
    found = [(piece, source.state()) for piece in source.pieces(None)]
    assert [text for (_, text, _, _), _ in found] == ["first", "not UTF-8", "third"]
    assert [piece for piece, _ in found][1:] == list(source.pieces(found[0][1]))


def test_a_damaged_archive_is_one_line(tmp_path, capsys):
    """A .gz file that was not downloaded whole is one line."""
    path = written(tmp_path / "a.jsonl.gz", OBJECTS.encode())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SystemExit):
        of_files([path])
    assert "a.jsonl.gz is damaged" in capsys.readouterr().err
