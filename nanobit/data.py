"""
Token files and the order of batches.

data/<name>/ holds train_00000.bin, train_00001.bin, ..., val_00000.bin (little-endian token ids) and
meta.json, which describes them. Window i of a shard is its tokens [i * seq_len, i * seq_len + seq_len], one
more than seq_len, so that each but the first is a target once.

The batch is a pure function of (seed, step): sample number step * sequences_per_step + slot counts through
epochs, an epoch through the shards in order, and inside a shard through a keyed permutation of its windows
that needs no memory. So resuming needs the step alone, any number of devices sees the same tokens, and every
window comes once an epoch.

A data set may still be growing (tokenize_on_fly): its meta.json, not yet complete, lists the shards that are
finished, and how many tokens of a split are on the disk. A finished shard never changes, so the batches are
those of the complete set; what is not there yet is waited for. Its first epoch ends when it is complete.
"""

import glob
import hashlib
import math
import os
import time
from types import SimpleNamespace

import numpy as np
import torch

from nanobit import distributed
from nanobit.cli import fail
from nanobit.data_set import Damaged, read_meta
from nanobit.files import is_locked
from nanobit.shards import Shards, check_shards, say
from nanobit.terminal import command_line, printable
from nanobit.tokenizer import bos_of


def meta(cfg, split="", verify=False):
    """Return meta.json of cfg.dataset, checked: itself, and its shards as in data_set.check_shards.
    Exits with 2 if anything is wrong, or if the data set is not complete without cfg.tokenize_on_fly."""
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    path = os.path.join(folder, "meta.json")
    waits = cfg.tokenize_on_fly and not os.path.exists(path) and is_being_written(folder)
    if waits:
        say(f"waiting for the tokenizer of {folder}, which is being made")
    while waits and not os.path.exists(path) and is_being_written(folder):
        time.sleep(1)
    if not os.path.exists(path):
        where = "" if cfg.data_dir == "data" else " " + command_line([f"--data_dir={cfg.data_dir}"])
        command, flagged = cfg.prepare, [cfg.origin[key].startswith("--") for key in ("dataset", "prepare")]
        if not command or flagged == [True, False]:  # the config's command makes another data set
            command = default_command(cfg)
        names = sorted(map(os.path.dirname, glob.glob("*/meta.json", root_dir=cfg.data_dir)))
        there = f"{cfg.data_dir} holds {', '.join(names) or 'no data set'}; --data_dir names another folder"
        text = command_line(["python", "prepare/text.py", "--files=*.txt", f"--name={cfg.dataset}"]) + where
        how = f"no prepare/{cfg.dataset}.py makes it; of your own text: {text}; {there}"
        if command:
            how = f"make it: {command}{where}; or name the folder that holds it with --data_dir"
        fail(f"data set {folder} is not there (no meta.json); {how}")
    try:
        return checked_meta(cfg, folder, split, verify)
    except Damaged as error:
        fail(str(error))


def checked_meta(cfg, folder, split="", verify=False):
    """Return meta.json of a folder and check that it serves cfg. Raises Damaged with one line."""
    found = read_meta(folder)
    if not found["complete"] and not cfg.tokenize_on_fly:
        how = f"continue it: {printable(found['command'])}" if "command" in found else "prepare it again"
        meanwhile = "" if os.name == "nt" else "; to train while it runs: --tokenize_on_fly"
        raise Damaged(f"data set {folder} is not complete; {how}{meanwhile}")
    if cfg.vocab_size and cfg.vocab_size < found["vocab_size"]:
        ids = found["vocab_size"]
        source = cfg.origin.get("vocab_size", "")
        how = "set it to 0"
        if source.startswith("init_from"):
            how = f"it is that of {source}: prepare the data set with the tokenizer there"
        raise Damaged(f"vocab_size = {cfg.vocab_size} is less than the {ids} ids of {folder}; {how}")
    check_shards(folder, found, split, verify)
    return found


def check_vocabulary(cfg, meta, tokenizer):
    """Exit with 2 if meta.json claims another number of ids than its tokenizer has."""
    if meta["vocab_size"] != tokenizer.size:
        path = os.path.join(cfg.data_dir, cfg.dataset, "meta.json")
        wrong = f"vocab_size = {meta['vocab_size']}, but its tokenizer has {tokenizer.size} ids"
        fail(f"{path}: {wrong}; correct it, or prepare the data set again; to pad rows: --vocab_multiple")


