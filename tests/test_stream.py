"""nanobit/prepare/stream.py: from documents to token files and back, killed, interrupted and continued."""

import hashlib
import json
import os
import signal
import time

import numpy as np
import prepare_faults
import pytest
from conftest import run
from documents import Preparation, documents_of, prepare, read, stopped, text_flags
from parts import sentencepiece

import config
from nanobit.prepare import chunks, sources, stream, token_files, vocab, workers
from nanobit.tokenizer import make_tokenizer, with_content


@pytest.fixture(scope="module", params=["char", "sentencepiece", "gpt2"])
def prepared(request, corpus, tmp_path_factory):
    """Return (the folder of a data set made with one of the tokenizers, stdout)."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = text_flags(corpus[0], folder, tokenizer=request.param, vocab_size=330)
    return folder / "text", prepare(*flags, patch=prepare_faults.small_tiktoken())[0]


def test_text_comes_back(corpus, prepared):
    """The decoded documents are the texts that were read, whatever line ends, spaces and rare characters."""
    folder, out = prepared
    found = documents_of(folder)
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1])
    assert 0 < len(found["val"]) < 60
    assert "tokens per byte" in out
    assert f"{len(found['train'])} documents" in out


def test_meta_json_stays_as_it_was(prepared):
    """A data set without bos has the fields, and the end-of-text token before and after each text, as when
    no tokenizer had a bos."""
    ids, meta, tokenizer = read(prepared[0])
    known = "dataset dtype vocab_size tokens bytes shards tokenizer eot source complete documents seconds"
    known += " revision stamp skipped"
    assert list(meta) == known.split()
    for split, texts in documents_of(prepared[0]).items():
        rows = [[*tokenizer.encode(text), meta["eot"]] for text in texts]
        assert ids[split] == sum(rows, [meta["eot"]])


def test_ids_beyond_the_vocabulary_stand_for_nothing(prepared):
    tokenizer = read(prepared[0])[2]
    assert tokenizer.decode([60_000, 5, 60_000]) == tokenizer.decode([5])


@pytest.mark.parametrize("prepared", ["sentencepiece", "gpt2"], indirect=True)
def test_another_tokenizer_under_the_same_name_is_refused(prepared, tmp_path):
    """The tokenizer's file is compared with the sha256 in meta.json: another one would mean other text."""
    spec = read(prepared[0])[1]["tokenizer"]
    (tmp_path / spec["file"]).write_bytes((prepared[0] / spec["file"]).read_bytes() + b"x")
    with pytest.raises(SystemExit):
        with_content(spec, str(tmp_path))


def test_a_tokenizer_file_with_bos_begins_each_text_with_it(corpus, tmp_path):
    """Each text begins with bos, once, also where a killed preparation continues."""
    os.makedirs(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(sentencepiece()["content"])
    flags = text_flags(corpus[0], tmp_path, tokenizer=tmp_path / "llama", max_documents=60)
    stopped(flags, tmp_path / "text", 1000)
    prepare(*flags, patch=prepare_faults.small())
    found, meta = documents_of(tmp_path / "text"), read(tmp_path / "text")[1]
    assert (meta["bos"], meta["eot"]) == (1, 2)
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1][:60])


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


def test_a_tokenizer_trained_here_keeps_its_layout(tmp_path):
    """A second data set by the tokenizer of a first one, or of an export, begins its texts with the same
    token."""
    content = sentencepiece()["content"]
    sha256, path = hashlib.sha256(content).hexdigest(), tmp_path / "tokenizer.model"
    path.write_bytes(content)
    cfg = config.SimpleNamespace(tokenizer=str(path))
    for entry, marks in (
        ({}, {"eot": 2, "bos": 1}),
        ({"eot": 2}, {"eot": 2}),
        ({"eot": 2, "bos": 7}, {"eot": 2, "bos": 7}),
    ):
        spec = {"kind": "sentencepiece", "sha256": sha256}
        for name, beside in (
            ("meta.json", {"tokenizer": spec} | entry),
            ("config.json", {"nanobit": {"tokenizer": spec | entry}}),
        ):
            (tmp_path / name).write_text(json.dumps(beside))
            assert vocab.sentencepiece(cfg, str(path), [])[2] == marks
            (tmp_path / name).unlink()
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": {"sha256": "another"}, "eot": 2}))
    assert vocab.sentencepiece(cfg, str(path), [])[2] == {"eot": 2, "bos": 1}


