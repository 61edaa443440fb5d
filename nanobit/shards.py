"""The shards of a data set: their bytes are checked once on each machine, then read window by window.

A shard is read when a machine first uses it, and when its size or time has changed: one pass finds its
sha256 and its largest id. .checked.json in the folder of the data set remembers what each machine has read.
Damage that keeps size and time (a bad disk) is found by --verify_data, which reads everything again."""

import contextlib
import hashlib
import os
import platform
import time

import numpy as np
from tqdm import tqdm

from nanobit.cli import fail
from nanobit.data_set import Damaged, mask_of, unreadable
from nanobit.files import read_json, write_json
from nanobit.terminal import say

MAX_OPEN = 8  # shards of a split that are open at a time
SAVE_SECONDS = 60.0  # between two saves of .checked.json while a large data set is read
LARGE = 2**30  # bytes to read that are announced in a line
remembered = {}  # {folder: {shard: entry}} of this process, for a .checked.json that cannot be written


def files_of(meta):
    """Return {file: (dtype, tokens, sha256, number of different values)} of the shards and their masks."""
    files = {}
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    for name, shard in meta["shards"].items():
        files[name] = dtype, shard["tokens"], shard["sha256"], meta["vocab_size"]
        if "mask_sha256" in shard:
            files[mask_of(name)] = np.dtype("u1"), shard["tokens"], shard["mask_sha256"], 2
    return files


def check_shards(folder, meta, split="", verify=False):
    """Check the size of every shard and mask, and sha256 and ids of those of a split ('' = of all) that this
    machine has not read since they were last changed; verify: of each. Raises Damaged at the first that is
    wrong."""
    cache = os.path.join(folder, ".checked.json")
    host = host_of(folder)
    seen = read_checked(cache).get(host, {}) | remembered.get(folder, {})
    stored = files_of(meta)
    known, to_read = {}, {}
    for name, (dtype, n, sha256, n_values) in stored.items():
        path = os.path.join(folder, name)
        size = n * dtype.itemsize
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            raise Damaged(bad_shard(path, f"is missing, meta.json says {size:,} bytes")) from None
        except OSError as error:
            raise Damaged(unreadable(path, error)) from None
        if stat.st_size != size:
            raise Damaged(bad_shard(path, f"has {stat.st_size:,} bytes, meta.json says {size:,}"))
        entry = [size, stat.st_mtime_ns, sha256, n_values]
        if seen.get(name) == entry:
            known[name] = entry
        if name.startswith(split) and (verify or name not in known):
            to_read[name] = entry
    if not to_read:
        return
    size = sum(entry[0] for entry in to_read.values())
    if size >= LARGE:
        say(f"{folder}: checking {len(to_read)} shards, {size / 1e9:.1f} GB, once on each machine")
    options = dict(unit="B", unit_scale=True, delay=1, leave=False, disable=None)  # shown after a second
    saved = time.monotonic()
    try:
        with tqdm(total=size, desc=f"checking {folder}", **options) as bar:
            for name, entry in to_read.items():
                if fault := check_shard(folder, name, stored[name], bar.update):
                    known.pop(name, None)
                    raise Damaged(fault)
                known[name] = entry
                if time.monotonic() - saved > SAVE_SECONDS:
                    write_checked(cache, host, known)
                    saved = time.monotonic()
    finally:
        remembered[folder] = known
        write_checked(cache, host, known)
    if verify:
        say(f"{folder}: {len(to_read)} shards read again, all have the sha256 that meta.json names")


def check_shard(folder, name, stored, progress):
    """Read a shard or mask once; stored: its entry of files_of. Return '', or the line for an id over the
    vocabulary, a mask that holds more than 0 and 1, another sha256 or a fault."""
    path = os.path.join(folder, name)
    dtype, _, expected, n_values = stored
    sha256, largest = hashlib.sha256(), 0
    buffer = memoryview(bytearray(2**22))
    try:
        with open(path, "rb") as file:
            while n := file.readinto(buffer):
                sha256.update(buffer[:n])
                ids = np.frombuffer(buffer[: n - n % dtype.itemsize], dtype)
                largest = max(largest, int(ids.max(initial=0)))
                progress(n)
    except OSError as error:
        return unreadable(path, error)
    if largest >= n_values and name.endswith(".mask"):
        return bad_shard(path, f"holds {largest}, but a mask is of 0 and 1")
    if largest >= n_values:
        return bad_shard(path, f"holds token id {largest}, but vocab_size is {n_values}")
    if sha256.hexdigest() != expected:
        return bad_shard(path, "has changed: its sha256 is not the one in meta.json")
    return ""


def bad_shard(path, state):
    """Return the line for a shard that is damaged: its state and the remedy."""
    remedy = f"copy it again from where it came, or delete {os.path.dirname(path)} and prepare it again"
    return f"shard {path} {state}; {remedy}"


def host_of(folder):
    """Return the key of this machine in the cache of a folder; a copy of the folder takes the cache along."""
    return f"{platform.node()}:{os.path.realpath(folder)}"


def read_checked(path):
    """Return {host: {shard: entry}} of a .checked.json, a cache: {} if it is missing or damaged."""
    return {host: shards for host, shards in read_json(path).items() if type(shards) is dict}


def write_checked(path, host, shards):
    """Write the entries of this machine beside those of others."""
    try:
        write_json(path, read_checked(path) | {host: shards})
    except OSError as error:
        reason = error.strerror or error
        say(f"warning: {path} cannot be written ({reason}); the next start reads these shards again")


class Shards:
    """The files of one split. A few are open at a time, so that any number of shards can be read; one that is
    open outlives its name. One that is cut or cannot be read ends the program with 1, after on_damage()."""

    def __init__(self, folder, dtype):
        self.folder = folder
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.on_damage = lambda: None
        self.files = {}  # {shard: file}, the most recently used last

    def update(self, names, n_finished):
        """Take in the shards by name; those from n_finished on are still being written. Open a few."""
        self.paths = [os.path.join(self.folder, name) for name in names]
        self.n_finished = n_finished
        for shard in range(min(len(names), MAX_OPEN)):
            self.file(shard)

    def file(self, shard):
        """Return a shard as an open file."""
        file = self.files.pop(shard, None) or self.open(shard)
        self.files[shard] = file
        if len(self.files) > MAX_OPEN:
            self.files.pop(next(iter(self.files))).close()
        return file

    def open(self, shard):
        path = self.paths[shard]
        try:
            if shard >= self.n_finished:
                with contextlib.suppress(FileNotFoundError):  # renamed by now
                    return open(path + ".partial", "rb", buffering=0)  # and stays open when it is renamed
            return open(path, "rb", buffering=0)
        except OSError as error:
            self.end(unreadable(path, error))

    def read(self, shard, start, n):
        """Return n token ids of a shard from number `start` on."""
        file = self.file(shard)
        try:
            file.seek(start * self.dtype.itemsize)
            content = file.read(n * self.dtype.itemsize)
        except OSError as error:
            self.end(unreadable(self.paths[shard], error))
        if len(content) < n * self.dtype.itemsize:
            self.end(bad_shard(self.paths[shard], "has become shorter since it was checked"))
        return np.frombuffer(content, self.dtype)

    def end(self, line):
        """End the program with this line, after on_damage()."""
        self.on_damage()
        fail(line, code=1)
