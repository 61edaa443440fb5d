"""Conversations as tokens: read from .jsonl files, packed into windows, with a mask of what is learned.

A window has as many tokens as the model's context and begins with a conversation. Conversations are packed
into windows within the chunk (chunks.py) in which they are read, so that a chunk needs nothing of another."""

import bisect
import collections
import hashlib
import json
import os

import numpy as np

from nanobit import chat
from nanobit.cli import fail
from nanobit.data_set import mask_of
from nanobit.prepare import chunks, formats, token_files, workers
from nanobit.terminal import printable


class Conversations:
    """A source (sources.py) of conversations: the rows of files [(split, path)]; split '' = by a hash. A
    piece is (split, the messages as JSON, where they stand, True). To continue, all rows are read again from
    the first one on: those before decide what is a duplicate."""

    def __init__(self, files):
        self.files = files
        self.sizes = [os.path.getsize(path) for _, path in files]
        self.size = sum(self.sizes)
        self.n_rows = 0  # that were read
        self.n_bytes = 0  # that were read of the files, as they lie on the disk

    def pieces(self, state):
        n_done = state or 0
        self.n_rows = 0
        seen = set()
        for i, (split, path) in enumerate(self.files):
            start = formats.text_start(path)
            with formats.opened(path) as (file, raw):
                formats.go_to(file, start)
                is_checked = False
                for number, line in formats.whole_lines(file, path, 0):
                    place = f"line {number:,} of {printable(path)}"
                    if line.strip() and not is_checked:
                        need_object(line, place)
                        is_checked = True
                    self.n_rows += 1
                    self.n_bytes = sum(self.sizes[:i]) + raw.tell()
                    piece = piece_of(line, place, split, seen)
                    if self.n_rows > n_done:
                        yield piece

    def state(self):
        return self.n_rows

    def fraction(self):
        return self.n_bytes / self.size


def need_object(line, place):
    """Exit with 2 if a line, the first of a file, is not a JSON object, whatever is in it."""
    remedy = "plain text is for prepare/text.py"
    if line.strip() == b"{":
        remedy = "of objects on several lines: jq -c . FILE > FILE.jsonl"
    elif line.startswith(b"["):
        remedy = "of a JSON array: jq -c '.[]' FILE > FILE.jsonl"
    try:
        is_object = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):  # also if it is not UTF-8
        is_object = False
    if not is_object:
        start = printable(line[:40].strip().decode(errors="replace"))
        fail(f"{place} is {start!r}; expected one JSON object a line; {remedy}")


def piece_of(line, place, split, seen):
    """Return the piece that a line (bytes) is; seen: the hashes of conversations before it, a set."""
    if not line.strip():
        return None, "empty", place, ""
    try:
        messages = chat.messages_of(json.loads(line))
        chat.check(messages)
    except chat.BadConversation as error:
        return None, "malformed", f"{place}: {shown(error)}", ""
    except (ValueError, RecursionError) as error:
        return None, "malformed", f"{place}: not JSON: {shown(error)}", ""
    text = json.dumps(messages)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        return None, "duplicate", place, ""
    seen.add(digest)
    return split, text, place, True


def shown(error):
    """Return an error, which may quote a row, as a short line."""
    return printable(str(error))[:200]


def encode_chunk(window, pieces):
    """Return {split: (ids (W, window), conversations, bytes of answers, mask (W, window), how many were cut,
    [(reason, place) of those that are not used])} of pieces; for a worker (workers.py)."""
    tokenizer, spec, dtype = workers.worker
    parts = collections.defaultdict(lambda: ([], collections.Counter(), []))
    for split, text, place, _ in pieces:
        rows, counts, skipped = parts[split]
        messages = json.loads(text)
        try:
            ids, mask = chat.encode(tokenizer, spec, messages)
        except ValueError as error:  # also a BadConversation
            skipped.append(("not encoded", f"{place}: {shown(error)}"))
            continue
        ends = [
            i + 1
            for i, (token, is_learned) in enumerate(zip(ids, mask))
            if is_learned and token == spec["eot"]
        ]
        fitting = [end for end in ends if end <= window]
        if not fitting:
            skipped.append(("too long", f"{place}: its first turn has {ends[0]:,} tokens"))
            continue
        rows.append((ids[: fitting[-1]], mask[: fitting[-1]]))
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        counts["bytes"] += sum(len(answer.encode()) for answer in answers[: len(fitting)])
        counts["cut"] += len(fitting) < len(ends)
    result = {}
    for split, (rows, counts, skipped) in parts.items():
        ids, mask = in_windows(rows, window, spec["eot"], dtype)
        result[split] = (ids, len(rows), counts["bytes"], mask, counts["cut"], skipped)
    return result