def of_trained(part, split, dataset="", data_dir="", verify=False):
    """(meta, windows of a split, as long as the model's context) of the data set on which the model of a
    checkpoint was trained, or of another that its tokenizer made. Exits with 2 where another did."""
    trained = part["config"]
    cfg = dict(dataset=dataset or trained["dataset"], data_dir=data_dir or trained["data_dir"])
    cfg |= dict(vocab_size=0, tokenize_on_fly=False, origin=dict(dataset="", prepare=""))
    cfg = SimpleNamespace(**trained | cfg)
    cfg.prepare = trained["prepare"] if cfg.dataset == trained["dataset"] else ""
    found = meta(cfg, split, verify)
    if found["tokenizer"]["sha256"] != part["tokenizer"]["sha256"]:
        fail(
            f"dataset = {cfg.dataset!r} has another tokenizer than the model, its token ids mean other text; "
            "name one that the model's tokenizer made, or its folder with --data_dir"
        )
    begins, expected = bos_of(found), bos_of(part["tokenizer"])
    if begins != expected:
        fail(
            f"dataset = {cfg.dataset!r}: its texts begin with token {begins}, the model's with {expected}; "
            "prepare it with --tokenizer= and the folder of the model's own data set or export"
        )
    return found, Windows(cfg, found, split)


def place(step, micro, cfg):
    """Return the number of this rank's micro-step among those of all steps and ranks: one process takes the
    same batches with the same random numbers as several."""
    return (step * cfg.accumulation + micro) * distributed.WORLD + distributed.RANK


def seed(cfg, step, micro):
    """Return the seed of all random numbers of a micro-step, whether the run was resumed or not."""
    text = f"{cfg.seed}/{step}/{micro * distributed.WORLD + distributed.RANK}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def bits_per_byte(meta, loss):
    """Return a validation loss in nats per token as bits per byte of text, or None if that is unknown."""
    if loss is None or not meta["bytes"].get("val"):
        return None
    return loss * (meta["tokens"]["val"] / meta["bytes"]["val"] / math.log(2))


def is_being_written(folder):
    """whether a preparation holds the lock of a data set's folder"""
    return is_locked(os.path.join(folder, ".lock"))


def digest(meta):
    """what tells the tokens of a data set from others: its finished shards with their hashes, and whether
    these are all"""
    return {"complete": meta["complete"], "shards": meta["shards"]}


