"""Faults that tests inject into processes: conftest.run takes faults.nan_loss_at(2) as its `patch`, as do
documents.prepare and Preparation. Two patches are joined with +."""

import functools
import importlib
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def literal(value):
    """Return the source of a value; that of a signal is its number."""
    if isinstance(value, signal.Signals):
        value = int(value)
    return repr(value)


def injected(function):
    """Make a function return the program that calls it in another process, instead of being called here."""

    @functools.wraps(function)
    def program(*args, **options):
        arguments = [literal(value) for value in args]
        arguments += [f"{key}={literal(value)}" for key, value in options.items()]
        setup = f"import sys; sys.path.append({HERE!r}); import faults"
        return f"{setup}; faults.{function.__name__}.__wrapped__({', '.join(arguments)})\n"

    return program


# preparations


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

    def encoded(chunks, n_workers, spec, dtype):
        workers.load(spec, dtype)
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


# exports


@injected
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


@injected
def stuck_rename(path):
    """Let no file or folder be renamed to `path`."""

    def fail(rename):
        raise OSError("stuck")

    on_rename(path, fail)


@injected
def interrupt_after_rename(path):
    """Send Ctrl-C once something is renamed to `path`."""

    def interrupt(rename):
        rename()
        os.kill(os.getpid(), signal.SIGINT)

    on_rename(path, interrupt)


@injected
def interrupt_after_write(name):
    """Send Ctrl-C once a module of nanobit.export has written its files, before they are renamed."""
    module = importlib.import_module(f"nanobit.export.{name}")
    real = module.write

    def write(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGINT)

    module.write = write


