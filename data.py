"""
Token files and the order of batches.

data/<name>/ holds train_00000.bin, train_00001.bin, ..., val_00000.bin (little-endian token ids) and
meta.json, which describes them. Window i of a shard is its tokens [i * seq_len, i * seq_len + seq_len], one
more than seq_len, so that each but the first is a target once.

The batch is a pure function of (seed, step): sample number step * sequences_per_step + slot counts through
epochs, an epoch through the shards in order, and inside a shard through a keyed permutation of its windows
that needs no memory. So resuming needs the step alone, any number of devices sees the same tokens, and every
window comes once an epoch.
"""

import hashlib
import json
import os
import shlex

import numpy as np
import torch

from config import fail
from files import write_json


def meta(cfg):
    """meta.json of cfg.dataset, its shards checked: size, dtype, every id < vocab_size. Exits with 2 where
    not."""
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        where = "" if cfg.data_dir == "data" else f" --data_dir={shlex.quote(cfg.data_dir)}"
        command, flagged = cfg.prepare, [cfg.origin[key].startswith("--") for key in ("dataset", "prepare")]
        if not command or flagged == [True, False]:  # the config's command makes another data set
            command = default_command(cfg)
        how = f"make it: {command}{where}" if command else f"no prepare/{cfg.dataset}.py is there to make it"
        fail(f"data set {folder} is not there (no meta.json); {how}")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if "examples" in found:
            how = f"evaluate.py --dataset={cfg.dataset} scores a model on it"
            fail(f"data set {folder} is a task of text, with no tokens to train on; {how}")
        need = ("complete", "shards", "dtype", "vocab_size", "tokens", "bytes", "tokenizer", "eot")
        complete, shards, dtype, vocab_size = [found[key] for key in need][:4]
        dtype = np.dtype(dtype).newbyteorder("<")
        sizes = {name: shard["tokens"] * dtype.itemsize for name, shard in shards.items()}
        named = found["tokenizer"]["kind"] and found["tokenizer"]["sha256"]
        if not (0 <= found["eot"] < vocab_size and named and all(sizes.values())):
            raise ValueError(f"eot {found['eot']!r}, vocab_size {vocab_size!r}, bytes {sizes}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {error}); make the data set again")
    if not complete:
        fail(f"data set {folder} is not complete; run its preparation again")
    if cfg.vocab_size and cfg.vocab_size < vocab_size:
        fail(f"vocab_size = {cfg.vocab_size} is less than the {vocab_size} ids of {folder}; set it to 0")
    checked = os.path.join(folder, ".checked.json")  # {shard: size, time, vocab_size}: each is scanned once
    try:
        with open(checked, encoding="utf-8") as file:
            seen = json.load(file)
    except (OSError, ValueError):  # not there, or damaged: only a cache
        seen = {}
    now = {}
    for name, want in sizes.items():
        file = os.path.join(folder, name)
        size = os.path.getsize(file) if os.path.exists(file) else -1
        if size != want:
            state = "is missing" if size < 0 else f"has {size:,} bytes"
            fail(f"shard {file} {state}, meta.json says {want:,}; make the data set again")
        now[name] = [size, os.stat(file).st_mtime_ns, vocab_size]
        if seen.get(name) != now[name]:
            largest = int(np.memmap(file, dtype, "r").max())
            if largest >= vocab_size:
                fail(
                    f"shard {file} holds token id {largest}, but vocab_size is {vocab_size} and ids must be "
                    "below it; make the data set again with the tokenizer that meta.json names"
                )
    if now != seen and os.access(folder, os.W_OK):  # a read-only data set is scanned each time
        write_json(checked, now)
    return found


def digest(meta):
    """a hash of the tokens of a data set, by the hashes of its shards"""
    return hashlib.sha256(json.dumps(meta["shards"], sort_keys=True).encode()).hexdigest()


def default_command(cfg):
    """the command that makes cfg.dataset, as far as its name tells, or ''"""
    script = f"prepare/{cfg.dataset}.py"
    return f"python {script}" if os.path.exists(script) else ""


