"""prepare/stream.py: from documents to token files and back, killed, interrupted and continued."""

import hashlib
import json
import os
import signal
import time

import numpy as np
import pytest
from conftest import run, start
from documents import PATCH, SLOW, TIKTOKEN, documents_of, read, stopped, text_flags
from parts import sentencepiece

import config
from nanobit.prepare import sources, stream, token_files, vocab
from nanobit.tokenizer import make_tokenizer, with_content


@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece", "gpt2"])
def test_text_comes_back(corpus, tmp_path, tokenizer):
    """bugs guarded: spaces, line ends or rare characters that a tokenizer's settings change or drop; a byte
    that is no longer what it was before some tokenizers had a bos"""
    folder, documents = corpus
    flags = text_flags(folder, tmp_path, tokenizer=tokenizer, vocab_size=330)
    out, _ = run("prepare/text.py", *flags, patch=TIKTOKEN)
    found = documents_of(tmp_path / "text")
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 0 < len(found["val"]) < 60
    ids, meta, ours = read(tmp_path / "text")
    known = "dataset dtype vocab_size tokens bytes shards tokenizer eot source complete documents seconds"
    known += " revision stamp skipped"
    assert list(meta) == known.split(), "no bos: as before there was one"
    for split, row in ids.items():
        assert row == sum([[*ours.encode(text), meta["eot"]] for text in found[split]], [meta["eot"]])
    assert read(tmp_path / "text")[2].decode([60_000, 5, 60_000]) == read(tmp_path / "text")[2].decode([5])
    assert "tokens per byte" in out and f"{len(found['train'])} documents" in out
    if tokenizer != "char":
        spec = json.loads((tmp_path / "text" / "meta.json").read_text())["tokenizer"]
        with open(tmp_path / "text" / spec["file"], "ab") as file:
            file.write(b"x")
        with pytest.raises(SystemExit):  # another tokenizer under the same name would mean other text
            with_content(spec, str(tmp_path / "text"))


