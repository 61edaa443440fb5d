"""Faults of exports and of the commands that use a model, see injection.py."""

import importlib
import os
import signal
import sys

from injection import injected


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
def no_node():
    """Let Node be missing."""
    from nanobit.export.web import node

    node.is_installed = lambda: False


@injected
def no_rounding():
    """Let --verify find every page rounded too far."""
    from nanobit.export import verify

    verify.STEPS = dict(int8=0.0, f16=0.0)


@injected
def spy_on_prompts(name):
    """Print the token with which each prompt that a module of nanobit encodes begins."""
    module = importlib.import_module(f"nanobit.{name}")
    real = module.encode_prompt

    def spy(tokenizer, bos, text):
        print("begins", bos)
        return real(tokenizer, bos, text)

    module.encode_prompt = spy
