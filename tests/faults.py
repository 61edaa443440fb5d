"""Faults that tests inject into processes: conftest.run takes inject("full_disk(3)") as its `patch`."""

import importlib
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def inject(*calls):
    """Return the program that calls these functions of this file in another process."""
    lines = [f"import sys; sys.path.append({HERE!r}); import faults"]
    return "\n".join(lines + [f"faults.{call}" for call in calls]) + "\n"


# preparations


def small(longest=0):
    """Make chunks, shards, and perhaps blocks of files, small, and save after every chunk."""
    from nanobit.prepare import chunks, formats, stream, token_files

    stream.SAVE_SECONDS = 0
    chunks.CHUNK_CHARS = 2000
    token_files.SHARD_TOKENS = 4096
    formats.LONGEST = longest or formats.LONGEST


def tokenize_here():
    """Tokenize in the process itself: no worker process has to start."""
    from nanobit.prepare import workers

    def encoded(chunks, n_workers, spec, marks, dtype):
        workers.load(spec, marks, dtype)
        for pieces, mark, share in chunks:
            yield workers.encode_chunk(pieces), mark, share

    workers.encoded = encoded


def before_write(action):
    """Call action(split, ids) before each write of token files."""
    from nanobit.prepare import token_files

    real = token_files.Split.write

    def write(self, ids):
        action(self, ids)
        real(self, ids)

    token_files.Split.write = write


def slow_writes(seconds=0.02):
    before_write(lambda split, ids: time.sleep(seconds))


def hold_writes(path):
    """Wait with every write until there is a file at path."""

    def hold(split, ids):
        while not os.path.exists(path):
            time.sleep(0.01)

    before_write(hold)


def hold_at(n_tokens):
    """Wait for ever with the write after which a split would have more than n_tokens."""

    def hold(split, ids):
        while split.n + ids.size > n_tokens:
            time.sleep(1)

    before_write(hold)


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


def free_bytes(n):
    import shutil

    shutil.disk_usage = lambda path: type("", (), {"free": n})


def no_tokenizer():
    """End with exit code 2 where a preparation that continues reads its tokenizer."""
    from nanobit.prepare import stream

    stream.with_content = lambda *args: stream.fail("no")


def small_tiktoken():
    """Replace every encoding of tiktoken by a small one, without a network."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" a": 258}
    how = dict(pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 259})
    encoding = tiktoken.Encoding("gpt2", **how)
    tiktoken.get_encoding = lambda name: encoding


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


# exports


def folder_meanwhile(folder):
    """Make a folder with a file in the place of an export while it is written."""
    from nanobit.export import hf

    real = hf.write

    def write(*args):
        real(*args)
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, "diary.txt"), "w").close()

    hf.write = write


def on_rename(path, action):
    """Call action(rename) in place of a rename to `path`."""
    real = os.replace

    def replace(old, new):
        if new == path:
            action(lambda: real(old, new))
        else:
            real(old, new)

    os.replace = replace


def stuck_rename(path):
    """Let no file or folder be renamed to `path`."""

    def fail(rename):
        raise OSError("stuck")

    on_rename(path, fail)


def interrupt_after_rename(path):
    """Send Ctrl-C once something is renamed to `path`."""

    def interrupt(rename):
        rename()
        os.kill(os.getpid(), signal.SIGINT)

    on_rename(path, interrupt)


def interrupt_after_write(name):
    """Send Ctrl-C once a module of nanobit.export has written its files, before they are renamed."""
    module = importlib.import_module(f"nanobit.export.{name}")
    real = module.write

    def write(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGINT)

    module.write = write


def files_of_at_most(n):
    """Let no file become larger than n bytes, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def bad_verdict():
    """Let every export differ from its run."""
    from nanobit.export import verify

    verify.hf = lambda *args: dict(good=False)


def not_installed(*names):
    """Let these modules be missing."""
    sys.modules |= dict.fromkeys(names)


def spy_on_prompts(name):
    """Print the token with which each prompt that a module of nanobit encodes begins."""
    module = importlib.import_module(f"nanobit.{name}")
    real = module.encode_prompt

    def spy(tokenizer, bos, text):
        print("begins", bos)
        return real(tokenizer, bos, text)

    module.encode_prompt = spy