def test_a_tokenizer_file_with_bos_begins_each_text_with_it(corpus, tmp_path):
    """bugs guarded: texts that begin with a token which the tokenizer's own model never saw there; bos twice
    or missing where a killed preparation continues"""
    os.makedirs(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(sentencepiece()["content"])
    flags = text_flags(corpus[0], tmp_path, tokenizer=tmp_path / "llama", max_documents=60)
    stopped(flags, tmp_path / "text", 1000)
    run("prepare/text.py", *flags, patch=PATCH)
    found, meta = documents_of(tmp_path / "text"), read(tmp_path / "text")[1]
    assert (meta["bos"], meta["eot"]) == (1, 2)
    assert sorted(found["train"] + found["val"]) == sorted(corpus[1][:60])


def test_bos_is_before_the_first_piece_of_a_text_only(monkeypatch):
    """bug guarded: a long text, which is tokenized in pieces, with bos in its middle"""
    ours = make_tokenizer(sentencepiece())
    monkeypatch.setattr(stream, "PIECE_CHARS", 8)
    monkeypatch.setattr(stream, "worker", (ours, {"eot": 2, "bos": 1}, np.dtype("<u2")), raising=False)
    pieces = [("train", "the cat\nsat on", True, False), ("train", " the mat", False, True)]
    ids = stream.encode_chunk(pieces)["train"][0].tolist()
    assert (ids[0], ids[-1]) == (1, 2) and not {1, 2} & {*ids[1:-1]}
    assert ours.decode(ids[1:-1]) == "the cat\nsat on the mat"


def test_a_tokenizer_trained_here_keeps_its_layout(tmp_path):
    """bug guarded: a second data set by the tokenizer of a first one, or of an export, whose texts begin with
    another token than the first one's"""
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
    """bug guarded: a folder that is taken for a hub repository; a tokenizer.json, as of Llama 3, refused with
    words that do not say so"""
    folder = tmp_path / "llama3"
    os.makedirs(folder)
    flags = text_flags(corpus[0], tmp_path, tokenizer=folder)
    assert "the folder has no tokenizer.model; expected one" in run("prepare/text.py", *flags, code=2)[1]
    (folder / "tokenizer.json").write_text("{}")
    for name in (folder, folder / "tokenizer.json"):
        _, err = run("prepare/text.py", *text_flags(corpus[0], tmp_path, tokenizer=name), code=2)
        assert "tokenizer.json, as of Llama 3, is not supported" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, more", [("docs.jsonl", []), ("docs.parquet", ["--column=text"]), ("docs.txt", [])]
)
def test_killed_and_continued(corpus, tmp_path, name, more):
    """bug guarded: a document lost or repeated where a preparation was killed, and a shard that is counted
    twice"""
    folder, _ = corpus
    patch = PATCH + "from nanobit.prepare import formats; formats.LONGEST = 1000\n"
    run("prepare/text.py", *text_flags(folder, tmp_path / "whole", name), *more, patch=patch)
    flags = [*text_flags(folder, tmp_path / "killed", name), *more]
    place, progress, kills = tmp_path / "killed" / "text", {}, 0
    while kills < 3:
        child = start("prepare/text.py", *flags, patch=patch + SLOW)
        before, deadline = sum(progress.get("tokens", {}).values()), time.time() + 60
        while sum(progress.get("tokens", {}).values()) < before + 5000:
            assert child.poll() is None and time.time() < deadline, child.communicate()
            progress = stream.read_json(place / "progress.json")
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
        assert stream.read_json(place / "meta.json")["complete"] is False
    out, _ = run("prepare/text.py", *flags, patch=patch)
    assert "continuing after" in out
    whole = tmp_path / "whole" / "text"
    assert sorted(os.listdir(place)) == sorted(os.listdir(whole))
    for file in os.listdir(whole):
        if file.endswith(".bin"):
            assert (place / file).read_bytes() == (whole / file).read_bytes(), file
    assert len([file for file in os.listdir(whole) if file.startswith("train")]) > 3
    if name == "docs.txt":  # the parts of one document, joined without a space between
        found = documents_of(whole)
        assert found["train"][0] + found["val"][0] == "".join(corpus[1])
    assert "is complete" in run("prepare/text.py", *flags)[0]


def test_what_an_earlier_version_began_keeps_its_line_ends(tmp_path):
    """rule: a data set has one kind of line ends, that of the version that began it, and says so if it is
    another than today's"""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\r\\nb"}\n' * 20_000, encoding="utf-8")
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
    run("prepare/text.py", *flags, patch=PATCH)
    assert documents_of(place) == {"train": ["a\r\nb"] * 20_000}
    assert "is complete (an earlier version made it, with the line ends" in run("prepare/text.py", *flags)[0]


def test_hub_killed_and_continued(corpus, tmp_path):
    """bug guarded: a stream of the hub that goes on at another document than the one after the last
    written"""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    child = start("prepare/tinystories.py", *flags, patch=PATCH + SLOW)
    deadline = time.time() + 60
    while (
        stream.read_json(tmp_path / "tinystories" / "progress.json").get("tokens", {}).get("train", 0) < 9000
    ):
        assert child.poll() is None and time.time() < deadline, child.communicate()
    child.kill()
    child.communicate()
    run("prepare/tinystories.py", *flags, patch=PATCH)
    assert documents_of(tmp_path / "tinystories") == {"train": documents, "val": documents[:20]}


def test_interrupt_says_how_to_go_on(corpus, tmp_path):
    """bug guarded: Ctrl-C that ends in a traceback, or hangs on its workers"""
    child = start("prepare/text.py", *text_flags(corpus[0], tmp_path), patch=PATCH + SLOW)
    while not stream.read_json(tmp_path / "text" / "progress.json").get("tokens"):
        assert child.poll() is None, child.communicate()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and "same command continues" in err
    assert "Traceback" not in err and "leaked" not in err, err


