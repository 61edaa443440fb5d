"""Token files and the order of batches.

Window i of a shard is its tokens [i * seq_len, i * seq_len + seq_len]: each token but the first is a target
once. The batch is a pure function of (seed, step): sample number step * sequences_per_step + slot counts
through epochs, an epoch through the shards in order, and inside a shard through a keyed permutation of its
windows. So resuming needs the step alone, and any number of devices sees the same tokens. Training waits for
the tokens of a data set that still grows; its first epoch ends when the set is complete.

A loss mask beside a shard says which tokens count as targets. The loss of a step is then the sum over those
that count, of all micro-steps and ranks, divided by their number."""

import glob
import hashlib
import math
import os
import time

import numpy as np
import torch

from nanobit import distributed
from nanobit.cli import fail
from nanobit.data_set import Damaged, is_masked, mask_of, read_meta
from nanobit.files import is_locked
from nanobit.shards import Shards, bad_shard, check_shards
from nanobit.terminal import command_line, printable, say

IGNORED = -100  # a target that does not count, as in torch's cross entropy


def meta(cfg, split="", verify=False):
    """Return meta.json of cfg.dataset, checked as in checked_meta. Exits with 2 if anything is wrong."""
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    path = os.path.join(folder, "meta.json")
    is_waiting = False
    while cfg.tokenize_on_fly and not os.path.exists(path) and is_being_written(folder):
        if not is_waiting:
            say(f"waiting for the tokenizer of {folder}, which is being made")
        is_waiting = True
        time.sleep(1)
    if not os.path.exists(path):
        fail(f"data set {folder} does not exist (no meta.json); {how_to_make(cfg)}")
    try:
        return checked_meta(cfg, folder, split, verify)
    except Damaged as error:
        fail(str(error))


def how_to_make(cfg):
    """Return the remedy for a data set that does not exist: the command that makes it, if one is known."""
    where = "" if cfg.data_dir == "data" else " " + command_line([f"--data_dir={cfg.data_dir}"])
    command = cfg.prepare
    flags = [key for key in ("dataset", "prepare") if cfg.origin[key].startswith("--")]
    script = f"prepare/{cfg.dataset}.py"
    if not command or flags == ["dataset"]:  # prepare, of a config file, makes another data set
        command = f"python {script}" if os.path.exists(script) else ""
    if command:
        return f"make it: {command}{where}; or name the folder that holds it with --data_dir"
    names = sorted(map(os.path.dirname, glob.glob("*/meta.json", root_dir=cfg.data_dir)))
    present = f"{cfg.data_dir} holds {', '.join(names) or 'no data set'}; --data_dir names another folder"
    text = command_line(["python", "prepare/text.py", "--files=*.txt", f"--name={cfg.dataset}"])
    return f"no {script} makes it; from your own text: {text}{where}; {present}"


def checked_meta(cfg, folder, split="", verify=False):
    """Return meta.json of a folder and check that it serves cfg. Raises Damaged with one line."""
    meta = read_meta(folder)
    if not meta["complete"] and (is_masked(meta) or not cfg.tokenize_on_fly):
        remedy = f"continue it: {printable(meta['command'])}" if "command" in meta else "prepare it again"
        cannot_wait = os.name == "nt" or is_masked(meta)  # all masks of a step are counted before it
        meanwhile = "" if cannot_wait else "; to train while it runs: --tokenize_on_fly"
        raise Damaged(f"data set {folder} is not complete; {remedy}{meanwhile}")
    if cfg.vocab_size and cfg.vocab_size < meta["vocab_size"]:
        source = cfg.origin.get("vocab_size", "")
        remedy = "set it to 0; a smaller vocabulary is chosen when data is prepared"
        if source.startswith("init_from"):
            remedy = f"it is that of {source}: prepare the data set with the tokenizer there"
        fault = f"vocab_size = {cfg.vocab_size} is less than the {meta['vocab_size']} ids of {folder}"
        raise Damaged(f"{fault}; {remedy}")
    if meta.get("window", cfg.seq_len) != cfg.seq_len:
        fault = f"seq_len = {cfg.seq_len}, but {folder} was prepared in windows of {meta['window']} tokens"
        raise Damaged(f"{fault}; set --seq_len={meta['window']}, or prepare it again for the model")
    check_shards(folder, meta, split, verify)
    return meta


