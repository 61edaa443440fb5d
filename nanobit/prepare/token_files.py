"""Token files and their meta.json, written so that half a data set never looks whole."""

import hashlib
import json
import os
import shutil

import numpy as np

from nanobit.cli import fail
from nanobit.files import write_bytes

SHARD_TOKENS = 2**27  # 256 MiB of uint16


def char_tokenizer(chars):
    """meta.json's entry of a tokenizer with one token per character, in this order"""
    return {"kind": "char", "chars": chars, "sha256": hashlib.sha256(chars.encode()).hexdigest()}


def open_data_set(data_dir, name, source, anew=True):
    """make data_dir/name; to be written anew, its meta.json goes, so that no training starts on half a data
    set. Exits with 2 where the folder cannot be written, or holds tokens from another source."""
    if not name:
        fail("name = '' is not the name of a folder")
    folder = os.path.join(data_dir, name)
    meta = os.path.join(folder, "meta.json")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(meta):
            with open(meta, encoding="utf-8") as file:
                found = source_in(json.load(file))
            if found != source:
                fail(f"{folder} holds another data set ({found}); choose another --name=, or delete it")
            if anew:
                os.remove(meta)
    except (ValueError, RecursionError):
        os.remove(meta)  # damaged: nothing to lose
    except OSError as error:
        fail(f"data_dir = {data_dir!r}: cannot write {folder} ({error.strerror}); choose another --data_dir=")
    return folder


def source_in(meta):
    """Return the source that the content of a meta.json or progress.json names; of another file, that it
    names none."""
    source = meta.get("source") if isinstance(meta, dict) else None
    return source if isinstance(source, str) else "its meta.json names no source"


def dtype_of(vocab_size):
    """the dtype of token ids below vocab_size"""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_split(folder, split, ids, vocab_size):
    """write the ids (array) of a split as shards, each under a temporary name first; returns {file: {tokens,
    sha256}}"""
    dtype = dtype_of(vocab_size)
    free = shutil.disk_usage(folder).free
    if ids.size * dtype.itemsize > free:
        fail(f"{folder}: {split} needs {ids.size * dtype.itemsize:,} bytes, the disk has {free:,} free")
    shards = {}
    for number, start in enumerate(range(0, ids.size, SHARD_TOKENS)):
        part = ids[start : start + SHARD_TOKENS].astype(dtype)
        name = f"{split}_{number:05d}.bin"
        write_file(os.path.join(folder, name), part.tobytes())
        shards[name] = {"tokens": part.size, "sha256": hashlib.sha256(part.tobytes()).hexdigest()}
    return shards


def write_file(path, content):
    """content (bytes) under a temporary name, renamed when whole. Exits with 1 where the disk has no room."""
    try:
        write_bytes(path, content)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; nothing half-written was left in place", code=1)


def write_meta(folder, tokenizer, eot, vocab_size, splits, shards, source, **extra):
    """meta.json, of a data set that is complete unless extra says complete=False; splits is {split: (tokens,
    bytes of text)}"""
    meta = {
        "dataset": os.path.basename(folder),
        "dtype": dtype_of(vocab_size).name,
        "vocab_size": vocab_size,
        "tokens": {split: tokens for split, (tokens, _) in splits.items()},
        "bytes": {split: size for split, (_, size) in splits.items()},
        "shards": shards,
        "tokenizer": tokenizer,
        "eot": eot,
        "source": source,
        "complete": True,
    }
    write_file(os.path.join(folder, "meta.json"), json.dumps(meta | extra, indent=1).encode())


class Split:
    """the token files of one split, of which n tokens are known to be on the disk: what is beyond them is
    dropped"""

    def __init__(self, folder, split, dtype, n):
        self.folder, self.split, self.dtype, self.n, self.file = folder, split, dtype, n, None
        number, rest = divmod(n, SHARD_TOKENS)
        for beyond in sorted(os.listdir(folder)):
            if beyond.startswith(split + "_") and beyond[len(split) + 1 :][:5] > f"{number:05d}":
                os.remove(os.path.join(folder, beyond))
        if os.path.exists(self.path(number)):  # killed after the renaming: not yet known to be whole
            os.rename(self.path(number), self.path(number) + ".partial")
        self.open(number)
        if os.path.getsize(self.file.name) < rest * dtype.itemsize:
            fail(f"{self.file.name} has lost tokens that progress.json counts; delete {folder} to begin anew")
        self.file.truncate(rest * dtype.itemsize)
        self.file.seek(rest * dtype.itemsize)

    def path(self, number):
        return os.path.join(self.folder, f"{self.split}_{number:05d}.bin")

    def open(self, number):
        path = self.path(number) + ".partial"
        self.file = open(path, "r+b" if os.path.exists(path) else "w+b")

    def write(self, ids):
        """append ids (array), beginning a new shard where one is full"""
        while ids.size:
            room = SHARD_TOKENS - self.n % SHARD_TOKENS
            self.file.write(ids[:room].tobytes())
            self.n += len(ids[:room])
            ids = ids[room:]
            if self.n % SHARD_TOKENS == 0:
                self.finish()
                self.open(self.n // SHARD_TOKENS)

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self):
        """give the shard under way its name; an empty one goes"""
        self.sync()
        partial = self.file.name
        self.file.close()
        if os.path.getsize(partial):
            os.replace(partial, partial.removesuffix(".partial"))
        else:
            os.remove(partial)

    def shards(self, known):
        """{file: {tokens, sha256}} of the shards that have their name; those in `known` are not read again"""
        found = {}
        for start in range(0, self.n, SHARD_TOKENS):
            path = self.path(start // SHARD_TOKENS)
            name = os.path.basename(path)
            if name in known:
                found[name] = known[name]
            elif os.path.exists(path):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[name] = {"tokens": min(SHARD_TOKENS, self.n - start), "sha256": digest}
        return found