FULL = """
from nanobit.prepare import token_files
real_write, count = token_files.Split.write, [0]
def write(self, ids):
    count[0] += 1
    if count[0] > 30:
        real_write(self, ids[:7])
        raise OSError(28, "No space left on device")
    real_write(self, ids)
token_files.Split.write = write
"""


def test_full_disk_loses_nothing(corpus, tmp_path):
    """bug guarded: a disk that fills during a preparation leaves a torn file behind, or costs what was
    written"""
    folder, _ = corpus
    run("prepare/text.py", *text_flags(folder, tmp_path / "whole"), patch=PATCH)
    flags = text_flags(folder, tmp_path / "full")
    _, err = run("prepare/text.py", *flags, patch=PATCH + FULL, code=1)
    assert "No space left" in err and "continues" in err and err.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path / "full" / "text") if ".tmp" in name]
    run("prepare/text.py", *flags, patch=PATCH)
    for name in os.listdir(tmp_path / "whole" / "text"):
        if name.endswith(".bin"):
            whole = (tmp_path / "whole" / "text" / name).read_bytes()
            assert (tmp_path / "full" / "text" / name).read_bytes() == whole


def test_disk_too_small(corpus, tmp_path):
    """bug guarded: hours of work before it turns out that the tokens do not fit"""
    patch = "import shutil; shutil.disk_usage = lambda path: type('', (), {'free': 1000})"
    _, err = run("prepare/text.py", *text_flags(corpus[0], tmp_path), patch=patch, code=1)
    assert err.startswith("error:") and "MB free" in err and not os.path.exists(tmp_path / "text")


def test_a_kill_after_a_shard_is_renamed(tmp_path, monkeypatch):
    """bug guarded: the beginning of a shard lost because it had got its name before progress.json knew of
    it; a longer file of an earlier try left behind it"""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 8)
    split = token_files.Split(str(tmp_path), "train", np.dtype("<u2"), 0)
    split.write(np.arange(21, dtype="<u2"))
    split.sync()
    split = token_files.Split(
        str(tmp_path), "train", np.dtype("<u2"), 5
    )  # as known before the first shard was full
    assert sorted(os.listdir(tmp_path)) == ["train_00000.bin.partial"]
    split.write(np.arange(5, 19, dtype="<u2"))
    split.finish()
    found = [np.fromfile(tmp_path / name, "<u2") for name in sorted(split.shards({}))]
    assert np.concatenate(found).tolist() == list(range(19)) and [part.size for part in found] == [8, 8, 3]


def test_tokens_reach_the_disk_before_the_progress_that_counts_them(corpus, tmp_path):
    """bug guarded: progress.json that survives a power cut which the tokens do not; tokens in meta.json, for
    a training to read, that a continued preparation would write again"""
    patch = (
        PATCH
        + """
import json; from nanobit import files
import os
real_fsync, real_write, synced = os.fsync, stream.write_bytes, set()
def fsync(fd): synced.add(os.readlink(f'/proc/self/fd/{fd}').split('/')[-1]); real_fsync(fd)
def write(path, content):
    names = {f'{s}_{n // 4096:05d}.bin.partial' for s, n in json.loads(content)['tokens'].items()}
    assert names <= synced, (names, synced)
    synced.clear()
    real_write(path, content)
os.fsync, stream.write_bytes = fsync, write
real_file = token_files.write_file
def write_file(path, content):
    meta, progress = json.loads(content), stream.read_json(os.path.dirname(path) + "/progress.json")
    if path.endswith("meta.json") and not meta["complete"]:
        assert (meta["tokens"], meta["shards"]) == (progress["tokens"], progress["shards"])
    real_file(path, content)
token_files.write_file = write_file
"""
    )
    run("prepare/text.py", *text_flags(corpus[0], tmp_path), patch=patch)


