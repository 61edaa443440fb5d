"""prepare/chat.py: from conversations to windows with masks, killed and continued, and what is refused."""

import gzip
import hashlib
import json
import os

import numpy as np
import prepare_faults
import pytest
from conftest import run
from documents import Preparation, prepare
from parts import llama_like, part_of, sentencepiece, tiktoken
from test_chat import CHAR, talk

from nanobit import chat
from nanobit.export import hf, tokenizer_files
from nanobit.files import read_json
from nanobit.prepare import conversations, token_files
from nanobit.tokenizer import bos_of, make_tokenizer

KINDS = dict(char=lambda: CHAR, sentencepiece=sentencepiece, llama=llama_like, tiktoken=tiktoken)
WINDOW = 128


def talks(n=150, seed=0):
    """Return n conversations of one to four turns, all different, some longer than a window."""
    rng = np.random.default_rng(seed)

    def words():
        return " ".join(rng.choice(["the", "cat", "sat", "12", "a\nb"], rng.integers(1, 12)))

    made = []
    for i in range(n):
        texts = [words() for _ in range(2 * rng.integers(1, 5))]
        made.append(talk(f"{i} {texts[0]}", *texts[1:], system="be brief" * (i % 7 == 0)))
    return made


def write_rows(path, rows):
    """Write rows, each an object or a line (bytes), as a .jsonl file; return its path."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def model(folder, kind="char", **changes):
    """Write an export of a model without training; return its folder."""
    spec = dict(KINDS[kind](), **changes)
    content = spec.get("content", spec.get("chars", "").encode())
    spec["sha256"] = hashlib.sha256(content).hexdigest()
    if "content" in spec:
        spec["file"] = tokenizer_files.CONTENT[spec["kind"]]
    out = str(folder / f"model_{kind}")
    hf.write(part_of(spec, vocab_size=make_tokenizer(spec).size, n_layer=1, seq_len=WINDOW), out)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {kind of tokenizer: the folder of a model with it}."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: model(folder, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return the path of a file of conversations."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [dict(messages=m) for m in talks()])


def chat_flags(files, ckpt, data_dir, **more):
    values = dict(files=files, ckpt=ckpt, data_dir=data_dir, workers=1) | more
    return [f"--{key}={value}" for key, value in values.items()]


def prepare_chat(*args, code=0, patch="", **more):
    """Run prepare/chat.py in this process; return (stdout, stderr)."""
    return prepare(*chat_flags(*args, **more), script="chat", code=code, patch=patch)


def windows_of(folder):
    """Return ({split: (ids, mask) of its windows, each (W, window)}, meta); check what all shards share."""
    meta = read_json(os.path.join(folder, "meta.json"))
    found = {}
    for split, n in meta["tokens"].items():
        parts = []
        names = sorted(name for name in meta["shards"] if name.startswith(split))
        for name in names:
            ids = np.fromfile(os.path.join(folder, name), "<u2")
            path = os.path.join(folder, name.replace(".bin", ".mask"))
            mask = np.fromfile(path, np.uint8)
            assert hashlib.sha256(mask).hexdigest() == meta["shards"][name]["mask_sha256"]
            assert len(ids) == len(mask) == meta["shards"][name]["tokens"]
            assert len(ids) % meta["window"] == 1
            assert (ids[-1], mask[-1]) == (meta["eot"], 0)
            parts.append([array[:-1].reshape(-1, meta["window"]) for array in (ids, mask)])
        found[split] = [np.concatenate(arrays) for arrays in zip(*parts)]
        ids, mask = found[split]
        assert ids.size + len(names) == n
        assert set(ids[:, 0]) == {bos_of(meta)}
        assert not mask[:, 0].any()
        assert mask.any(axis=1).all()
        assert mask.sum() == meta["counted"][split]
    return found, meta


def conversations_in(windows, expected):
    """Return which of the expected [(ids, mask)] lie in windows, each as often as it does; nothing else may,
    but for end-of-text tokens of mask 0 at the end of a window."""
    keys = {(*ids, *mask): i for i, (ids, mask) in enumerate(expected)}
    lengths = sorted({len(ids) for ids, _ in expected}, reverse=True)
    found = []
    for ids, mask in zip(*windows):
        start = 0
        while start < len(ids):
            for n in lengths:
                number = keys.get((*ids[start : start + n], *mask[start : start + n]))
                if number is not None:
                    found.append(number)
                    start += n
                    break
            else:
                assert len({*ids[start:]}) == 1
                assert not mask[start:].any()
                break
    return sorted(found)


def cut(ids, mask, eot):
    """Return (ids, mask) up to the last whole answer that fits in a window, or None."""
    ends = [i + 1 for i in range(1, len(ids)) if ids[i] == eot and mask[i] and i < WINDOW]
    return (ids[: ends[-1]], mask[: ends[-1]]) if ends else None


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_come_back(kind, models, rows, tmp_path):
    """Each conversation is in one window, whole or up to its last answer that fits, with its mask."""
    out, _ = prepare_chat(rows, models[kind], tmp_path, val_fraction=0.2, patch=prepare_faults.small())
    windows, meta = windows_of(tmp_path / "chat")
    spec = KINDS[kind]()
    tokenizer = make_tokenizer(spec)
    encoded = [chat.encode(tokenizer, spec, messages) for messages in talks()]
    fitting = [cut(ids, mask, spec["eot"]) for ids, mask in encoded]
    expected = [part for part in fitting if part]
    found = {split: conversations_in(arrays, expected) for split, arrays in windows.items()}
    assert sorted(found["train"] + found["val"]) == list(range(len(expected)))
    assert {split: len(numbers) for split, numbers in found.items()} == meta["documents"]
    assert 0.1 < len(found["val"]) / len(expected) < 0.3
    assert meta.get("skipped", {}).get("too long", 0) == fitting.count(None)
    shortened = sum(part is not None and part[0] != ids for part, (ids, _) in zip(fitting, encoded))
    assert meta["cut"] == shortened > 0
    assert f"{shortened} conversations end after the last whole answer" in out
    assert meta["window"] == WINDOW
    assert meta["tokenizer"]["chat"] == chat.FORMAT
    assert len(meta["shards"]) > 3


def test_the_bytes_are_those_of_answers(models, tmp_path):
    """meta.json counts the bytes of answers, for bits per byte, without their first space."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=talk("a", "bc", "d", "efg", system="h"))])
    prepare_chat(path, models["char"], tmp_path, val_fraction=0)
    _, meta = windows_of(tmp_path / "chat")
    assert meta["bytes"] == {"train": 5}
    assert meta["counted"] == {"train": 5 + 2 * 2}  # the spaces and the ends