def same_tokens(saved, now):
    """whether two digests can be of one data set, the one perhaps taken when it had fewer shards"""
    either = saved["shards"] | now["shards"]
    is_whole = all(one["shards"] == either for one in (saved, now) if one["complete"])
    return is_whole and either == now["shards"] | saved["shards"]  # and where both have a shard, the same


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
    """the windows of one split, for sequences of seq_len tokens. Of a data set that is still growing, the
    first shard, or the validation windows, are waited for. Exits with 2 where the split holds not even one
    window, with 1 where its preparation has ended before.

    meta, of which all Windows share one, is kept up to date; total is None until the split is complete.

    An id over the vocabulary in a shard that has changed since it was checked ends the program, as in Shards:
    a GPU would report it as a failed assertion."""

    def __init__(self, cfg, meta, split):
        self.cfg, self.meta, self.split = cfg, meta, split
        self.folder = os.path.join(cfg.data_dir, cfg.dataset)
        self.seed, self.seq_len, self.dtype = cfg.seed, cfg.seq_len, np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size, self.shards = meta["vocab_size"], Shards(self.folder)
        self.update_shards()
        if fault := self.wait_for(max(1, cfg.eval_tokens // self.seq_len) - 1 if split == "val" else 0):
            fail(fault, code=1)

    def update_shards(self):
        """take in the shards of meta: counts, the windows of each; ends, their running sum; shards"""
        folder, split, meta = self.folder, self.split, self.meta
        names = sorted(name for name in meta["shards"] if name.startswith(split + "_"))
        shards = {name: meta["shards"][name]["tokens"] for name in names}
        growing = meta["tokens"].get(split, 0) - sum(shards.values())  # tokens that are on the disk already
        if growing and split == "val" and not meta["complete"]:
            shards[f"{split}_{len(names):05d}.bin"] = growing
        if not shards and meta["complete"]:
            how = "see --split"
            if split == "val":
                how = "make it with a larger --val_fraction or more documents; without, train.py wants "
                how += "--eval_every=0 --patience=0, "
                how += "export.py --eval_tokens=0"
            fail(f"data set {folder} has no split {split!r}, but {', '.join(meta['tokens'])}; {how}")
        self.counts = [max(0, n - 1) // self.seq_len for n in shards.values()]  # windows per shard
        self.ends = np.cumsum(self.counts, dtype=np.int64)
        self.ready = sum(self.counts)
        self.total = self.ready if meta["complete"] else None
        if self.total == 0:
            most = max(shards.values())
            more = "prepare more text"
            if split == "val":
                more += ", or hold out more (--val_fraction=), or none (train.py --eval_every=0 --patience=0)"
            fail(
                f"seq_len = {self.seq_len} is over the data: the largest {split} shard of {folder} has "
                f"{most:,} tokens, so seq_len can be at most {most - 1}; or {more}"
            )
        self.shards.update(list(shards), n_finished=len(names))

    def first_sample(self, step, micro):
        """Return the number of the first training sample of this rank's micro-step."""
        return place(step, micro, self.cfg) * self.cfg.batch_size

    def micro_batch(self, step, micro, device):
        """Return inputs and targets (B, T) of this rank's micro-step, or None if its tokens are not yet
        written. The micro-step after the last one is the first of the next step."""
        first = self.first_sample(step, micro)
        if not self.has(first + self.cfg.batch_size - 1):
            return None
        return self.batch(first, self.cfg.batch_size, device)

    def has_step(self, step):
        """Return whether all tokens of a step, over all ranks, can be read."""
        return self.has(self.last_sample(step))

    def last_sample(self, step):
        return (step + 1) * self.cfg.batch_size * self.cfg.accumulation * distributed.WORLD - 1

    def wait_for_step(self, step, stop, say):
        """Wait until has_step(step): see wait_for."""
        return self.wait_for(self.last_sample(step), stop, say)

    def epochs(self, tokens):
        """Return how often so many training tokens read the data set, or None while it grows."""
        return tokens / self.seq_len / self.total if self.total else None

    def has(self, sample):
        """whether training samples (of the split val: windows) up to this number can be read"""
        return sample < self.ready or self.total is not None

    def wait_for(self, sample, stop=lambda: False, say=say):
        """return when has(sample), or when stop() is true, asked every second: '' or, where the preparation
        has ended before, what is wrong and what to do about it. Every rank must ask, and stop() be the same
        on all. say(line) tells of the wait and its end."""
        waits = False
        while not self.has(sample) and not stop():
            # of rank 0, for all; whether it is written is asked first: the lock goes after the last meta.json
            is_growing, new, fault = distributed.share(self.look() if distributed.is_main else None)
            if fault:
                return fault
            self.meta.update(new)
            self.update_shards()
            if self.has(sample):
                break
            if not is_growing:
                how = printable(self.meta.get("command", "its preparation"))
                return f"data set {self.folder} is not complete, and nothing writes it; continue it: {how}"
            if not waits:
                say(f"waiting for more {self.split} tokens of {self.folder}, which is being written")
            waits = True
            time.sleep(1)
        if waits and self.has(sample):
            say(f"going on: {self.folder} has {sum(self.meta['tokens'].values()):,} tokens")
        return ""

    def look(self):
        """Return (whether the data set is being written, its meta.json now, what is wrong with it or '')."""
        is_growing = is_being_written(self.folder)
        try:
            return is_growing, checked_meta(self.cfg, self.folder), ""
        except Damaged as error:
            return is_growing, None, str(error)

    def repetition(self, n_tokens):
        """Return a line if so many training tokens read a text more than ten times, or ''. Problems and games
        are repeated on purpose; the size of a data set that is still being written is not known, nor are the
        steps of a run that max_minutes ends."""
        epochs = n_tokens / self.seq_len / self.total if self.total else 0
        if epochs <= 10 or "documents" not in self.meta or self.cfg.max_minutes:
            return ""
        how = "prepare more text, set a smaller --max_steps=, or --patience=3, which stops at the best loss"
        return f"this run reads its text {epochs:,.0f} times, which teaches little (docs/cost.md); {how}"

    def read(self, shard, i):
        """window i of a shard: seq_len + 1 token ids"""
        start, size = i * self.seq_len, self.seq_len + 1
        raw = self.shards.read(shard, start * self.dtype.itemsize, size * self.dtype.itemsize)
        return np.frombuffer(raw, self.dtype)

    def tensor(self, places, device):
        """the windows at (shard, i) places as inputs and targets (B, T), both views of one tensor on the
        device"""
        rows = np.stack([self.read(shard, i) for shard, i in places])
        if rows.max() >= self.vocab_size:  # microseconds
            row = int(rows.max(axis=1).argmax())
            state = f"holds token id {rows.max()} since it was checked, but vocab_size is {self.vocab_size}"
            self.shards.stop(places[row][0], state)
        rows = torch.from_numpy(rows.astype(np.int64))
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def places(self, samples):
        """the (shard, window) of each training sample number, as a list"""
        assert self.has(max(samples)), "the caller waits for them"
        epochs, positions = np.divmod(np.asarray(samples, np.int64), self.ready)
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
        """yield batches (inputs, targets) of at most `tokens` tokens (0 = all), always the same: spread
        evenly, or the first ones where the split may still grow"""
        n = min(self.ready, max(1, tokens // self.seq_len)) if tokens else self.ready
        spread = np.arange(n) if self.cfg.tokenize_on_fly else np.arange(n) * self.ready // n
        shards = np.searchsorted(self.ends, spread, "right")
        places = list(zip(shards.tolist(), (spread - (self.ends - self.counts)[shards]).tolist()))
        for j in range(0, n, batch_size):
            yield self.tensor(places[j : j + batch_size], device)
