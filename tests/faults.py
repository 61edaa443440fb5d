"""Faults of training, of its saves and of its terminal, see injection.py."""

import importlib
import os
import signal
import sys
import time

from injection import before_call, injected, own_os

# training


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

    def forward(self, idx, targets=None, divisor=None, cache=None):
        nonlocal number
        out = real(self, idx, targets, divisor, cache)
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
def validation_loss(number, loss):
    """Set the validation loss of the evaluation with this number: a float or "nan"."""
    from nanobit import metrics

    real = metrics.mean_loss
    count = 0

    def mean_loss(*args, **options):
        nonlocal count
        count += 1
        return float(loss) if count == number else real(*args, **options)

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
    from nanobit import metrics

    if is_rank(rank):
        metrics.Speedometer.seconds = lambda self: 1e9


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

    from nanobit import data, kept_codes

    models = []
    real = kept_codes.keep_codes
    kept_codes.keep_codes = lambda model, *args: (models.append(model), real(model, *args))

    def action(n):
        if n == step + 1:
            with torch.no_grad():
                models[-1].blocks[0].attn.q_proj.weight.mul_(2)

    before_call(data.Windows, "last_sample", action)


# saving


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


# comparisons


@injected
def forked_runs(seconds):
    """Let compare.py fork train.py from its process, which has imported torch, with updates that take so many
    seconds more."""
    import subprocess
    from types import SimpleNamespace

    import fork

    from nanobit.compare import runs

    class Forked:
        def __init__(self, command, **pipes):
            self.pid = os.fork()
            if not self.pid:
                os.setsid()
                try:
                    what = (os.getcwd(), dict(os.environ), command[1], command[2:], slow_updates(seconds))
                    fork.main(os.devnull, os.devnull, *what)
                finally:
                    os._exit(0)

        def communicate(self, timeout):
            pid, self.returncode = os.waitpid(self.pid, 0)
            return "", ""

    runs.subprocess = SimpleNamespace(**vars(subprocess) | dict(Popen=Forked))