def test_the_bytes_of_a_cut_conversation_are_those_that_fit(models, tmp_path):
    """The bytes of answers that are cut off do not count."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=talk("a", "bc", "d", "e" * 500))])
    prepare_chat(path, models["char"], tmp_path, val_fraction=0)
    _, meta = windows_of(tmp_path / "chat")
    assert meta["bytes"] == {"train": 2}


@pytest.mark.parametrize("has_workers", [False, True])
def test_killed_and_continued(has_workers, models, rows, tmp_path):
    """A preparation that is killed again and again writes the same bytes as one that is not."""
    copies = [dict(messages=m) for m in talks() + talks(40)] + [b"{}"]
    path = write_rows(tmp_path / "rows.jsonl", copies)
    patch = prepare_faults.small()
    prepare_chat(path, models["sentencepiece"], tmp_path / "whole", patch=patch)
    flags = chat_flags(path, models["sentencepiece"], tmp_path / "killed")
    place, whole = tmp_path / "killed" / "chat", tmp_path / "whole" / "chat"
    written = 0
    for _ in range(1 if has_workers else 2):
        hold = prepare_faults.hold_at(written + 3000)
        child = Preparation(flags, place, patch + hold, script="chat", has_workers=has_workers)
        child.until(lambda: child.written() >= written + 1500)  # noqa: B023
        child.kill()
        written = child.written()
        assert not os.path.exists(place / "meta.json")
    out, _ = prepare(*flags, script="chat", patch=patch)
    assert "continuing after" in out
    assert "skipped rows: 40 duplicate, 1 malformed" in out
    names = sorted(os.listdir(whole))
    assert names == sorted(os.listdir(place))
    assert sum(name.endswith(".mask") for name in names) > 2
    for name in names:
        if name != "meta.json":
            assert (place / name).read_bytes() == (whole / name).read_bytes(), name
    metas = [read_json(folder / "meta.json") | dict(seconds=0) for folder in (place, whole)]
    assert metas[0] == metas[1]
    assert "is complete" in prepare(*flags, script="chat")[0]


@pytest.mark.parametrize("n_windows", [1, 2, 3, 4])
def test_the_end_can_be_repeated(n_windows, tmp_path, monkeypatch):
    """The token after the last window is written once, though a preparation is killed after it is counted."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 10)  # two windows of 4 and a token
    progress = dict(window=4, vocab_size=20, eot=7, shards={}, masks={})
    ids = np.arange(4 * n_windows, dtype="<u2").reshape(-1, 4)
    split = conversations.MaskedSplit(str(tmp_path), "train", 0, progress)
    split.write(ids, np.ones(ids.shape, np.uint8))
    split.end_shard()
    split.sync()
    again = conversations.MaskedSplit(str(tmp_path), "train", split.n, progress)
    again.end_shard()
    again.finish()
    n_shards = -(-n_windows // 2)
    assert again.n == split.n == 4 * n_windows + n_shards
    assert sorted(progress["shards"]) == [f"train_{i:05d}.bin" for i in range(n_shards)]
    assert sorted(os.listdir(tmp_path)) == sorted([*progress["shards"], *progress["masks"]])
    for i, name in enumerate(sorted(progress["shards"])):
        expected = [*ids[2 * i : 2 * i + 2].ravel(), 7]
        assert np.fromfile(tmp_path / name, "<u2").tolist() == expected
        mask = np.fromfile(tmp_path / name.replace(".bin", ".mask"), np.uint8)
        assert mask.tolist() == [1] * (len(expected) - 1) + [0]


def test_a_preparation_that_fails_leaves_no_file(models, tmp_path):
    """A preparation that ends before a token is known to be on the disk leaves no token file and no mask."""
    path = write_rows(tmp_path / "a.jsonl", [dict(messages=m) for m in talks(40)])
    patch = prepare_faults.small() + prepare_faults.full_disk(after=1)
    _, err = prepare_chat(path, models["char"], tmp_path / "data", patch=patch, code=1)
    assert "No space left" in err
    assert not os.path.exists(tmp_path / "data" / "chat")


MANY = [dict(messages=m) for m in talks(30)]
BAD = {
    "no role": (dict(messages=[dict(content="a")]), "message 1 is not an object with role and content"),
    "two users": (dict(messages=talk("a") + talk("b", "c")), "message 2 has the role 'user', expected"),
    "no answer": (dict(messages=talk("a")), "no answer"),
    "empty answer": (dict(prompt="a", completion=" "), "message 2 (assistant) is empty"),
    "other form": (dict(text="a story"), "a row has text; expected"),
    "half a pair": (
        b'{"prompt": "a", "completion": "\\ud83d"}',
        "message 2 (assistant) has half a surrogate pair",
    ),
    "NUL": (b'{"prompt": "a\\u0000b", "completion": "c"}', "message 1 (user) has a NUL character"),
    "not JSON": (b'{"prompt": "a", ', "not JSON"),
    "a list": (b'["a", "b"]', "a row is list"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "a"}', "not JSON"),
}


@pytest.mark.parametrize("row, says", BAD.values(), ids=BAD)
def test_malformed_rows_are_named(row, says, models, tmp_path):
    """A row that is not a conversation is skipped, counted, and named by file and line with the reason."""
    path = write_rows(tmp_path / "a.jsonl", [*MANY, row])
    out, err = prepare_chat(path, models["char"], tmp_path)
    assert f"skipped: line {len(MANY) + 1} of {path}: {says}" in err
    assert "(malformed)" in err
    assert "skipped rows: 1 malformed" in out
    assert read_json(tmp_path / "chat" / "meta.json")["skipped"]["malformed"] == 1


def test_a_skipped_row_is_a_short_line(models, tmp_path):
    """A row is named in a line of a bounded length, whatever it holds."""
    long = dict(messages=[dict(role="x" * 10_000, content="a")])
    _, err = prepare_chat(write_rows(tmp_path / "a.jsonl", [*MANY, long]), models["char"], tmp_path)
    assert "has the role 'xxx" in err
    assert max(map(len, err.splitlines())) < 500


def test_what_is_skipped_has_a_limit(models, tmp_path):
    """More malformed and duplicate rows than max_bad_rows end a preparation; empty and long ones do not."""
    long = dict(messages=talk("a" * WINDOW, "b"))
    path = write_rows(tmp_path / "a.jsonl", [*MANY, *MANY[:2], b"{}", b"", b"", long, long | dict(id=2)])
    out, err = prepare_chat(path, models["char"], tmp_path / "data", max_bad_rows=4)
    assert f"skipped: line {len(MANY) + 1} of {path} (duplicate)" in err
    assert "skipped rows: 3 duplicate, 2 empty, 1 malformed" in out
    _, err = prepare_chat(path, models["char"], tmp_path, max_bad_rows=2, code=2)
    assert "error: max_bad_rows = 2: skipped rows: 2 duplicate, 1 malformed" in err
    assert "or allow more with --max_bad_rows=" in err
    assert "--column" not in err
    assert not os.path.exists(tmp_path / "chat")


def test_letters_that_the_tokenizer_lacks_are_counted(models, tmp_path):
    """A conversation with a character that a tokenizer of characters lacks is skipped, up to the limit."""
    path = write_rows(
        tmp_path / "a.jsonl", [*MANY, *(dict(prompt=f"{i} \u00e9", completion="a") for i in range(3))]
    )
    out, err = prepare_chat(path, models["char"], tmp_path / "data")
    assert "the tokenizer has no character" in err
    assert "skipped rows: 3 not encoded" in out
    assert "max_bad_rows = 2" in prepare_chat(path, models["char"], tmp_path, max_bad_rows=2, code=2)[1]


def test_the_limit_is_for_all_kinds_together(models, tmp_path):
    """Rows that are not conversations, and rows of letters that the tokenizer lacks, have one limit."""
    lacking = [dict(prompt=f"{i} \u00e9", completion="a") for i in range(2)]
    path = write_rows(tmp_path / "a.jsonl", [*MANY, b"{}", *lacking])
    prepare_chat(path, models["char"], tmp_path / "data", max_bad_rows=3)
    _, err = prepare_chat(path, models["char"], tmp_path, max_bad_rows=2, code=2)
    assert "max_bad_rows = 2: skipped rows: 1 malformed, 2 not encoded" in err


def test_held_out_files(models, tmp_path):
    """Files of val_files are held out whole, even if files names them too; copies of their rows are not
    trained on."""
    write_rows(tmp_path / "a.jsonl", MANY)
    write_rows(tmp_path / "b.jsonl", [*MANY[:3], dict(prompt="new", completion="one")])
    held_out = f"{tmp_path}/../{tmp_path.name}/b.jsonl"  # not as files writes it
    flags = dict(val_files=held_out, data_dir=tmp_path / "data")
    out, err = prepare_chat(tmp_path / "*.jsonl", models["char"], **flags)
    windows, meta = windows_of(tmp_path / "data" / "chat")
    tokenizer = make_tokenizer(CHAR)
    rows = [chat.messages_of(row) for row in [*MANY, dict(prompt="new", completion="one")]]
    parts = [cut(*chat.encode(tokenizer, CHAR, messages), CHAR["eot"]) for messages in rows]
    short = [i for i, part in enumerate(parts) if part]
    numbers = {
        split: conversations_in(arrays, [parts[i] for i in short]) for split, arrays in windows.items()
    }
    assert [short[i] for i in numbers["val"]] == [i for i in short if i < 3 or i == len(MANY)]
    assert [short[i] for i in numbers["train"]] == [i for i in short if 3 <= i < len(MANY)]
    assert meta["skipped"]["duplicate"] == 3
    assert f"line 1 of {tmp_path / 'a.jsonl'} (duplicate)" in err


def test_copies_are_on_one_side(models, tmp_path):
    """Which conversations are held out depends on their text alone, not on their place."""
    splits = []
    for name, rows in (("a", MANY), ("b", MANY[::-1])):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        prepare_chat(path, models["char"], tmp_path / name, val_fraction=0.3)
        splits.append(read_json(tmp_path / name / "chat" / "meta.json"))
    assert splits[0]["documents"] == splits[1]["documents"]
    assert splits[0]["counted"] == splits[1]["counted"]


def test_packed_files(models, tmp_path):
    """A compressed file, or one with a byte order mark, gives what the file itself does."""
    path = write_rows(tmp_path / "a.jsonl", MANY)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    data = tmp_path / "data"
    for name in ("a.jsonl", "b.jsonl.gz"):
        prepare_chat(tmp_path / name, models["char"], data, name=name)
    shards = [read_json(data / name / "meta.json")["shards"] for name in ("a.jsonl", "b.jsonl.gz")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    "content, says",
    [
        (
            "Once upon a time\nthere was a cat.\n",
            "is 'Once upon a time'; expected one JSON object a line; plain",
        ),
        ('[\n {"prompt": "a", "completion": "b"}\n]\n', "of a JSON array: jq -c '.[]'"),
        ('\n{\n "prompt": "a",\n "completion": "b"\n}\n', "of objects on several lines: jq -c . FILE"),
        ("a\0b", "is not text: byte 1 is NUL"),
    ],
)
def test_files_of_another_kind(content, says, models, tmp_path):
    """A file that does not hold one object a line is refused in one line, with what to do."""
    (tmp_path / "a.txt").write_text(content)
    _, err = prepare_chat(tmp_path / "a.txt", models["char"], tmp_path, code=2)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not os.path.exists(tmp_path / "chat")


def test_a_context_shorter_than_a_turn(models, tmp_path):
    """If no conversation fits in a window, that is the reason in the error."""
    path = write_rows(tmp_path / "a.jsonl", [dict(prompt="a" * 200, completion="b")])
    _, err = prepare_chat(path, models["char"], tmp_path / "data", val_fraction=0, code=2)
    assert f"skipped: line 1 of {path}: its first turn has 221 tokens (too long)" in err
    assert "no text is left to train on; skipped rows: 1 too long; a window of 128 tokens" in err
    assert not os.path.exists(tmp_path / "data" / "chat")


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(window=129), "window = 129: expected 2 to 128, the context of ckpt"),
        (dict(window=1), "window = 1: expected 2 to 128"),
        (dict(val_files="nothing.jsonl"), "files = 'nothing.jsonl' matches no file"),
        (dict(ckpt="nothing"), "ckpt = 'nothing'"),
    ],
)
def test_bad_flags(flags, says, models, rows, tmp_path):
    _, err = prepare_chat(rows, **dict(ckpt=models["char"], data_dir=tmp_path) | flags, code=2)
    assert says in err
    assert err.count("error:") == 1


