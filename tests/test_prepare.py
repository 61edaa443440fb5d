"""Preparations that stream: from documents to token files and back, killed and continued, and wrong input."""

import json
import os
import signal
import time

import numpy as np
import pytest
import sources
import stream
import tokens
import torch
from conftest import RUN, final, rows, run, settings, start, start_ranks, train

import checkpoint
import config
import data
from tokenizer import make_tokenizer, with_content

WORDS = (
    "the cat sat on a mat, saw 12 birds; caf\u00e9 \u65e5\u672c \U0001f600 l'\u00e9t\u00e9\tTom  said".split(
        " "
    )
)
SPACES = [" ", " ", " ", "\n", "\n\n", "  "]
PATCH = (
    "import stream, tokens; stream.SAVE_SECONDS = 0; stream.CHUNK_CHARS = 2000; tokens.SHARD_TOKENS = 4096\n"
)
SLOW = "import time, tokens; real = tokens.Split.write\n"
SLOW += "def write(self, ids): time.sleep(0.05); real(self, ids)\ntokens.Split.write = write\n"
TIKTOKEN = """
import tiktoken
ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" a": 258}
special = {"<|endoftext|>": 259}
small = tiktoken.Encoding("gpt2", pat_str=r" ?\\S+|\\s+", mergeable_ranks=ranks, special_tokens=special)
tiktoken.get_encoding = lambda name: small
"""


