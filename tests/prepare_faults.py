"""Faults of preparations, see injection.py."""

import json
import os
import sys
import time

from injection import injected


@injected
def small(longest=0):
    """Make chunks, shards, and perhaps blocks of files, small, and save after every chunk."""
    from nanobit.prepare import chunks, formats, stream, token_files

    stream.SAVE_SECONDS = 0
    chunks.CHUNK_CHARS = 2000
    token_files.SHARD_TOKENS = 4096
    formats.LONGEST = longest or formats.LONGEST


@injected
def tokenize_here():
    """Tokenize in the process itself: no worker process has to start."""
    from nanobit.prepare import workers

    def encoded(chunks, n_workers, spec, dtype, encode):
        workers.load(spec, dtype)
        for pieces, mark, share in chunks:
            yield encode(pieces), mark, share

    workers.encoded = encoded


def before_write(action):
    """Call action(split, ids) before each write of token files."""
    from nanobit.prepare import token_files

    real = token_files.Split.write

    def write(self, ids):
        action(self, ids)
        real(self, ids)

    token_files.Split.write = write


@injected
def slow_writes(seconds=0.02):
    before_write(lambda split, ids: time.sleep(seconds))


@injected
def hold_writes(path):
    """Wait with every write until there is a file at path."""

    def hold(split, ids):
        while not os.path.exists(path):
            time.sleep(0.01)

    before_write(hold)


@injected
def hold_at(n_tokens):
    """Wait for ever with the write after which a split would have more than n_tokens."""

    def hold(split, ids):
        while split.n + ids.size > n_tokens:
            time.sleep(1)

    before_write(hold)


@injected
def full_disk(after):
    """Fail in the write after so many, as a disk without room: a part of the tokens reaches the file."""
    from nanobit.prepare import token_files

    real, count = token_files.Split.write, 0

    def write(self, ids):
        nonlocal count
        count += 1
        if count > after:
            real(self, ids[:7])
            raise OSError(28, "No space left on device")
        real(self, ids)

    token_files.Split.write = write


@injected
def free_bytes(n):
    import shutil

    shutil.disk_usage = lambda path: type("", (), {"free": n})


@injected
def no_tokenizer():
    """End with exit code 2 where a preparation that continues reads its tokenizer."""
    from nanobit.prepare import stream

    stream.spec_of = lambda *args: stream.fail("no")


@injected
def small_tiktoken():
    """Replace every encoding of tiktoken by a small one, without a network."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" a": 258}
    how = dict(pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 259})
    encoding = tiktoken.Encoding("gpt2", **how)
    tiktoken.get_encoding = lambda name: encoding


@injected
def check_order_on_disk():
    """Check that tokens are flushed before progress.json counts them, and that meta.json follows it."""
    from nanobit.prepare import stream, token_files

    synced, fsync, write_bytes = set(), os.fsync, token_files.write_bytes

    def note(handle):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def write(path, content):
        found = json.loads(content)
        if path.endswith("progress.json") and "tokens" in found:
            names = {f"{split}_{n // 4096:05d}.bin.partial" for split, n in found["tokens"].items()}
            assert names <= synced, (names, synced)
            synced.clear()
        if path.endswith("meta.json") and not found["complete"]:
            progress = stream.read_json(os.path.join(os.path.dirname(path), "progress.json"))
            assert (found["tokens"], found["shards"]) == (progress["tokens"], progress["shards"])
            print("checked", file=sys.stderr)
        write_bytes(path, content)

    os.fsync, token_files.write_bytes = note, write
