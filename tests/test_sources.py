"""nanobit/prepare/sources.py: which files are found and refused, and which of their text is held out."""

import os

import prepare_faults
import pytest
from documents import documents_of, prepare, text_flags
from text_files import of_files, options_of, written

from nanobit.prepare import formats, sources


@pytest.mark.parametrize("name", ["docs.txt", "part*.txt", "separated.txt", "docs.parquet", "*.jsonl"])
def test_every_kind_of_file(corpus, tmp_path, name):
    """All documents of a file come back, whatever its format, also around the border of what is held out."""
    folder, documents = corpus
    flags = text_flags(folder, tmp_path, name, column="body" if "json" in name else "text")
    flags += ["--separator=<|end|>"] if name == "separated.txt" else []
    prepare(*flags, patch=prepare_faults.small(longest=1000))
    found = documents_of(tmp_path / "text")
    whole = "".join(documents)
    if name == "part*.txt":
        assert "".join(found["train"] + found["val"]) == whole
        assert len(found["train"]) == 3
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    elif name == "docs.txt":
        assert found["train"][0] + found["val"][0] == whole
        assert found["train"][0].endswith("\n")
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    else:
        assert sorted(found["train"] + found["val"]) == sorted(documents)


BAD = {
    "latin1.txt": (b"good line\n" * 300 + b"caf\xe9\n", [], "byte 3,003 (0xe9) is not UTF-8"),
    "empty.txt": (b"", [], "no text in 1 file"),
    "list.jsonl": (b'{"body": "a"}\n[1]\n', [], "line 2 has no column 'body'"),
    "torn.jsonl": (b'{"body": "a"}\n{"body": "b', [], "line 2 is not JSON"),
    "number.jsonl": (b'{"body": 3}\n', [], "is int, not text"),
    "half.jsonl": (b'{"body": "\\ud800"}\n', [], "surrogate"),
    "fake.parquet": (b"text", [], "is not a parquet file"),
    "nul.txt": (b"a\0b\n" * 20, [], "NUL"),
    "vocab.txt": (b"abc\n" * 50, ["--tokenizer=sentencepiece", "--vocab_size=4000"], "vocab_size = 4000"),
    "huge.txt": (
        b"abc\n" * 50,
        ["--tokenizer=sentencepiece", "--vocab_size=1e18"],
        "vocab_size = 1" + 18 * "0",
    ),
    "tokenizer.txt": (b"abc\n" * 50, ["--tokenizer=gpt-2"], "tokenizer = 'gpt-2' is unknown"),
    "model.txt": (b"abc\n" * 50, ["--tokenizer={path}"], "is not a SentencePiece model"),
    "binary.txt": (b"\x80" * 3000, ["--val_fraction=0.5"], "is not UTF-8"),
    "trained.jsonl": (b'{"body": "a"}\n[1]\n', ["--tokenizer=sentencepiece"], "line 2 has no column 'body'"),
    "utf16.txt": ("text\n".encode("utf-16"), [], "iconv -f UTF-16"),
    "plain16.txt": ("text\n".encode("utf-16-le"), [], "is not text: byte 1 is NUL"),
    "archive.zip": (b"PK\x03\x04\x14\x00\x00\x00", [], "is a Word, Excel or .zip file, not text"),
    "book.pdf": (b"%PDF-1.5\n%\xd0\xd4", [], "is a PDF file, not text; save its text as a .txt file first"),
    "fake.jsonl.gz": (b'{"body": "a"}\n', [], "is damaged, or not a .gz file"),
    "packed.parquet.gz": (b"PAR1", [], "unpack it first"),
    "other.csv": (b"id,title\n1,a\n", [], "has no column 'body', but id, title"),
    "quote.csv": (b'id,body\n1,a\0b\n2,"caf\xe9"\n', [], "is NUL"),
    "latin1.csv": (b"id,body\n1,a\n2,caf\xe9\n", [], "byte 17 (0xe9) is not UTF-8"),
    "nulls.jsonl": (b'{"body": null}\n' * 5, ["--max_bad_rows=3"], "max_bad_rows = 3: skipped rows"),
    "one.txt": (b"one document", ["--separator=@@", "--val_fraction=0.9999"], "was left to train on of 1"),
    "fraction.txt": (b"abc\n" * 50, ["--val_fraction=1"], "val_fraction = 1.0 must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, name):
    """Text that cannot be used is one error line, and no file of a data set stays."""
    content, more, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    more = [flag.format(path=tmp_path / name) for flag in more]
    _, err = prepare(*text_flags(tmp_path, tmp_path / "data", name), *more, code=2)
    assert expected in err
    assert err.count("error:") == 1
    assert not os.path.exists(tmp_path / "data" / "text")


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """A first document that is not text leaves no meta.json, for which a training would wait."""
    (tmp_path / "latin1.txt").write_bytes(BAD["latin1.txt"][0])
    flags = text_flags(tmp_path, tmp_path / "data", "latin1.txt", "gpt2")
    prepare(*flags, patch=prepare_faults.small_tiktoken(), code=2)
    assert not os.path.exists(tmp_path / "data" / "text")


def test_endless_line_in_a_file(tmp_path, capsys):
    """A file of one line is read in parts, and never cut inside a character."""
    path = str(tmp_path / "endless.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("a" + "\u65e5" * 1_500_000)
    pieces = list(sources.Files([path], options_of()).pieces(None))
    assert "".join(text for _, text, _, _ in pieces) == "a" + "\u65e5" * 1_500_000
    assert max(len(text.encode()) for _, text, _, _ in pieces) <= formats.LONGEST
    assert [(first, last) for _, _, first, last in pieces][0] == (True, False)
    assert capsys.readouterr().err.count("warning") == 1


def test_a_file_is_named_literally_before_it_is_a_pattern(tmp_path):
    """An existing file, or one in an existing folder, is found whatever characters its name has."""
    (tmp_path / "a[1]").mkdir()
    for name in ("a1.txt", "a[1].txt", "a[1]/b.txt"):
        (tmp_path / name).write_text("text")

    def found(pattern):
        return [os.path.relpath(path, tmp_path) for path in sources.find(str(tmp_path / pattern))]

    assert found("a[1].txt") == ["a[1].txt"]
    assert found("a[1]/*.txt") == [os.path.join("a[1]", "b.txt")]
    assert found("a[0-9].txt") == ["a1.txt"]


def test_max_documents_counts_all_kinds_of_files(tmp_path):
    """Whole texts count as much as rows do; those after the last row that is read count too."""
    rows = written(tmp_path / "b.jsonl", b'{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n')
    paths = [written(tmp_path / f"{name}.txt", name.encode()) for name in "acd"]
    paths = sorted([*paths, rows])

    def read(n):
        return [text for _, text, _, _ in of_files(paths, max_documents=n, val_fraction=0)[0]]

    assert read(2) == ["a", "c"]
    assert read(4) == ["a", "1", "c", "d"]
    paths.append(written(tmp_path / "e.jsonl", b"not read\n"))
    assert read(2) == ["a", "c"]
    paths.pop()
    assert read(0) == read(6) == read(9) == ["a", "1", "2", "3", "c", "d"]


def test_progress_is_not_whole_before_the_last_text(tmp_path):
    """With max_documents the rows may end before the texts do: then the share that is read is below 1."""
    rows = written(tmp_path / "a.jsonl", b'{"text": "1"}\n')
    text = written(tmp_path / "b.txt", b"a text that is longer than the row\n")
    files = sources.Files([str(rows), str(text)], options_of(max_documents=2, val_fraction=0))
    shares = [files.fraction() for _ in files.pieces(None)]
    assert 0 < shares[0] < 0.5
    assert shares[-1] == 1


@pytest.mark.parametrize("text", ["one line without an end", "first\nlast", "\u65e5" * 40])
def test_the_end_of_one_line_is_held_out(tmp_path, text):
    """A text of few lines has a validation part, of whole words or characters."""
    path = written(tmp_path / "a.txt", text.encode())
    pieces, _ = of_files([path], val_fraction=0.3)
    assert [split for split, _, _, _ in pieces] == ["train", "val"]
    assert "".join(piece for _, piece, _, _ in pieces) == text
    assert {(first, last) for _, _, first, last in pieces} == {(True, True)}


def test_a_separator_that_never_occurs_is_reported(tmp_path, monkeypatch, capsys):
    """A warning, which no text gets that has the separator, even over the edge of a block."""
    monkeypatch.setattr(formats, "LONGEST", 5)
    path = str(written(tmp_path / "a.txt", b"abc\r\n\r\nd"))
    sources.warn_of_separator([path], "\\n\\n", False)
    assert not capsys.readouterr().out
    sources.warn_of_separator([path], "\\n\\n", True)
    assert "'\\\\n\\\\n' does not occur in" in capsys.readouterr().out