def check_vocabulary(cfg, meta, tokenizer):
    """Exit with 2 if meta.json claims another number of ids than its tokenizer has."""
    if meta["vocab_size"] != tokenizer.size:
        fault = f"vocab_size = {meta['vocab_size']}, but its tokenizer has {tokenizer.size} ids"
        remedy = "correct it, or prepare the data set again; to pad rows: --vocab_multiple"
        fail(f"{os.path.join(cfg.data_dir, cfg.dataset, 'meta.json')}: {fault}; {remedy}")


def bits_per_byte(meta, loss, split="val"):
    """Return the loss on a split, in nats per token, as bits per byte of text, or None if that is unknown.
    With masks, both the tokens and the bytes are those that count."""
    if loss is None or not meta["bytes"].get(split):
        return None
    tokens = meta.get("counted", meta["tokens"])
    return loss * (tokens[split] / meta["bytes"][split] / math.log(2))


def is_being_written(folder):
    """Return whether a preparation holds the lock of a data set's folder."""
    return is_locked(os.path.join(folder, ".lock"))


def digest(meta):
    """Return what identifies the tokens of a data set: its finished shards, and whether these are all."""
    return {"complete": meta["complete"], "shards": meta["shards"]}


def same_tokens(saved, now):
    """Return whether two digests can be of one data set, the one perhaps taken when it had fewer shards."""
    either = saved["shards"] | now["shards"]
    is_whole = all(one["shards"] == either for one in (saved, now) if one["complete"])
    return is_whole and either == now["shards"] | saved["shards"]  # those that both have are the same