def test_a_mistake_costs_nothing_that_is_written(corpus, tmp_path):
    """bug guarded: a preparation of hours deleted because its files were not mounted when it was continued;
    token 0 in place of tokens that were lost; room asked for what is already there"""
    texts = tmp_path / "texts"
    os.makedirs(texts)
    (texts / "docs.jsonl").write_bytes((corpus[0] / "docs.jsonl").read_bytes())
    flags, place = text_flags(texts, tmp_path), tmp_path / "text"
    stopped(flags, place)
    os.rename(texts / "docs.jsonl", texts / "away")
    run("prepare/text.py", *flags, code=2)
    assert stream.read_json(place / "progress.json")["tokens"]
    os.rename(texts / "away", texts / "docs.jsonl")
    broken = "from nanobit import tokenizer; tokenizer.make_tokenizer = None\n"
    broken += "from nanobit.prepare import stream; stream.with_content = lambda *a: stream.fail('no')"
    _, err = run("prepare/text.py", *flags, patch=broken, code=2)
    assert "keeps what is written" in err and stream.read_json(place / "progress.json")["tokens"]
    small = "import shutil; shutil.disk_usage = lambda path: type('', (), {'free': 250_000})\n"
    run("prepare/text.py", *flags, patch=PATCH + small)
    documents_of(place)
    stopped([*flags, "--name=short"], tmp_path / "short")
    partial = sorted(name for name in os.listdir(tmp_path / "short") if name.endswith("partial"))[0]
    os.truncate(tmp_path / "short" / partial, 2)
    _, err = run("prepare/text.py", *flags, "--name=short", code=2)
    assert "has lost tokens" in err


def test_the_users_own_files_stay(corpus, tmp_path):
    """bug guarded: a failed preparation that removes what it has not made"""
    (tmp_path / "text").mkdir()
    for name in ("tokenizer.model", "train_notes.md", "val_00000.bin"):
        (tmp_path / "text" / name).write_text("mine")
    run("prepare/text.py", *text_flags(corpus[0], tmp_path, column="absent"), code=2)
    assert sorted(os.listdir(tmp_path / "text")) == ["tokenizer.model", "train_notes.md", "val_00000.bin"]


def test_one_process_at_a_time(corpus, tmp_path):
    """bug guarded: the same command given twice, two processes that cut each other's files"""
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    child = start("prepare/text.py", *flags, patch=PATCH + SLOW)
    while not stream.read_json(place / "progress.json").get("tokens"):
        assert child.poll() is None, child.communicate()
    _, err = run("prepare/text.py", *flags, code=2)
    assert "by another process" in err and not stream.read_json(place / "meta.json")["complete"]
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    documents_of(place)


def test_few_documents_make_a_data_set(tmp_path):
    """bug guarded: a first try with few documents that ends in an error after the work"""
    (tmp_path / "one.jsonl").write_text('{"body": "abc"}\n' * 3)
    out, _ = run("prepare/text.py", *text_flags(tmp_path, tmp_path, "one.jsonl"))
    assert "no document was held out" in out
    assert documents_of(tmp_path / "text") == {"train": ["abc"] * 3}


def test_no_two_sources_in_one_folder(corpus, tmp_path):
    """bug guarded: another preparation's tokens overwritten, or continued with other text"""
    flags = text_flags(corpus[0], tmp_path)
    run("prepare/text.py", *flags)
    _, err = run("prepare/text.py", *flags, "--val_fraction=0.1", code=2)
    assert "holds another data set" in err


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": 3}', '{"complete": true}'])
def test_a_meta_json_without_a_source_is_reported(tmp_path, capsys, content):
    """rule: a meta.json of something else is left in its place, and is one error line"""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "meta.json").write_text(content)
    for anew in (True, False):
        with pytest.raises(SystemExit):
            stream.source_now(str(tmp_path / "text"), "options", ())
            token_files.open_data_set(str(tmp_path), "text", "options", anew)
        err = capsys.readouterr().err
        assert "holds another data set (its meta.json names no source)" in err and err.count("\n") == 1
    assert (tmp_path / "text" / "meta.json").read_text() == content