def test_a_folder_without_a_sentencepiece_model(corpus, tmp_path):
    """A folder without a tokenizer.model is not taken for a hub repository, and a tokenizer.json is named as
    not supported."""
    folder = tmp_path / "llama3"
    os.makedirs(folder)
    flags = text_flags(corpus[0], tmp_path, tokenizer=folder)
    assert "the folder has no tokenizer.model; expected one" in prepare(*flags, code=2)[1]
    (folder / "tokenizer.json").write_text("{}")
    for name in (folder, folder / "tokenizer.json"):
        _, err = prepare(*text_flags(corpus[0], tmp_path, tokenizer=name), code=2)
        assert "tokenizer.json, as of Llama 3, is not supported" in err
        assert err.count("\n") == 1


def same_shards(one, other):
    """Check that two data sets have the same token files; return their names."""
    names = sorted(name for name in os.listdir(one) if name.endswith(".bin"))
    assert names == sorted(name for name in os.listdir(other) if name.endswith(".bin"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names


@pytest.mark.parametrize(
    "name, has_workers", [("docs.jsonl", True), ("docs.parquet", False), ("docs.txt", False)]
)
def test_killed_and_continued(corpus, tmp_path, name, has_workers):
    """A preparation that is killed again and again writes the same bytes as one that is not."""
    folder, _ = corpus
    more = dict(files=name, column="text" if "parquet" in name else "body")
    patch = prepare_faults.small(longest=1000)
    prepare(*text_flags(folder, tmp_path / "whole", **more), patch=patch)
    flags = text_flags(folder, tmp_path / "killed", **more)
    place, whole = tmp_path / "killed" / "text", tmp_path / "whole" / "text"
    written = 0
    for _ in range(3):
        child = Preparation(
            flags, place, patch + prepare_faults.hold_at(written + 7000), has_workers=has_workers
        )
        child.until(lambda: child.written() >= written + 3000)  # noqa: B023
        child.kill()
        written = child.written()
        assert stream.read_json(place / "meta.json")["complete"] is False
    out, _ = prepare(*flags, patch=patch)
    assert "continuing after" in out
    assert sorted(os.listdir(place)) == sorted(os.listdir(whole))
    assert len([file for file in same_shards(place, whole) if file.startswith("train")]) > 3
    if name == "docs.txt":  # the parts of one document, joined without a space between
        found = documents_of(whole)
        assert found["train"][0] + found["val"][0] == "".join(corpus[1])
    assert "is complete" in prepare(*flags)[0]


def test_what_an_earlier_version_began_keeps_its_line_ends(tmp_path):
    """A data set has one kind of line ends, that of the version that began it, and reports it if it is
    another than today's."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\r\\nb"}\n' * 10_000, encoding="utf-8")
    flags = text_flags(tmp_path, tmp_path, "a.jsonl", column="text", val_fraction=0)
    place = tmp_path / "text"
    before = sum(stopped([*flags, "--keep_crlf"], place, 1000)["tokens"].values())
    stamp = sources.stamp([str(tmp_path / "a.jsonl")])
    for name in ("progress.json", "meta.json"):  # as that version wrote them
        found = stream.read_json(place / name)
        source = found["source"].replace(" --keep_crlf=True", "").rpartition(" ")[0]
        found["source"] = f"{source} {stamp}"
        del found["stamp"]
        (place / name).write_text(json.dumps(found))
    stopped(flags, place, before + 5000)
    prepare(*flags, patch=prepare_faults.small())
    assert documents_of(place) == {"train": ["a\r\nb"] * 10_000}
    assert "is complete (an earlier version made it, with the line ends" in prepare(*flags)[0]


def test_hub_killed_and_continued(corpus, tmp_path):
    """A stream of the hub continues at the document after the last one written."""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    child = Preparation(flags, tmp_path / "tinystories", prepare_faults.hold_at(12_000), script="tinystories")
    child.until(lambda: child.written() >= 13_000)
    child.kill()
    prepare(*flags, script="tinystories", patch=prepare_faults.small())
    assert documents_of(tmp_path / "tinystories") == {"train": documents, "val": documents[:20]}


def test_interrupt_reports_how_to_continue(corpus, tmp_path):
    """Ctrl-C ends a preparation and its workers with exit code 130 and without a traceback."""
    flags = text_flags(corpus[0], tmp_path)
    child = Preparation(flags, tmp_path / "text", prepare_faults.slow_writes(), has_workers=True)
    child.until(child.written)
    code, _, err = child.kill(signal.SIGINT)
    assert code == 130
    assert "same command continues" in err
    assert "Traceback" not in err
    assert "leaked" not in err, err


def test_full_disk_loses_nothing(corpus, tmp_path):
    """A disk that fills leaves no torn file, and costs nothing that was written."""
    folder, _ = corpus
    prepare(*text_flags(folder, tmp_path / "whole"), patch=prepare_faults.small())
    flags = text_flags(folder, tmp_path / "full")
    _, err = prepare(*flags, patch=prepare_faults.small() + prepare_faults.full_disk(after=30), code=1)
    assert "No space left" in err
    assert "continues" in err
    assert err.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path / "full" / "text") if ".tmp" in name]
    prepare(*flags, patch=prepare_faults.small())
    same_shards(tmp_path / "whole" / "text", tmp_path / "full" / "text")


def test_a_full_disk_ends_the_workers(corpus, tmp_path):
    """With worker processes, too, a full disk is one line, and the program ends."""
    flags = text_flags(corpus[0], tmp_path, workers=2)
    _, err = run(
        "prepare/text.py", *flags, code=1, patch=prepare_faults.small() + prepare_faults.full_disk(after=3)
    )
    assert "No space left" in err
    assert err.count("\n") == 1


def test_disk_too_small(corpus, tmp_path):
    """A disk on which the tokens do not fit is reported before the work."""
    _, err = prepare(*text_flags(corpus[0], tmp_path), patch=prepare_faults.free_bytes(1000), code=1)
    assert err.startswith("error:")
    assert "MB free" in err
    assert not os.path.exists(tmp_path / "text")


def test_a_kill_after_a_shard_is_renamed(tmp_path, monkeypatch):
    """A shard that was renamed before progress.json counted it is continued from what is counted; longer
    files of an earlier try are removed."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 8)
    split = token_files.Split(str(tmp_path), "train", np.dtype("<u2"), 0, {})
    split.write(np.arange(21, dtype="<u2"))
    split.sync()
    # as known before the first shard was full
    split = token_files.Split(str(tmp_path), "train", np.dtype("<u2"), 5, {})
    assert sorted(os.listdir(tmp_path)) == ["train_00000.bin.partial"]
    split.write(np.arange(5, 19, dtype="<u2"))
    split.finish()
    found = [np.fromfile(tmp_path / name, "<u2") for name in sorted(split.shards)]
    assert np.concatenate(found).tolist() == list(range(19))
    assert [part.size for part in found] == [8, 8, 3]


def test_tokens_reach_the_disk_before_the_progress_that_counts_them(corpus, tmp_path):
    """Tokens are flushed before progress.json counts them, and meta.json, which a training may read, lists
    only what is counted there: a continued preparation never takes it back."""
    _, err = prepare(
        *text_flags(corpus[0], tmp_path), patch=prepare_faults.small() + prepare_faults.check_order_on_disk()
    )
    assert err.count("checked") > 10


@pytest.fixture
def half(corpus, tmp_path):
    """Return (flags, folder) of a preparation that was killed; its text is in tmp_path/texts."""
    os.makedirs(tmp_path / "texts")
    (tmp_path / "texts" / "docs.jsonl").write_bytes((corpus[0] / "docs.jsonl").read_bytes())
    flags = text_flags(tmp_path / "texts", tmp_path)
    stopped(flags, tmp_path / "text")
    return flags, tmp_path / "text"


def test_missing_files_cost_nothing_that_is_written(half, tmp_path):
    """A preparation whose files are missing (not mounted) when it continues keeps what it has written."""
    flags, place = half
    os.rename(tmp_path / "texts" / "docs.jsonl", tmp_path / "texts" / "away")
    prepare(*flags, code=2)
    assert stream.read_json(place / "progress.json")["tokens"]


def test_a_mistake_costs_nothing_that_is_written(half):
    """An error with exit code 2 keeps what is written, and says so."""
    flags, place = half
    _, err = prepare(*flags, patch=prepare_faults.no_tokenizer(), code=2)
    assert "keeps what is written" in err
    assert stream.read_json(place / "progress.json")["tokens"]


def test_a_continued_preparation_needs_room_for_the_rest_only(half):
    flags, place = half
    prepare(*flags, patch=prepare_faults.small() + prepare_faults.free_bytes(250_000))
    documents_of(place)


def test_lost_tokens_are_reported(half):
    """Tokens that progress.json counts and that are missing are not replaced by token 0."""
    flags, place = half
    counted = stream.read_json(place / "progress.json")["tokens"]
    split, n = next((split, n) for split, n in counted.items() if n % 4096)  # SHARD_TOKENS of these tests
    for shard in place.glob(f"{split}_{n // 4096:05d}.bin*"):
        os.truncate(shard, 0)
    _, err = prepare(*flags, code=2)
    assert "has lost tokens" in err


def test_the_users_own_files_stay(corpus, tmp_path):
    """A failed preparation removes only what it has made."""
    (tmp_path / "text").mkdir()
    for name in ("tokenizer.model", "train_notes.md", "val_00000.bin"):
        (tmp_path / "text" / name).write_text("mine")
    prepare(*text_flags(corpus[0], tmp_path, column="absent"), code=2)
    assert sorted(os.listdir(tmp_path / "text")) == ["tokenizer.model", "train_notes.md", "val_00000.bin"]


def test_one_process_at_a_time(corpus, tmp_path):
    """The same command given twice is refused while the first one runs, which is not disturbed."""
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    go = tmp_path / "go"
    child = Preparation(flags, place, prepare_faults.hold_writes(str(go)), has_workers=True)
    child.until((place / "progress.json").exists)
    _, err = prepare(*flags, code=2)
    assert "by another process" in err
    assert not stream.read_json(place / "meta.json").get("complete")
    go.touch()
    code, _, err = child.wait()
    assert code == 0, err
    documents_of(place)


def test_few_documents_make_a_data_set(tmp_path):
    """Few documents make a data set without a val split, with a warning."""
    (tmp_path / "one.jsonl").write_text('{"body": "abc"}\n' * 3)
    out, _ = prepare(*text_flags(tmp_path, tmp_path, "one.jsonl"))
    assert "no document was held out" in out
    assert documents_of(tmp_path / "text") == {"train": ["abc"] * 3}


def test_no_two_sources_in_one_folder(corpus, tmp_path):
    """A folder is neither overwritten nor continued with other text."""
    flags = text_flags(corpus[0], tmp_path)
    prepare(*flags)
    _, err = prepare(*flags, "--val_fraction=0.1", code=2)
    assert "holds another data set" in err


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": 3}', '{"complete": true}'])
def test_a_meta_json_without_a_source_is_reported(tmp_path, capsys, content):
    """A meta.json of something else is left in its place, and is one error line."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "meta.json").write_text(content)
    for start_over in (True, False):
        with pytest.raises(SystemExit):
            stream.source_now(str(tmp_path / "text"), "options", ())
            token_files.open_data_set(str(tmp_path), "text", "options", start_over)
        err = capsys.readouterr().err
        assert "holds another data set (its meta.json names no source)" in err
        assert err.count("\n") == 1
    assert (tmp_path / "text" / "meta.json").read_text() == content


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


def test_a_small_text_gets_a_small_vocabulary(capsys):
    """What is suggested is not warned of, and what is warned of is not suggested."""
    assert [vocab.suited(size) for size in (0, 50_000, 110_000, 10**7)] == [
        "--tokenizer=char",
        "--tokenizer=char",
        "--vocab_size=512",
        "--vocab_size=32768",
    ]
    vocab.warn_if_large(512, 110_000 // 3, 110_000)
    assert not capsys.readouterr().out
    vocab.warn_if_large(4096, 8409, 30_000)
    assert "each 2.1 times on average; --tokenizer=char" in capsys.readouterr().out


def test_a_nul_in_a_prompt_is_not_the_end_of_a_text():
    """A NUL is not a character, although its place in the characters is that of the end-of-text token."""
    tokenizer = make_tokenizer(token_files.char_tokenizer("\0ab"))
    assert tokenizer.encode("ba") == [2, 1]
    with pytest.raises(ValueError, match="it has 'ab'"):
        tokenizer.encode("a\0b")


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


@pytest.mark.parametrize("text", ["a" * 700_000, "ab " * 200_000, "\u65e5\u672c" * 150_000, "x\n" * 150_000])
def test_an_endless_line(tmp_path, text):
    """A text without line ends is tokenized in a time that grows with its length, and comes back
    unchanged."""
    from types import SimpleNamespace

    import sentencepiece

    cfg = SimpleNamespace(tokenizer="sentencepiece", vocab_size=380, max_documents=0, val_fraction=0.0)
    with open(__file__, encoding="utf-8") as file:
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
