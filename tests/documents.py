"""Documents for the tests of preparations, how these are run, and what they wrote."""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import time
from unittest import mock

import numpy as np
import prepare_faults
import tiktoken
import torch
from conftest import ROOT, start
from fork import Script

from nanobit import data
from nanobit.prepare import chunks, formats, stream, token_files, workers
from nanobit.tokenizer import bos_of, make_tokenizer, with_content

WORDS = (
    "the cat sat on a mat, saw 12 birds; caf\u00e9 \u65e5\u672c \U0001f600 l'\u00e9t\u00e9\tTom  said".split(
        " "
    )
)
SPACES = [" ", " ", " ", "\n", "\n\n", "  "]


def texts(n=300, seed=0):
    """Return documents of a few hundred characters, with line ends, runs of spaces and characters of all
    widths."""
    rng = np.random.default_rng(seed)
    word = lambda: WORDS[rng.integers(len(WORDS))] + SPACES[rng.integers(len(SPACES))]  # noqa: E731
    return ["".join(word() for _ in range(rng.integers(20, 120))) for _ in range(n)]


def text_flags(folder, data_dir, files="docs.jsonl", tokenizer="char", **more):
    flags = (
        dict(files=folder / files, column="body", tokenizer=tokenizer, data_dir=data_dir, workers=1) | more
    )
    return [f"--{key}={value}" for key, value in flags.items()]


def read(folder):
    """Return ({split: ids}, meta, tokenizer) of a data set."""
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
    """Return {split: [text of each document]}, decoded."""
    ids, meta, tokenizer = read(folder)
    found = {}
    for split, row in ids.items():
        begins = [meta["bos"]] if "bos" in meta else []
        # without bos the end of a text stands before the first one, too
        assert row[0] == bos_of(meta)
        assert row[-1] == meta["eot"]
        found[split], text = [], []
        for token in row if begins else row[1:]:
            if token == meta["eot"]:
                assert text[: len(begins)] == begins
                assert not set(text[len(begins) :]) & {*begins}
                found[split].append(tokenizer.decode(text))
                text = []
            else:
                text.append(token)
        assert meta["bytes"][split] == sum(len(text.encode()) for text in found[split])
        assert meta["documents"][split] == len(found[split])
    return found


def prepare(*flags, patch="", code=0, script="text"):
    """Run prepare/<script>.py in this process, tokenizing here too; return (stdout, stderr)."""
    return run_here(f"prepare/{script}.py", *flags, patch=prepare_faults.tokenize_here() + patch, code=code)


def run_here(script, *flags, patch="", code=0):
    """Run a script of the project, which must end with this exit code, in this process; return (stdout,
    stderr). patch: of faults.py, undone afterwards if PATCHED names what it changes."""
    out, err = io.StringIO(), io.StringIO()
    handler, path = signal.getsignal(signal.SIGINT), sys.path[:]
    chunks.show_once.cache_clear()
    with contextlib.ExitStack() as stack:
        for owner, name in PATCHED:
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        exec(patch, {})
        stack.enter_context(torch.enable_grad())  # restores the mode that export.py leaves
        stack.enter_context(mock.patch.object(sys, "argv", [script, *map(str, flags)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        ended = 0
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
        except SystemExit as end:
            ended = end.code
        finally:
            signal.signal(signal.SIGINT, handler)
            sys.path[:] = path
    assert ended == code, f"exit code {ended}, expected {code}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


PATCHED = [
    (chunks, "CHUNK_CHARS"),
    (formats, "LONGEST"),
    (stream, "SAVE_SECONDS"),
    (stream, "spec_of"),
    (token_files, "SHARD_TOKENS"),
    (token_files, "write_bytes"),
    (token_files.Split, "write"),
    (workers, "encoded"),
    (os, "fsync"),
    (shutil, "disk_usage"),
    (tiktoken, "get_encoding"),
]


class Preparation:
    """A preparation in a process of its own, with worker processes or, which starts sooner, without."""

    def __init__(self, flags, place, patch="", script="text", has_workers=False):
        self.place = place
        script = f"prepare/{script}.py"
        patch = prepare_faults.small() + patch
        if has_workers:
            self.child = start(script, *flags, patch=patch)
        else:
            self.child = Script(
                os.path.join(ROOT, script), flags, ROOT, patch + prepare_faults.tokenize_here()
            )

    def ended(self):
        if isinstance(self.child, Script):
            return self.child.ended()
        return self.child.poll() is not None

    def wait(self, timeout=60):
        """Return (exit code, stdout, stderr)."""
        if isinstance(self.child, Script):
            return self.child.wait(timeout)
        out, err = self.child.communicate(timeout=timeout)
        return self.child.returncode, out, err

    def until(self, condition):
        """Wait for a condition, which must come before the process ends."""
        deadline = time.time() + 100
        while not condition():
            assert not self.ended() and time.time() < deadline, self.wait(0)
            time.sleep(0.01)

    def written(self):
        """Return the number of tokens that progress.json counts."""
        return sum(stream.read_json(self.place / "progress.json").get("tokens", {}).values())

    def kill(self, how=signal.SIGKILL):
        if isinstance(self.child, Script):
            self.child.kill(how)
        else:
            self.child.send_signal(how)
        return self.wait()


def stopped(flags, place, tokens_written=3000, **options):
    """Return the progress of a preparation that was killed when about so many tokens were written.
    It holds there until it is killed, however busy the machine is."""
    child = Preparation(flags, place, prepare_faults.hold_at(tokens_written + 2000), **options)
    child.until(lambda: child.written() > max(0, tokens_written - 1000))
    child.kill()
    return stream.read_json(place / "progress.json")


def started(flags, place, patch="", **options):
    """Return a preparation that holds its lock."""
    child = Preparation(flags, place, patch or prepare_faults.slow_writes(), **options)
    child.until(lambda: data.is_being_written(place))
    return child
