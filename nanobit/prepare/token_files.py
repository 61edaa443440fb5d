"""Token files and their meta.json, written so that half a data set never looks whole."""

import collections
import glob
import hashlib
import json
import os
import pathlib
import sys
import time

import numpy as np

from nanobit.cli import fail
from nanobit.files import sha256, write_bytes
from nanobit.terminal import command_line

SHARD_TOKENS = 2**27  # 256 MiB of uint16
# the fields of a meta.json, in this order
META = "vocab_size tokens bytes shards tokenizer eot source complete task command".split()
META += "documents seconds revision bos stamp skipped window counted cut".split()


def char_tokenizer(chars):
    """Return meta.json's entry of a tokenizer with one token per character, in this order."""
    return {"kind": "char", "chars": chars, "sha256": hashlib.sha256(chars.encode()).hexdigest()}


def source_of(script, cfg, names):
    """Return meta.json's source: the script and the flags, by name, that decide what it writes."""
    return " ".join([script, *(f"--{name}={getattr(cfg, name)}" for name in names)])


def write_characters(folder, texts, chars, source, task):
    """Write the data set of a task: texts {split: bytes} of these chars (ASCII), a token for each."""
    ids = np.zeros(256, np.uint16)
    ids[list(chars.encode())] = range(len(chars))
    shards = {}
    for split, text in texts.items():
        shards |= write_split(folder, split, ids[np.frombuffer(text, np.uint8)], len(chars))
    sizes = {split: len(text) for split, text in texts.items()}
    made = dict(tokenizer=char_tokenizer(chars), eot=0, vocab_size=len(chars), source=source)
    write_meta(folder, **made, tokens=sizes, bytes=sizes, shards=shards, task=task)


def open_data_set(data_dir, name, source, start_over=True):
    """Make the folder data_dir/name and return its path. start_over: remove its meta.json, so that no
    training starts on half a data set. Exits with 2 if it cannot be written, or holds another source's
    tokens."""
    folder = os.path.join(data_dir, name)
    path = os.path.join(folder, "meta.json")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            former = source_in(json.loads(pathlib.Path(path).read_bytes()))
            if former != source:
                fail(f"{folder} holds another data set ({former}); choose another --name=, or delete it")
            if start_over:
                os.remove(path)
    except (ValueError, RecursionError):
        os.remove(path)  # damaged: nothing to lose
    except OSError as error:
        fail(f"data_dir = {data_dir!r}: cannot write {folder} ({error.strerror}); choose another --data_dir=")
    return folder


def source_in(meta):
    """Return the source that the content of a meta.json or progress.json names."""
    if isinstance(meta, dict) and isinstance(meta.get("source"), str):
        return meta["source"]
    return "its meta.json names no source"


