"""Documents for the tests of preparations, and what became of them."""

import json
import os
import time

import numpy as np
from conftest import start

from nanobit import data
from nanobit.prepare import stream
from nanobit.tokenizer import bos_of, make_tokenizer, with_content

WORDS = (
    "the cat sat on a mat, saw 12 birds; caf\u00e9 \u65e5\u672c \U0001f600 l'\u00e9t\u00e9\tTom  said".split(
        " "
    )
)
SPACES = [" ", " ", " ", "\n", "\n\n", "  "]
PATCH = (
    "from nanobit.prepare import stream, token_files\n"
    "stream.SAVE_SECONDS = 0; stream.CHUNK_CHARS = 2000; token_files.SHARD_TOKENS = 4096\n"
)
SLOW = "import time; from nanobit.prepare import token_files as tokens; real = tokens.Split.write\n"
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
        begins = [meta["bos"]] if "bos" in meta else []
        # without bos the end of a text stands before the first one, too
        assert row[0] == bos_of(meta) and row[-1] == meta["eot"]
        found[split], text = [], []
        for token in row if begins else row[1:]:
            if token == meta["eot"]:
                assert text[: len(begins)] == begins and not set(text[len(begins) :]) & {*begins}
                found[split].append(tokenizer.decode(text))
                text = []
            else:
                text.append(token)
        assert meta["bytes"][split] == sum(len(text.encode()) for text in found[split])
        assert meta["documents"][split] == len(found[split])
    return found


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


def started(flags, place, patch=SLOW):
    """a preparation that holds its lock"""
    child, deadline = start("prepare/text.py", *flags, patch=PATCH + patch), time.time() + 60
    while not data.is_being_written(place):
        assert child.poll() is None and time.time() < deadline, child.communicate()
        time.sleep(0.01)
    return child