def permute(i, n, key):
    """where a keyed permutation of range(n) sends i (uint64 array, all < n); key: 8 uint64, a round each.

    A Feistel network over the next power of 4, walked until it lands below n (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002, section 3): under 4 walks on average, no memory, the same on every
    machine.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    i = np.asarray(i, dtype=np.uint64).copy()
    todo = np.ones(i.shape, bool)
    while todo.any():
        left, right = i[todo] >> half, i[todo] & mask
        for k in key:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2^64
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        i[todo] = left << half | right
        todo = i >= n
    return i


class Windows:
    """the windows of one split, for sequences of seq_len tokens. Exits with 2 where the split holds not even
    one."""

    def __init__(self, cfg, meta, split):
        folder = os.path.join(cfg.data_dir, cfg.dataset)
        self.seed, self.seq_len, self.dtype = cfg.seed, cfg.seq_len, np.dtype(meta["dtype"]).newbyteorder("<")
        names = sorted(name for name in meta["shards"] if name.startswith(split + "_"))
        shards = {name: meta["shards"][name]["tokens"] for name in names}
        if not shards:
            how = (
                "make it with a val_fraction, or train with --eval_every=0"
                if split == "val"
                else "see --split"
            )
            fail(f"data set {folder} has no split {split!r}, but {', '.join(meta['tokens'])}; {how}")
        self.counts = [max(0, n - 1) // self.seq_len for n in shards.values()]  # windows per shard
        self.ends = np.cumsum(self.counts)
        self.total = int(self.ends[-1])
        if self.total == 0:
            most = max(shards.values())
            fail(
                f"seq_len = {self.seq_len} is over the data: the largest {split} shard of {folder} has "
                f"{most:,} tokens, so seq_len can be at most {most - 1}"
            )
        self.files = [open(os.path.join(folder, name), "rb", buffering=0) for name in shards]

    def read(self, shard, i):
        """window i of a shard: seq_len + 1 token ids"""
        self.files[shard].seek(i * self.seq_len * self.dtype.itemsize)
        raw = self.files[shard].read((self.seq_len + 1) * self.dtype.itemsize)
        return np.frombuffer(raw, self.dtype)

    def tensor(self, places, device):
        """the windows at (shard, i) places as inputs and targets (B, T), both views of one tensor on the
        device"""
        rows = torch.from_numpy(np.stack([self.read(shard, i) for shard, i in places]).astype(np.int64))
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def places(self, samples):
        """the (shard, window) of each training sample number, as a list"""
        epochs, positions = np.divmod(np.asarray(samples, np.int64), self.total)
        shards = np.searchsorted(self.ends, positions, "right")
        inside = positions - (self.ends - self.counts)[shards]
        for epoch, shard in {*zip(epochs.tolist(), shards.tolist())}:
            text = f"{self.seed}/{epoch}/{shard}".encode()
            key = np.frombuffer(hashlib.blake2b(text, digest_size=64).digest(), "<u8")
            here = (epochs == epoch) & (shards == shard)
            inside[here] = permute(inside[here], self.counts[shard], key)
        return list(zip(shards.tolist(), inside.tolist()))

    def batch(self, first, n, device):
        """training samples first ... first + n - 1 as (inputs, targets), each (n, T) int64"""
        return self.tensor(self.places(range(first, first + n)), device)

    def fixed(self, tokens, batch_size, device):
        """yield batches (inputs, targets) of at most `tokens` tokens (0 = all), spread evenly and always the
        same"""
        n = min(self.total, max(1, tokens // self.seq_len)) if tokens else self.total
        spread = np.arange(n) * self.total // n
        shards = np.searchsorted(self.ends, spread, "right")
        places = list(zip(shards.tolist(), (spread - (self.ends - self.counts)[shards]).tolist()))
        for j in range(0, n, batch_size):
            yield self.tensor(places[j : j + batch_size], device)
