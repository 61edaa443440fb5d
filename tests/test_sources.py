"""nanobit/prepare: documents of files (sources.py, formats.py) and of the hub (hub.py), and wrong input."""

import csv
import gzip
import io
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import prepare_faults
import pytest
from documents import documents_of, prepare, text_flags

from nanobit.prepare import chunks, formats, hub, sources, stream


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


def test_a_text_stays_in_its_split():
    """The split of a text is the same in every version: what was held out is never trained on."""
    texts = ["", "a", "to be", "the cat", "12 birds", "\u65e5\u672c", "a line\n"]
    assert [text for text in texts if chunks.split_of(text, 0.5) == "train"] == ["", "to be", "a line\n"]


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


def options_of(**options):
    """Return the flags of prepare/text.py that decide how files are read."""
    flags = dict(column="text", separator="", val_fraction=0.1, max_documents=0)
    return SimpleNamespace(**flags | dict(keep_crlf=False, plain_quotes=False) | options)


def of_files(paths, state=None, **options):
    """Return (pieces, the state after each) of files, read from a state on."""
    files = sources.Files([str(path) for path in paths], options_of(**options))
    found = [(piece, files.state()) for piece in files.pieces(state)]
    return [piece for piece, _ in found], [state for _, state in found]


def written(path, content):
    """Write a file with this content (bytes), packed as its ending says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        packer = pytest.importorskip("zstandard").ZstdCompressor()
        content = packer.compress(content[:20]) + packer.compress(content[20:])
    path.write_bytes(content)
    return path


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


def test_a_hub_file_that_cannot_be_read_is_a_line(tmp_path, capsys):
    """A file of the hub that datasets cannot read is one line with the way to read it."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    cfg = dict(repo=str(tmp_path), config="", column="text", revision="", max_documents=0)
    with pytest.raises(SystemExit):
        list(hub.Hub(SimpleNamespace(**cfg), "train", "").pieces(None))
    line = capsys.readouterr().err.splitlines()[-1]  # datasets logs one before it
    assert line.startswith("error: repo =")
    assert "prepare/text.py --files= reads its files" in line


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


def test_a_damaged_archive_is_one_line(tmp_path, capsys):
    """A .gz file that was not downloaded whole is one line."""
    path = written(tmp_path / "a.jsonl.gz", OBJECTS.encode())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SystemExit):
        of_files([path])
    assert "a.jsonl.gz is damaged" in capsys.readouterr().err


def test_content_decides_whether_files_have_changed(tmp_path, capsys):
    """A touched file is the same, an edited one is not, and a data set that an earlier version made (with the
    hash of sizes and times) is recognised."""
    path, folder = str(written(tmp_path / "a.txt", b"text")), str(tmp_path)
    source, stamp = stream.source_now(folder, "options", [path])
    for known in (dict(source=source, stamp=stamp), dict(source=f"options {stamp}")):
        (tmp_path / "meta.json").write_text(json.dumps(known))
        assert stream.source_now(folder, "options", [path])[0] == known["source"]
    (tmp_path / "meta.json").write_text(json.dumps(dict(source=source, stamp=stamp)))
    os.utime(path, (1, 1))
    assert stream.source_now(folder, "options", [path])[0] == source
    written(tmp_path / "a.txt", b"tex.")
    for options, expected in (("options", "the files have changed"), ("others", "holds another data set")):
        with pytest.raises(SystemExit):
            stream.source_now(folder, options, [path])
        assert expected in capsys.readouterr().err


def test_newer_flags_leave_the_source_as_it_was():
    """A data set made before a flag existed is the same data set while the flag has its default."""
    flags = dict(files=("", ""), name=("", ""), max_bad_rows=(9, ""), keep_crlf=(False, ""))
    flags |= dict(plain_quotes=(False, ""))
    cfg = SimpleNamespace(files="a.txt", name="x", max_bad_rows=3, keep_crlf=False, plain_quotes=False)
    assert stream.source_of("prepare/text.py", cfg, flags) == "prepare/text.py --files=a.txt"
    cfg.keep_crlf = True
    assert stream.source_of("prepare/text.py", cfg, flags).endswith(" --keep_crlf=True")
