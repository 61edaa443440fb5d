"""Comparisons of tiny runs, by compare.py in this process."""

import contextlib
import io
import os
import signal
import subprocess
from unittest import mock

import pytest
from conftest import RUN, flags, result_of
from fork import Script

import compare
from nanobit.compare import runs

SMALL = RUN | dict(max_steps=8, eval_every=4, sample_every=0, save_every=3, dataset="tiny")
NULL = "log_every=2"  # the settings of a variant that changes nothing


class Forked:
    """A stand-in for subprocess.Popen: train.py, forked from a process that has imported torch."""

    patch = ""

    def __init__(self, command, **options):
        flags = dict(arg[2:].split("=", 1) for arg in command[2:])
        self.path = os.path.join(flags["out_dir"], flags["run_id"])
        self.script = Script(command[1], command[2:], os.getcwd(), self.patch)

    def communicate(self, timeout):
        self.script.process.join(timeout)
        if not self.script.ended():
            raise subprocess.TimeoutExpired("train.py", timeout)
        self.returncode = self.script.process.exitcode
        return self.script.output()

    def send_signal(self, signum):
        self.script.kill(signum)


def no_run(*args, **options):
    """Fail the test, instead of starting a run."""
    pytest.fail("a run was started")


def call(*argv, popen=Forked):
    """Run compare.py in this process; return (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # ignored if the tests were started in the background
            stack.callback(signal.signal, signum, signal.signal(signum, signal.SIG_DFL))
        stack.enter_context(mock.patch.object(subprocess, "Popen", popen))
        stack.enter_context(mock.patch.object(runs, "received", []))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            compare.main(list(argv))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def arguments(data_dir, out_dir, *tries, **changes):
    """Return the command line of a comparison of tiny runs."""
    values = SMALL | dict(data_dir=data_dir, out_dir=out_dir, run_id="c", seeds=1) | changes
    return [*flags(**values), *(f"--try={text}" for text in tries)]


def compared(data_dir, out_dir, *tries, popen=Forked, **changes):
    """Return the result of a comparison of tiny runs that must succeed."""
    code, out, err = call(*arguments(data_dir, out_dir, *tries, **changes), popen=popen)
    assert code == 0, err
    return result_of(out)


def folders(out_dir):
    """Return the folders in that of a comparison."""
    folder = f"{out_dir}/compare/c"
    return [entry.path for entry in os.scandir(folder) if entry.is_dir()] if os.path.isdir(folder) else []