def test_skipped_rows_survive_a_kill(tmp_path, monkeypatch, capsys):
    """rule: from each mark on, the rows without text are counted to the same sums, and only the first of a
    kind are shown"""
    monkeypatch.setattr(stream, "CHUNK_CHARS", 10)
    rows = ['{"text": "abcdef"}', '{"text": null}', '{"text": ""}'] * 9 + ['{"text": NaN}'] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    cfg = config.SimpleNamespace(val_fraction=0.0, max_bad_rows=24)
    streams = [sources.Files([str(tmp_path / "a.jsonl")], "text", "", 0.0)] * 2

    def marks(start):
        return [mark for _, mark, _ in stream.chunks(cfg, streams, start)]

    whole = json.loads(json.dumps(marks(stream.START)))
    assert whole[-1]["skipped"] == {"null": 24, "empty": 18}
    for n, mark in enumerate(whole, 1):
        assert marks(mark) == whole[n:]
    assert capsys.readouterr().err.count("(null)") == stream.SHOWN
    cfg.max_bad_rows = 23
    with pytest.raises(SystemExit):
        marks(whole[5])
    assert "max_bad_rows = 23: rows without text: 18 empty, 24 null" in capsys.readouterr().err


def test_a_small_text_gets_a_small_vocabulary(capsys):
    """rule: what is suggested is not warned of, and what is warned of is not suggested"""
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
    """bug guarded: the place of the end-of-text token among the characters read as a character"""
    tokenizer = make_tokenizer(token_files.char_tokenizer("\0ab"))
    assert tokenizer.encode("ba") == [2, 1]
    with pytest.raises(ValueError, match="it has 'ab'"):
        tokenizer.encode("a\0b")


class Flaky:
    """a source of 40 documents that loses its connection twice, each time after a few more"""

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
    """bug guarded: documents lost or repeated where the hub fell away and came back"""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(stream, "CHUNK_CHARS", 1000)
    cfg, mark = (
        config.SimpleNamespace(max_documents=0, val_fraction=0.0),
        dict(stream=0, state=None, documents=0),
    )
    if reader == "texts":  # which a tokenizer is trained on
        found = list(stream.texts(config.SimpleNamespace(**vars(cfg), tokenizer="char"), [Flaky()]))
    else:
        found = [piece[1] for pieces, _, _ in stream.chunks(cfg, [Flaky()], mark) for piece in pieces]
    assert found == [f"document {i}" * 20 for i in range(1, 41)]


@pytest.mark.parametrize("text", ["a" * 700_000, "ab " * 200_000, "\u65e5\u672c" * 150_000, "x\n" * 150_000])
def test_an_endless_line(tmp_path, text):
    """bug guarded: a text without line ends that takes a tokenizer for ever, or changes where it is cut"""
    from types import SimpleNamespace

    import sentencepiece

    cfg = SimpleNamespace(tokenizer="sentencepiece", vocab_size=380, max_documents=0, val_fraction=0.0)
    with open(__file__, encoding="utf-8") as file:
        content = vocab.train(cfg, sentencepiece, [file.read()])
    (tmp_path / "tokenizer.model").write_bytes(content)
    spec = dict(kind="sentencepiece", content=content)
    stream.start_worker.__globals__["worker"] = make_tokenizer(spec), {"eot": 2}, np.dtype("<u2")
    began = time.time()
    ids, documents, size = stream.encode_chunk([("train", text, True, True)])["train"]
    assert make_tokenizer(spec).decode(ids[:-1].tolist()) == text and ids[-1] == 2
    assert (documents, size) == (1, len(text.encode())) and time.time() - began < 20