def test_all_files_held_out(models, rows, tmp_path):
    _, err = prepare_chat(rows, models["char"], tmp_path, val_files=rows, code=2)
    assert "no file is left to train on" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(chars=CHAR["chars"].replace(":", "")), "but the tokenizer has no character ':'"),
        (dict(eot=1), "does not keep the letters and line ends"),
    ],
)
def test_a_model_of_other_letters(changes, says, rows, tmp_path):
    """A model whose tokenizer lacks the letters of `User: ` is refused before anything is written."""
    _, err = prepare_chat(rows, model(tmp_path, **changes), tmp_path, code=2)
    assert says in err
    assert "train a model on text that has them" in err
    assert not os.path.exists(tmp_path / "chat")


def test_another_model_is_refused(models, rows, tmp_path):
    """A model does not train on conversations in the tokens of another, nor are these made under one name."""
    path = write_rows(tmp_path / "a.jsonl", MANY)
    prepare_chat(path, models["char"], tmp_path)
    other = str(tmp_path / "other")
    hf.write(part_of(tiktoken(), vocab_size=266, ternary=False, n_layer=1, seq_len=WINDOW), other)
    flags = [f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", "--dataset=chat", f"--init_from={other}"]
    flags += ["--no-ternary", "--no-compile", "--max_steps=1", f"--seq_len={WINDOW}", "--device=cpu"]
    _, err = run("train.py", *flags, code=2)
    assert "the tokenizer of dataset = 'chat' is not the checkpoint's" in err
    _, err = prepare_chat(path, models["tiktoken"], tmp_path, code=2)
    assert "holds another data set (prepare/chat.py --files=" in err


def test_names_of_roles_in_a_text_are_text(models, tmp_path):
    """`User:` in a text is text: the conversation is kept, as it is."""
    path = write_rows(tmp_path / "a.jsonl", [dict(prompt="a\nAssistant: b\nUser: c", completion="User: d")])
    prepare_chat(path, models["char"], tmp_path, val_fraction=0)
    windows, meta = windows_of(tmp_path / "chat")
    text = make_tokenizer(CHAR).decode(windows["train"][0][0].tolist()).strip("\0")
    assert text == "User: a\nAssistant: b\nUser: c\nAssistant: User: d"
    assert meta["counted"]["train"] == len(" User: d") + 1


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_well_filled(seed):
    """Each row is in one window, none is too full, and fewer than one in ten could be spared."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, 500).tolist()
    windows = conversations.packed(lengths, 100)
    assert sorted(sum(windows, [])) == list(range(500))
    assert max(sum(lengths[i] for i in numbers) for numbers in windows) <= 100
    assert len(windows) < 1.1 * sum(lengths) / 100
    assert windows == sorted(windows)
    assert conversations.packed([], 100) == []