@injected
def files_of_at_most(n):
    """Let no file become larger than n bytes, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


@injected
def bad_verdict():
    """Let every export differ from its run."""
    from nanobit.export import verify

    verify.hf = lambda *args: dict(good=False)


@injected
def not_installed(*names):
    """Let these modules be missing."""
    sys.modules |= dict.fromkeys(names)


@injected
def spy_on_prompts(name):
    """Print the token with which each prompt that a module of nanobit encodes begins."""
    module = importlib.import_module(f"nanobit.{name}")
    real = module.encode_prompt

    def spy(tokenizer, bos, text):
        print("begins", bos)
        return real(tokenizer, bos, text)

    module.encode_prompt = spy


# training


def before_call(owner, name, action):
    """Call action(number) before each call of owner.name, whose calls are counted from 1."""
    real = getattr(owner, name)
    number = 0

    def counted(*args, **options):
        nonlocal number
        number += 1
        action(number)
        return real(*args, **options)

    setattr(owner, name, counted)


def before_update(action):
    """Call action(number) before each step of AdamW."""
    import torch

    before_call(torch.optim.AdamW, "step", action)


def after_training_forward(change):
    """Replace the loss of each training forward by change(loss, its number from 1). DDP makes one before the
    first step."""
    from model import Transformer

    real = Transformer.forward
    number = 0

    def forward(self, idx, targets=None, cache=None):
        nonlocal number
        out = real(self, idx, targets, cache)
        if targets is None or not self.training:
            return out
        number += 1
        return change(out[0], number), out[1]

    Transformer.forward = forward


def is_rank(rank):
    return rank is None or os.environ["RANK"] == str(rank)


@injected
def nan_loss_at(*numbers):
    """Make the loss of these training forwards NaN, and so their gradients."""
    after_training_forward(lambda loss, number: loss * float("nan") if number in numbers else loss)


@injected
def nan_loss_always():
    after_training_forward(lambda loss, number: loss * float("nan"))


@injected
def nan_loss_without_gradient(number, rank):
    """Make the loss of one training forward of one rank NaN, and leave its gradients finite."""

    def change(loss, n):
        return loss + float("nan") if n == number and is_rank(rank) else loss

    after_training_forward(change)


@injected
def error_in_training():
    """Raise KeyError: 'x' in the first training forward, as a mistake in the code of a model would."""
    after_training_forward(lambda loss, number: {}["x"])


@injected
def out_of_memory():
    """Raise what torch raises if the memory of a GPU does not suffice."""
    import torch

    def fail(loss, number):
        raise torch.OutOfMemoryError("CUDA out of memory")

    after_training_forward(fail)


@injected
def infinite_gradient_at(number, name):
    """Make the gradient of the parameter with this name infinite in the backward with this number."""
    from nanobit import optim

    real = optim.make_optimizers
    count = 0

    def hook(grad):
        nonlocal count
        count += 1
        return grad * float("inf") if count == number else grad

    def make_optimizers(cfg, model, dtype):
        model.get_parameter(name).register_hook(hook)
        return real(cfg, model, dtype)

    optim.make_optimizers = make_optimizers


@injected
def loss_scale(start):
    """Begin with this scale of the loss."""
    import torch

    real = torch.amp.GradScaler.__init__
    torch.amp.GradScaler.__init__ = lambda self, *a, **k: real(self, *a, init_scale=start, **k)


@injected
def nan_validation_at(number):
    """Make the validation loss of the evaluation with this number NaN."""
    from nanobit import metrics

    real = metrics.mean_loss
    count = 0

    def mean_loss(*args, **options):
        nonlocal count
        count += 1
        return float("nan") if count == number else real(*args, **options)

    metrics.mean_loss = mean_loss


@injected
def rates(stage2_lr, min_lr):
    """Give every cfg the rates that were settings before they were ratios."""
    import config

    real = config.load

    def load(*args, **options):
        cfg = real(*args, **options)
        cfg.stage2_lr = stage2_lr
        cfg.min_lr = min_lr
        return cfg

    config.load = load


@injected
def slow_updates(seconds):
    before_update(lambda number: time.sleep(seconds))


@injected
def signal_at_update(number, signum, rank=None, restarts=None):
    """Send the process a signal before its update with this number: on one rank only, and only if torchrun
    has restarted the ranks so many times, if that is given."""

    def action(n):
        is_start = restarts is None or os.environ["TORCHELASTIC_RESTART_COUNT"] == str(restarts)
        if n == number and is_rank(rank) and is_start:
            os.kill(os.getpid(), signum)

    before_update(action)


@injected
def signal_in(module, function, number, signum):
    """Send the process a signal in the call with this number of a function of nanobit."""

    def action(n):
        if n == number:
            os.kill(os.getpid(), signum)

    before_call(importlib.import_module(f"nanobit.{module}"), function, action)


@injected
def truncate_at_update(number, path, size):
    """Cut a file to this size before an update."""
    before_update(lambda n: n == number and os.truncate(path, size))


@injected
def time_is_over(rank):
    """Make the clock of one rank show that the run has lasted for years."""
    from nanobit import machine

    if is_rank(rank):
        machine.Speedometer.seconds = lambda self: 1e9


@injected
def float32_muon():
    """Make Muon iterate in float32 on CPUs with bfloat16 units too."""
    import torch

    from nanobit import machine

    machine.matrix_dtype = lambda device: torch.float32


@injected
def second_machine(data_dir):
    """Make rank 1 the first rank of another machine, with its own copy of the data."""
    from nanobit import cli

    if is_rank(1):
        cli.LOCAL_RANK = 0
        sys.argv.append(f"--data_dir={data_dir}")


@injected
def change_weights_at(step):
    """Double the weights of a model with kept codes before the update with this number, from 0."""
    import torch

    import quant
    from nanobit import data

    models = []
    real = quant.keep_codes
    quant.keep_codes = lambda model, *args: (models.append(model), real(model, *args))

    def action(n):
        if n == step + 1:
            with torch.no_grad():
                models[-1].blocks[0].attn.q_proj.weight.mul_(2)

    before_call(data.Windows, "last_sample", action)


# saving


def own_os(module):
    """Give a module a copy of the module os, so that a change of it reaches that module only."""
    module.os = type(os)("os")
    module.os.__dict__.update(os.__dict__)
    return module.os


@injected
def kill_in_save(function, number):
    """Kill the process in a call, with this number, of os.fsync or os.rename for a checkpoint."""
    from nanobit import saving

    def action(n):
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    before_call(own_os(saving), function, action)


@injected
def no_room_for_saves(first, last=10**9):
    """Fail as a full disk does in the calls of os.fsync for a checkpoint from `first` to `last`."""
    from nanobit import saving

    def action(n):
        if first <= n <= last:
            raise OSError(28, "No space left on device")

    before_call(own_os(saving), "fsync", action)


@injected
def no_waiting():
    """Let time.sleep return immediately."""
    time.sleep = lambda seconds: None


@injected
def endless_save():
    from nanobit import saving

    saving.save = lambda *args: time.sleep(100)


# terminals


@injected
def in_terminal(name, streams=(0, 1, 2)):
    """Give the process its own session in the terminal with this name, and connect these streams to it."""
    os.setsid()
    handle = os.open(name, os.O_RDWR)  # the first one that a session opens becomes its terminal
    for number in streams:
        os.dup2(handle, number)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)


# imports


@injected
def print_modules():
    """Print the names of all loaded modules when train.py leaves its ranks, at its end."""
    import sys

    from nanobit import distributed

    before_call(distributed, "stop", lambda number: print("modules:", *sorted(sys.modules), file=sys.stderr))


@injected
def print_modules_at_exit():
    """Print the names of the modules that are loaded from now on, when the interpreter ends."""
    import atexit
    import sys

    before = set(sys.modules)  # what a sitecustomize has loaded is not the script's
    atexit.register(lambda: print("modules:", *sorted(set(sys.modules) - before), file=sys.stderr))