def in_windows(rows, window, eot, dtype):
    """Return (ids, mask), each (W, window), of rows (ids, mask) of at most `window` tokens."""
    places = packed([len(ids) for ids, _ in rows], window)
    all_ids = np.full((len(places), window), eot, dtype)
    all_masks = np.zeros((len(places), window), np.uint8)
    for w, numbers in enumerate(places):
        start = 0
        for number in numbers:
            ids, mask = rows[number]
            all_ids[w, start : start + len(ids)] = ids
            all_masks[w, start : start + len(ids)] = mask
            start += len(ids)
    return all_ids, all_masks


def packed(lengths, window):
    """Return the numbers of the rows in each window, by best fit: rows of decreasing length, each into the
    fullest window that has room for it. Windows are in the order of their first rows."""
    windows = []
    rooms = []  # (tokens left, number of the window), sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        at = bisect.bisect_left(rooms, (length, 0))
        if at == len(rooms):
            windows.append([])
            room, w = window, len(windows) - 1
        else:
            room, w = rooms.pop(at)
        windows[w].append(number)
        bisect.insort(rooms, (room - length, w))
    return sorted(sorted(numbers) for numbers in windows)


class MaskedSplit:
    """The token files of one split, and their masks. A shard has as many whole windows as fit, and one
    end-of-text token of mask 0 more, the last target of its last window."""

    def __init__(self, folder, name, n, progress):
        self.window = progress["window"]
        size = (token_files.SHARD_TOKENS - 1) // self.window * self.window + 1
        dtype = token_files.dtype_of(progress["vocab_size"])
        self.ids = token_files.Split(folder, name, dtype, n, progress["shards"], ".bin", size)
        self.mask = token_files.Split(folder, name, np.dtype("u1"), n, progress["masks"], ".mask", size)
        self.last = np.array([progress["eot"]], dtype)

    @property
    def n(self):
        return self.ids.n

    def write(self, ids, mask):
        """Append windows: ids and mask, each (W, window)."""
        while len(ids):
            size = self.ids.size
            room = (size - self.n % size) // self.window
            self.ids.write(ids[:room].ravel())
            self.mask.write(mask[:room].ravel())
            if self.n % size == size - 1:
                self.end_shard()
            ids = ids[room:]
            mask = mask[room:]

    def end_shard(self):
        """Write the token after the last window of the shard under way, unless it has it."""
        n = self.n % self.ids.size
        if n and n % self.window == 0:
            self.ids.write(self.last)
            self.mask.write(np.zeros(1, np.uint8))

    def sync(self):
        self.ids.sync()
        self.mask.sync()

    def close(self):
        self.ids.close()
        self.mask.close()

    def finish(self):
        self.ids.finish()
        self.mask.finish()


class Writer(token_files.Writer):
    """The token files and masks of conversations. Training cannot begin before they are complete."""

    def __init__(self, cfg, folder, progress):
        self.cfg = cfg
        progress["window"] = cfg.window
        progress.setdefault("masks", {})
        progress.setdefault("counted", {})
        progress.setdefault("cut", 0)
        progress["skipped"] = collections.Counter(progress.get("skipped", {}))
        super().__init__(folder, progress)

    def split(self, name, n):
        return MaskedSplit(self.folder, name, n, self.progress)

    def add(self, name, ids, documents, size, mask, n_cut, skipped):
        """Append what encode_chunk returns for a split."""
        while_reading = self.progress["mark"].get("skipped", {})
        for reason, place in skipped:
            chunks.skip(self.cfg, self.progress["skipped"], reason, place, while_reading)
        if not documents:
            return
        if name not in self.splits:
            self.splits[name] = self.split(name, 0)
        self.splits[name].write(ids, mask)
        self.progress["cut"] += n_cut
        for key, more in (("documents", documents), ("bytes", size), ("counted", int(mask.sum()))):
            self.progress[key][name] = self.progress[key].get(name, 0) + more

    def finish(self):
        for split in self.splits.values():
            split.end_shard()
        super().finish()

    def write_meta(self, **fields):
        if not fields.get("complete", True):
            return
        masks = self.progress["masks"]
        shards = {
            name: entry | {"mask_sha256": masks[mask_of(name)]["sha256"]}
            for name, entry in self.progress["shards"].items()
        }
        super().write_meta(shards=shards)