def texts(n=300, seed=0):
    """documents of a few hundred characters, with line ends, runs of spaces and characters of all widths"""
    rng = np.random.default_rng(seed)
    word = lambda: WORDS[rng.integers(len(WORDS))] + SPACES[rng.integers(len(SPACES))]  # noqa: E731
    return ["".join(word() for _ in range(rng.integers(20, 120))) for _ in range(n)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """a folder with the same documents as .jsonl, .parquet (also as a local hub data set) and .txt"""
    import pyarrow
    import pyarrow.parquet

    folder, documents = tmp_path_factory.mktemp("corpus"), texts()
    with open(folder / "docs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text, "n": i}) + "\n" for i, text in enumerate(documents))
    (folder / "docs.txt").write_bytes("".join(documents).encode())
    for i in range(3):
        (folder / f"part{i}.txt").write_bytes("".join(documents[100 * i : 100 * i + 100]).encode())
    (folder / "separated.txt").write_bytes("<|end|>".join(documents).encode())
    table = pyarrow.table({"text": documents, "id": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, folder / "docs.parquet", row_group_size=70)
    os.makedirs(folder / "hub" / "data")
    for split, part in (("train-00000-of-00002", table[:150]), ("train-00001-of-00002", table[150:])):
        pyarrow.parquet.write_table(part, folder / "hub" / "data" / f"{split}.parquet", row_group_size=40)
    pyarrow.parquet.write_table(table[:20], folder / "hub" / "data" / "validation-00000-of-00001.parquet")
    return folder, documents


def text_flags(folder, data_dir, files="docs.jsonl", tokenizer="char", **more):
    flags = (
        dict(files=folder / files, column="body", tokenizer=tokenizer, data_dir=data_dir, workers=1) | more
    )
    return [f"--{key}={value}" for key, value in flags.items()]


def read(folder):
    """({split: ids}, meta, tokenizer) of a data set"""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        meta = json.load(file)
    ids = {}
    for split, n in meta["tokens"].items():
        names = sorted(name for name in meta["shards"] if name.startswith(split))
        parts = [np.fromfile(os.path.join(folder, name), "<u2") for name in names]
        assert all(part.size == parts[0].size >= parts[-1].size for part in parts[:-1])
        ids[split] = np.concatenate(parts).tolist()
        assert len(ids[split]) == n
    return ids, meta, make_tokenizer(with_content(meta["tokenizer"], str(folder)))


def documents_of(folder):
    """{split: [text of each document]}, decoded"""
    ids, meta, tokenizer = read(folder)
    found = {}
    for split, row in ids.items():
        assert row[0] == meta["eot"] == row[-1]  # the end of a text stands before the first one, too
        found[split], text = [], []
        for token in row[1:]:
            if token == meta["eot"]:
                found[split].append(tokenizer.decode(text))
                text = []
            else:
                text.append(token)
        assert meta["bytes"][split] == sum(len(text.encode()) for text in found[split])
        assert meta["documents"][split] == len(found[split])
    return found


@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece", "gpt2"])
def test_text_comes_back(corpus, tmp_path, tokenizer):
    """bug guarded: spaces, line ends or rare characters that a tokenizer's settings change or drop"""
    folder, documents = corpus
    flags = text_flags(folder, tmp_path, tokenizer=tokenizer, vocab_size=330)
    out, _ = run("prepare/text.py", *flags, patch=TIKTOKEN)
    found = documents_of(tmp_path / "text")
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 0 < len(found["val"]) < 60
    assert read(tmp_path / "text")[2].decode([60_000, 5, 60_000]) == read(tmp_path / "text")[2].decode([5])
    assert "tokens per byte" in out and f"{len(found['train'])} documents" in out
    if tokenizer != "char":
        spec = json.loads((tmp_path / "text" / "meta.json").read_text())["tokenizer"]
        with open(tmp_path / "text" / spec["file"], "ab") as file:
            file.write(b"x")
        with pytest.raises(SystemExit):  # another tokenizer under the same name would mean other text
            with_content(spec, str(tmp_path / "text"))


@pytest.mark.parametrize("name", ["docs.txt", "part*.txt", "separated.txt", "docs.parquet", "*.jsonl"])
def test_every_kind_of_file(corpus, tmp_path, name):
    """bug guarded: a reader that loses the last document, or the text around the border of what is held
    out"""
    folder, documents = corpus
    flags = text_flags(folder, tmp_path, name, column="body" if "json" in name else "text")
    flags += ["--separator=<|end|>"] if name == "separated.txt" else []
    run("prepare/text.py", *flags, patch="import sources; sources.LONGEST = 1000")
    found = documents_of(tmp_path / "text")
    whole = "".join(documents)
    if name == "part*.txt":
        assert "".join(found["train"] + found["val"]) == whole and len(found["train"]) == 3
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    elif name == "docs.txt":
        assert found["train"][0] + found["val"][0] == whole and found["train"][0].endswith("\n")
        assert 0.04 < len(found["val"][0].encode()) / len(whole.encode()) < 0.06
    else:
        assert sorted(found["train"] + found["val"]) == sorted(documents)


@pytest.mark.parametrize(
    "name, more", [("docs.jsonl", []), ("docs.parquet", ["--column=text"]), ("docs.txt", [])]
)
def test_killed_and_continued(corpus, tmp_path, name, more):
    """bug guarded: a document lost or repeated where a preparation was killed, and a shard that is counted
    twice"""
    folder, _ = corpus
    patch = PATCH + "import sources; sources.LONGEST = 1000\n"
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
    assert "going on" in out
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


def test_hub_folder(corpus, tmp_path):
    """bug guarded: the hub's own val split mixed with training text, max_documents of the wrong split"""
    folder, documents = corpus
    flags = [f"--repo={folder / 'hub'}", f"--data_dir={tmp_path}", "--workers=1", "--tokenizer=char"]
    run("prepare/tinystories.py", *flags, "--max_documents=170")
    found = documents_of(tmp_path / "tinystories")
    assert found == {"train": documents[:170], "val": documents[:20]}
    run("prepare/fineweb_edu.py", *flags, "--config=", "--val_fraction=0.2", "--name=hashed")
    found = documents_of(tmp_path / "hashed")
    assert sorted(found["train"] + found["val"]) == sorted(documents) and 30 < len(found["val"]) < 90
    assert found["val"] == [text for text in documents if stream.split_of(text, 0.2) == "val"]


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
    assert child.returncode == 130 and "same command goes on" in err and "Traceback" not in err


FULL = """
import tokens
real_write, count = tokens.Split.write, [0]
def write(self, ids):
    count[0] += 1
    if count[0] > 30:
        real_write(self, ids[:7])
        raise OSError(28, "No space left on device")
    real_write(self, ids)
tokens.Split.write = write
"""


def test_full_disk_loses_nothing(corpus, tmp_path):
    """bug guarded: a disk that fills during a preparation leaves a torn file behind, or costs what was
    written"""
    folder, _ = corpus
    run("prepare/text.py", *text_flags(folder, tmp_path / "whole"), patch=PATCH)
    flags = text_flags(folder, tmp_path / "full")
    _, err = run("prepare/text.py", *flags, patch=PATCH + FULL, code=1)
    assert "No space left" in err and "goes on" in err and err.count("\n") == 1
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


BAD = {
    "latin1.txt": (b"good line\n" * 300 + b"caf\xe9\n", [], "byte 3,003 (0xe9) is not UTF-8"),
    "empty.txt": (b"", [], "no text in 1 file"),
    "list.jsonl": (b'{"body": "a"}\n[1]\n', [], "line 2 has no 'body'"),
    "torn.jsonl": (b'{"body": "a"}\n{"body": "b', [], "line 2 is not JSON"),
    "number.jsonl": (b'{"body": 3}\n', [], "is int, not text"),
    "half.jsonl": (b'{"body": "\\ud800"}\n', [], "surrogate"),
    "fake.parquet": (b"text", [], "is no parquet file"),
    "nul.txt": (b"a\0b\n" * 20, [], "NUL"),
    "vocab.txt": (b"abc\n" * 50, ["--tokenizer=sentencepiece", "--vocab_size=4000"], "vocab_size = 4000"),
    "tokenizer.txt": (b"abc\n" * 50, ["--tokenizer=gpt-2"], "tokenizer = 'gpt-2' is unknown"),
    "model.txt": (b"abc\n" * 50, ["--tokenizer={path}"], "is no SentencePiece model"),
    "binary.txt": (b"\x80" * 3000, ["--val_fraction=0.5"], "is not UTF-8"),
    "trained.jsonl": (b'{"body": "a"}\n[1]\n', ["--tokenizer=sentencepiece"], "line 2 has no 'body'"),
    "fraction.txt": (b"abc\n" * 50, ["--val_fraction=1"], "val_fraction = 1.0 must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, name):
    """bug guarded: a traceback, or half a data set left in place, for text that cannot be used"""
    content, more, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    more = [flag.format(path=tmp_path / name) for flag in more]
    _, err = run("prepare/text.py", *text_flags(tmp_path, tmp_path / "data", name), *more, code=2)
    assert expected in err and err.count("error:") == 1
    assert not os.path.exists(tmp_path / "data" / "text")


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """bug guarded: a meta.json without tokens, which training waits for, where the first document is no
    text"""
    (tmp_path / "latin1.txt").write_bytes(BAD["latin1.txt"][0])
    flags = text_flags(tmp_path, tmp_path / "data", "latin1.txt", "gpt2")
    run("prepare/text.py", *flags, patch=TIKTOKEN, code=2)
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
    """bug guarded: a traceback of the datasets library for a mistyped name"""
    flags = [f"--repo={corpus[0] / 'hub'}", f"--data_dir={tmp_path}", "--tokenizer=char", "--config="]
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
    _, err = run("prepare/fineweb_edu.py", *flags, flag, patch=offline, code=2)
    assert err.startswith("error:") and err.count("\n") == 1 and expected in err
    assert not os.path.exists(tmp_path / "fineweb_edu")


def test_a_kill_after_a_shard_is_renamed(tmp_path, monkeypatch):
    """bug guarded: the beginning of a shard lost because it had got its name before progress.json knew of
    it; a longer file of an earlier try left behind it"""
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 8)
    split = tokens.Split(str(tmp_path), "train", np.dtype("<u2"), 0)
    split.write(np.arange(21, dtype="<u2"))
    split.sync()
    split = tokens.Split(
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
import files, json
import os
real_fsync, real_write, synced = os.fsync, stream.write_bytes, set()
def fsync(fd): synced.add(os.readlink(f'/proc/self/fd/{fd}').split('/')[-1]); real_fsync(fd)
def write(path, content):
    names = {f'{s}_{n // 4096:05d}.bin.partial' for s, n in json.loads(content)['tokens'].items()}
    assert names <= synced, (names, synced)
    synced.clear()
    real_write(path, content)
os.fsync, stream.write_bytes = fsync, write
real_file = tokens.write_file
def write_file(path, content):
    meta, progress = json.loads(content), stream.read_json(os.path.dirname(path) + "/progress.json")
    if path.endswith("meta.json") and not meta["complete"]:
        assert (meta["tokens"], meta["shards"]) == (progress["tokens"], progress["shards"])
    real_file(path, content)
tokens.write_file = write_file
"""
    )
    run("prepare/text.py", *text_flags(corpus[0], tmp_path), patch=patch)


def stopped(flags, place, tokens_written=3000):
    """a preparation killed when so many tokens were known to be written"""
    child, deadline = start("prepare/text.py", *flags, patch=PATCH + SLOW), time.time() + 60
    while (
        sum((progress := stream.read_json(place / "progress.json")).get("tokens", {}).values())
        < tokens_written
    ):
        assert child.poll() is None and time.time() < deadline, child.communicate()
    child.kill()
    child.communicate()
    return progress


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
    broken = "import tokenizer; tokenizer.make_tokenizer = None\n"
    broken += "import stream; stream.with_content = lambda *a: stream.fail('no')"
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


def test_the_network_is_not_the_users_mistake():
    """bug guarded: a dead hub told as a file that is not there"""
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert sources.is_network(LocalEntryNotFoundError("offline"))
    assert sources.is_network(ConnectionError("refused"))
    assert not sources.is_network(FileNotFoundError("x")) and not sources.is_network(ValueError("http"))


def test_a_hub_that_fails_once_is_asked_again(monkeypatch):
    """bug guarded: a preparation that ends because one answer was 503, or that waits for what is not there"""

    class HfHubHTTPError(OSError):  # as huggingface_hub names and derives them
        pass

    class RepositoryNotFoundError(HfHubHTTPError):
        pass

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    answers = [HfHubHTTPError("503"), "found"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert sources.patiently(call) == "found"
    answers[:] = [RepositoryNotFoundError("404, private or gated"), "asked again"]
    with pytest.raises(RepositoryNotFoundError):
        sources.patiently(call)
    assert answers == ["asked again"]


def test_no_two_sources_in_one_folder(corpus, tmp_path):
    """bug guarded: another preparation's tokens overwritten, or continued with other text"""
    flags = text_flags(corpus[0], tmp_path)
    run("prepare/text.py", *flags)
    _, err = run("prepare/text.py", *flags, "--val_fraction=0.1", code=2)
    assert "holds another data set" in err


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
    import vocab

    cfg = SimpleNamespace(tokenizer="sentencepiece", vocab_size=380, max_documents=0, val_fraction=0.0)
    with open(__file__, encoding="utf-8") as file:
        content = vocab.train(cfg, sentencepiece, [file.read()])
    (tmp_path / "tokenizer.model").write_bytes(content)
    spec = dict(kind="sentencepiece", content=content)
    stream.start_worker.__globals__["worker"] = make_tokenizer(spec), 2, np.dtype("<u2")
    began = time.time()
    ids, documents, size = stream.encode_chunk([("train", text, True, True)])["train"]
    assert make_tokenizer(spec).decode(ids[:-1].tolist()) == text and ids[-1] == 2
    assert (documents, size) == (1, len(text.encode())) and time.time() - began < 20


def test_endless_line_in_a_file(tmp_path, capsys):
    """bug guarded: a file of one line is read into memory as a whole, or torn inside a character"""
    path = str(tmp_path / "endless.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("a" + "\u65e5" * 1_500_000)
    pieces = list(sources.Files([path], "text", "", 0.1).pieces(None))
    assert "".join(text for _, text, _, _ in pieces) == "a" + "\u65e5" * 1_500_000
    assert max(len(text.encode()) for _, text, _, _ in pieces) <= sources.LONGEST
    assert [(first, last) for _, _, first, last in pieces][0] == (True, False)
    assert capsys.readouterr().out.count("warning") == 1


HOLD = """
import os, time, tokens
real = tokens.Split.write
def write(self, ids):
    while not os.path.exists({!r}): time.sleep(0.01)
    real(self, ids)
tokens.Split.write = write
"""


def started(flags, place, patch=SLOW):
    """a preparation that holds its lock"""
    child, deadline = start("prepare/text.py", *flags, patch=PATCH + patch), time.time() + 60
    while not data.is_being_written(place):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.01)
    return child


def test_batches_read_while_the_preparation_writes(corpus, tmp_path, monkeypatch):
    """bug guarded: other batches beside a preparation that writes, is killed and goes on, than after it; a
    shard listed before it is whole, or taken back"""
    real = time.sleep
    monkeypatch.setattr(data.time, "sleep", lambda seconds: real(seconds / 50))
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    cfg = settings(
        data_dir=tmp_path, dataset="text", vocab_size=0, tokenize_on_fly=True, seq_len=64, eval_tokens=640
    )
    child = started(flags, place)
    meta, cpu, told, batches, seen = data.meta(cfg), torch.device("cpu"), [], [], []
    w = data.Windows(cfg, meta, "train")
    val = [x for x, _ in data.Windows(cfg, meta, "val").fixed(640, 4, cpu)]
    kill = True
    while w.total is None or len(batches) * 40 < w.total + 40:
        if fault := w.wait_for(len(batches) * 40 + 39, say=told.append):
            assert not kill and child.wait() == -signal.SIGKILL and "prepare/text.py --files" in fault
            child = started(flags, place)
            continue
        batches.append(w.batch(len(batches) * 40, 40, cpu))
        seen.append(w.ready)
        if kill and w.ready > 4 * 63:
            child.kill()
            child.wait()
            kill = False
    assert child.wait(60) == 0 and not kill and "waiting" in told[0] and len({*seen}) > 4
    cfg.tokenize_on_fly = False
    after = data.Windows(cfg, data.meta(cfg), "train")
    for i, batch in enumerate(batches):
        assert torch.equal(torch.stack(batch), torch.stack(after.batch(i * 40, 40, cpu))), i
    cfg.tokenize_on_fly = True
    later = data.Windows(cfg, data.meta(cfg), "val").fixed(640, 4, cpu)
    assert torch.equal(torch.cat(val), torch.cat([x for x, _ in later]))
    assert data.same_tokens(data.digest(meta), data.digest(data.meta(cfg)))


def test_train_beside_a_preparation_that_dies_and_goes_on(corpus, tmp_path):
    """bugs guarded: a run on the fly that ends with other weights, or that has lost its steps where the
    preparation died; ranks that do not wait together; Ctrl-C that waits for tokens"""
    flags, place = text_flags(corpus[0], tmp_path), tmp_path / "text"
    of = dict(dataset="text", vocab_size=0, batch_size=30, max_steps=12, eval_every=4, tokenize_on_fly=True)
    of |= dict(save_every=0, sample_every=0, total_batch_size=960)
    stopped(flags, place, 10_000)  # two shards
    _, err = train(tmp_path, tmp_path / "runs", "fly", code=1, **of)
    assert "error:" in err and "prepare/text.py --files" in err and "--resume=auto" in err
    assert checkpoint.steps(tmp_path / "runs" / "fly")[0] > 0, "what was trained is saved"
    child = started(flags, place, HOLD.format(str(tmp_path / "go")))
    more = dict(data_dir=tmp_path, out_dir=tmp_path / "runs", run_id="fly", resume="auto")
    for is_last in (False, True):
        first, second = start_ranks(2, **RUN | of | more)
        while "waiting for more train tokens" not in "".join(first.told()):
            assert not first.ended(), first.wait(0)
            time.sleep(0.01)
        if not is_last:
            second.kill(signal.SIGINT)
            code, _, err = first.wait(60)
            assert code == second.wait(60)[0] == 130 and "stopped by signal 2, saved step" in err, err
    (tmp_path / "go").touch()
    code, _, err = first.wait(60)
    assert code == 0 and "going on" in err and second.wait(60) == (0, "", "") and child.wait(60) == 0, err
    train(tmp_path, tmp_path / "runs", "after", **of)
    fly, after = (final(tmp_path / "runs" / name, 12) for name in ("fly", "after"))
    assert all(torch.equal(fly[0][key], after[0][key]) for key in after[0])
    fly, after = (
        [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows(tmp_path / "runs" / name)]
        for name in ("fly", "after")
    )
    assert fly == after
