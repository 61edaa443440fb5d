"""Conversations for the tests, their preparation by prepare/chat.py, and what it has written."""

import hashlib
import json
import os

import numpy as np
from documents import prepare
from parts import llama_like, part_of, sentencepiece, tiktoken
from test_chat import CHAR, talk

from nanobit.export import hf, tokenizer_files
from nanobit.files import read_json
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


MANY = [dict(messages=m) for m in talks(30)]