def seed(cfg, step, micro):
    """Return the seed of all random numbers of a micro-step, by its number among those of all ranks."""
    text = f"{cfg.seed}/{step}/{micro * distributed.WORLD + distributed.RANK}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def permute(i, n, key):
    """Return where a keyed permutation of range(n) sends i (uint64 array, all < n); key: 8 uint64.

    A Feistel network over the next power of 4, one round for each key, walked until it lands below n (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3): under 4 walks on average."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    i = np.asarray(i, dtype=np.uint64).copy()
    todo = np.ones(i.shape, bool)
    while todo.any():
        left = i[todo] >> half
        right = i[todo] & mask
        for k in key:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)  # wraps modulo 2^64
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        i[todo] = left << half | right
        todo = i >= n
    return i


def to_device(array, device):
    """Return an array as a tensor on a device. To a GPU it travels while the host continues."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Windows:
    """The windows of one split, for sequences of seq_len tokens. Of a data set that is still growing, waits
    for the first shard, or for the validation windows. Exits with 2 if the split holds not even one window,
    with 1 if its preparation has ended before. All Windows share one meta, which is kept up to date; total is
    None until the split is complete."""

    def __init__(self, cfg, meta, split):
        self.cfg, self.meta, self.split = cfg, meta, split
        self.folder = os.path.join(cfg.data_dir, cfg.dataset)
        self.seq_len = cfg.seq_len
        self.shards = Shards(self.folder, meta["dtype"])
        self.masks = Shards(self.folder, "uint8")
        self.counted_step = None
        self.update_shards()
        needed = max(1, cfg.eval_tokens // self.seq_len) if split == "val" else 1
        if fault := self.wait_for(needed - 1):
            fail(fault, code=1)

    def update_shards(self):
        """Take in the shards of meta: counts, the windows of each; ends, their running sum; shards."""
        shards = sorted(self.meta["shards"].items())
        sizes = {name: shard["tokens"] for name, shard in shards if name.startswith(self.split + "_")}
        n_finished = len(sizes)
        growing = self.meta["tokens"].get(self.split, 0) - sum(sizes.values())  # they are on the disk already
        if growing and self.split == "val" and not self.meta["complete"]:
            sizes[f"val_{n_finished:05d}.bin"] = growing
        if not sizes and self.meta["complete"]:
            remedy = "see --split"
            if self.split == "val":
                remedy = "hold out more, or train.py --eval_every=0 --patience=0, export.py --eval_tokens=0"
            present = ", ".join(self.meta["tokens"])
            fail(f"data set {self.folder} has no split {self.split!r}, but {present}; {remedy}")
        self.counts = [max(0, n - 1) // self.seq_len for n in sizes.values()]
        self.ends = np.cumsum(self.counts, dtype=np.int64)
        self.ready = sum(self.counts)
        self.total = self.ready if self.meta["complete"] else None
        if self.total == 0:
            largest = max(sizes.values())
            remedy = f"seq_len can be at most {largest - 1}; or prepare more text"
            if self.split == "val":
                remedy += ", or hold out more (--val_fraction=), or train.py --eval_every=0 --patience=0"
            fault = f"the largest {self.split} shard of {self.folder} has {largest:,} tokens"
            fail(f"seq_len = {self.seq_len} is longer than the data: {fault}, so {remedy}")
        self.shards.update([*sizes], n_finished)
        self.is_masked = is_masked(self.meta)
        if self.is_masked:
            self.masks.update([mask_of(name) for name in sizes], n_finished)

    def last_sample(self, step):
        """Return the number of the last training sample of a step, of all ranks."""
        return (step + 1) * self.cfg.batch_size * self.cfg.accumulation * distributed.WORLD - 1

    def epochs(self, tokens):
        """Return how often so many training tokens read the data set, or None while it grows."""
        return tokens / self.seq_len / self.total if self.total else None

    def has(self, sample):
        """Return whether training samples (of the split val: windows) up to this number can be read."""
        return sample < self.ready or self.total is not None

    def wait_for(self, sample, stop=lambda: False, say=say):
        """Wait until has(sample), or until stop(), which is asked every second and the same on all ranks, is
        true. Return '' or, if the preparation has ended before, a line with the fault and the remedy. Every
        rank must ask. say(line) reports the wait and its end."""
        is_waiting = False
        while not self.has(sample) and not stop():
            is_growing, new, fault = distributed.share(self.look() if distributed.is_main else None)
            if fault:
                return fault
            self.meta.update(new)
            self.update_shards()
            if self.has(sample):
                break
            if not is_growing:
                remedy = printable(self.meta.get("command", "its preparation"))
                return f"data set {self.folder} is not complete, and nothing writes it; continue it: {remedy}"
            if not is_waiting:
                say(f"waiting for more {self.split} tokens of {self.folder}, which is being written")
            is_waiting = True
            time.sleep(1)
        if is_waiting and self.has(sample):
            say(f"continuing: {self.folder} has {sum(self.meta['tokens'].values()):,} tokens")
        return ""

    def look(self):
        """Return (whether the data set is being written, its meta.json now, what is wrong with it or '')."""
        is_growing = is_being_written(self.folder)  # asked first: the lock goes after the last meta.json
        try:
            return is_growing, checked_meta(self.cfg, self.folder), ""
        except Damaged as error:
            return is_growing, None, str(error)

    def repetition(self, n_tokens):
        """Return a line if so many training tokens read a text more than ten times, or ''. Tasks, growing
        sets and runs with max_minutes give none: they repeat on purpose, or how often is not known."""
        epochs = self.epochs(n_tokens) or 0
        if epochs <= 10 or "documents" not in self.meta or self.cfg.max_minutes:
            return ""
        remedy = "prepare more text, or set a smaller --max_steps= or --patience=3 (the best is kept)"
        return f"this run reads its text {epochs:,.0f} times, which teaches little (docs/cost.md); {remedy}"

    def read(self, shard, i):
        """Return window i of a shard: seq_len + 1 token ids."""
        return self.shards.read(shard, i * self.seq_len, self.seq_len + 1)

    def mask(self, places):
        """Return which targets of the windows at (shard, i) places count, (B, T) bool."""
        n = self.seq_len
        return np.stack([self.masks.read(shard, i * n + 1, n) for shard, i in places]).astype(bool)

    def counted(self, step):
        """Return how many targets of a step count, of all ranks: each rank reads all masks of the step, since
        the order of the windows is known to all."""
        if self.counted_step != step:
            samples = range(self.last_sample(step - 1) + 1, self.last_sample(step) + 1)
            self.n_counted = int(self.mask(self.places(samples)).sum())
            self.counted_step = step
            if self.n_counted == 0 and distributed.is_main:
                say(f"warning: no target of step {step + 1} counts; its loss is 0 / 0, and it is skipped")
        return self.n_counted

    def tensor(self, places, device, divisor=None):
        """Return the windows at (shard, i) places as inputs and targets (B, T), views of one tensor. With
        masks the targets are IGNORED if they do not count, and a third tensor (0-dim) is what divides the sum
        of their losses: divisor, or the number of those that count here (1 if none does)."""
        rows = np.stack([self.read(shard, i) for shard, i in places])
        vocab_size = self.meta["vocab_size"]
        if rows.max() >= vocab_size:  # a GPU would report it as a failed assertion
            shard, _ = places[int(rows.max(axis=1).argmax())]
            state = f"holds token id {rows.max()} since it was checked, but vocab_size is {vocab_size}"
            self.shards.end(bad_shard(self.shards.paths[shard], state))
        rows = to_device(rows.astype(np.int64), device)
        if not self.is_masked:
            return rows[:, :-1], rows[:, 1:]
        mask = self.mask(places)
        if divisor is None:
            divisor = max(1, mask.sum())
        targets = rows[:, 1:].where(to_device(mask, device), IGNORED)
        return rows[:, :-1], targets, to_device(np.array(divisor, np.float32), device)

    def places(self, samples):
        """Return [(shard, window)] of training sample numbers, the largest of which is the last."""
        assert self.has(samples[-1]), "the caller waits for them"
        epochs, positions = np.divmod(np.asarray(samples, np.int64), self.ready)
        shards, inside = self.inside(positions)
        for epoch, shard in {*zip(epochs.tolist(), shards.tolist())}:
            text = f"{self.cfg.seed}/{epoch}/{shard}".encode()
            key = np.frombuffer(hashlib.blake2b(text, digest_size=64).digest(), "<u8")
            here = (epochs == epoch) & (shards == shard)
            inside[here] = permute(inside[here], self.counts[shard], key)
        return list(zip(shards.tolist(), inside.tolist()))

    def inside(self, positions):
        """Return (shards, windows in them), arrays, of positions among the windows of all shards."""
        shards = np.searchsorted(self.ends, positions, "right")
        return shards, positions - (self.ends - self.counts)[shards]

    def batch(self, first, n, device, divisor=None):
        """Return training samples first ... first + n - 1 as (inputs, targets), each (n, T) int64, and with
        masks the divisor of the loss, see tensor."""
        return self.tensor(self.places(range(first, first + n)), device, divisor)

    def micro_batch(self, step, micro, device):
        """Return the batch of this rank's micro-step, or None if its tokens are not written yet. The
        micro-step after the last one is the first of the next step.

        With masks the divisor is the number of targets that count in the whole step, per micro-step and rank:
        the mean of the losses over these is then the sum of all losses, divided by that number."""
        size = self.cfg.batch_size
        number = step * self.cfg.accumulation + micro
        first = (number * distributed.WORLD + distributed.RANK) * size
        if not self.has(first + size - 1):
            return None
        divisor = None
        if self.is_masked:
            parts = self.cfg.accumulation * distributed.WORLD
            divisor = self.counted(number // self.cfg.accumulation) / parts
        return self.batch(first, size, device, divisor)

    def fixed(self, tokens, batch_size, device):
        """Yield batches, see tensor, of at most `tokens` tokens (0 = all), always the same: spread evenly, or
        the first ones if the split may still grow."""
        n = min(self.ready, max(1, tokens // self.seq_len)) if tokens else self.ready
        positions = np.arange(n)
        if not self.cfg.tokenize_on_fly:
            positions = positions * self.ready // n
        shards, inside = self.inside(positions)
        places = list(zip(shards.tolist(), inside.tolist()))
        for j in range(0, n, batch_size):
            yield self.tensor(places[j : j + batch_size], device)