def dtype_of(vocab_size):
    """Return the dtype of token ids below vocab_size."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_split(folder, split, ids, vocab_size):
    """Write the ids (array) of a split; return {shard: {tokens, sha256}}."""
    ids = ids.astype(dtype_of(vocab_size))
    shards = {}
    for start in range(0, ids.size, SHARD_TOKENS):
        part = ids[start : start + SHARD_TOKENS]
        name = f"{split}_{start // SHARD_TOKENS:05d}.bin"
        write_file(os.path.join(folder, name), part.tobytes())
        shards[name] = {"tokens": part.size, "sha256": hashlib.sha256(part).hexdigest()}
    return shards


def write_file(path, content):
    """Write content (bytes) under a temporary name and rename it. Exits with 1 if the disk has no room."""
    try:
        write_bytes(path, content)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; nothing half-written was kept", code=1)


def write_meta(folder, **fields):
    """Write meta.json of those fields that are in META, with complete=True unless they have it."""
    meta = {"dataset": os.path.basename(folder), "dtype": dtype_of(fields["vocab_size"]).name}
    fields = {"complete": True} | fields
    meta |= {key: fields[key] for key in META if key in fields}
    write_file(os.path.join(folder, "meta.json"), json.dumps(meta, indent=1).encode())


def skipped(progress):
    """Return {reason: n} of the rows that were not used."""
    while_reading = collections.Counter(progress["mark"].get("skipped", {}))
    return dict(while_reading + collections.Counter(progress.get("skipped", {})))


class Split:
    """The token files of one split, of which n tokens are known to be on the disk; what is beyond them is
    dropped. A shard is train_00000.bin.partial until it has `size` tokens; shards {file: entry} then gets an
    entry."""

    def __init__(self, folder, split, dtype, n, shards, ending=".bin", size=0):
        self.prefix = os.path.join(folder, f"{split}_")
        self.ending = ending
        self.size = size or SHARD_TOKENS
        self.n = n
        self.shards = shards
        number, rest = divmod(n, self.size)
        for path in glob.glob(glob.escape(self.prefix) + "*"):
            if path.removeprefix(self.prefix)[:5] > f"{number:05d}":
                os.remove(path)
        if os.path.exists(self.path(number)):  # killed after the renaming: not yet known to be whole
            os.rename(self.path(number), self.path(number) + ".partial")
        self.open(number)
        n_bytes = rest * dtype.itemsize
        if os.path.getsize(self.file.name) < n_bytes:
            fail(f"{self.file.name} has lost tokens that progress.json counts; delete {folder} to start over")
        self.file.truncate(n_bytes)

    def path(self, number):
        return f"{self.prefix}{number:05d}{self.ending}"

    def open(self, number):
        self.file = open(self.path(number) + ".partial", "ab")

    def write(self, ids):
        """Append ids (array); start a new shard when one is full."""
        while ids.size:
            room = self.size - self.n % self.size
            self.file.write(ids[:room].tobytes())
            self.n += len(ids[:room])
            ids = ids[room:]
            if self.n % self.size == 0:
                self.finish()
                self.open(self.n // self.size)

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()

    def finish(self):
        """Rename the shard under way to its final name, or remove it if it is empty."""
        self.sync()
        partial = self.file.name
        self.file.close()
        if not os.path.getsize(partial):
            os.remove(partial)
            return
        path = partial.removesuffix(".partial")
        os.replace(partial, path)
        n = (self.n - 1) % self.size + 1
        self.shards[os.path.basename(path)] = {"tokens": n, "sha256": sha256(path)}


class Writer:
    """The token files of a data set, and progress.json, which counts what of them is on the disk: {tokenizer,
    eot, bos, vocab_size, source, tokens, bytes, documents, shards, mark, seconds, ...}. An incomplete
    meta.json follows it, for training (data.py): what that lists is never taken back."""

    def __init__(self, folder, progress):
        self.folder, self.progress = folder, progress
        self.dtype = dtype_of(progress["vocab_size"])
        known = progress["tokens"].items()
        self.splits = {name: self.split(name, n) for name, n in known}
        self.began = time.perf_counter() - progress["seconds"]

    def split(self, name, n):
        """Return the files of a split, of which n tokens are known to be on the disk."""
        return Split(self.folder, name, self.dtype, n, self.progress["shards"])

    def n(self):
        """Return the number of tokens of all splits."""
        return sum(split.n for split in self.splits.values())

    def add(self, name, ids, documents, size):
        """Append the ids (array) of so many documents, from so many bytes of text, to a split."""
        if name not in self.splits:
            self.splits[name] = self.split(name, 0)
            if "bos" not in self.progress:  # the end of a text precedes the first document, too
                self.splits[name].write(np.array([self.progress["eot"]], self.dtype))
        self.splits[name].write(ids)
        for key, more in (("documents", documents), ("bytes", size)):
            self.progress[key][name] = self.progress[key].get(name, 0) + more

    def save(self):
        """Flush the tokens to the disk, then write progress.json and, never before it, meta.json."""
        for split in self.splits.values():
            split.sync()
        self.progress["tokens"] = {name: split.n for name, split in self.splits.items()}
        self.progress["seconds"] = time.perf_counter() - self.began
        write_bytes(os.path.join(self.folder, "progress.json"), json.dumps(self.progress).encode())
        self.write_meta(complete=False, command=command_line(["python", *sys.argv]))

    def finish(self):
        self.save()
        for split in self.splits.values():
            split.finish()

    def close(self):
        for split in self.splits.values():
            split.close()

    def write_meta(self, **fields):
        """Write the meta.json of what is counted."""
        write_meta(self.folder, **self.progress | dict(skipped=skipped(self.progress)) | fields)
