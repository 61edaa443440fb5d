"""What the commands share: errors, the rank of this process, optional libraries."""

import importlib
import importlib.util
import os
import sys

from nanobit import terminal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what torchrun says of this process: facts, not settings
RANK, WORLD, LOCAL_RANK = (
    int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)
REQUIRED = "torch", "numpy", "tqdm", "filelock"
on_fail = []  # functions that fail() hands its faults to, as one text, before it exits


def fail(*faults, code=2):
    """print each fault as an `error:` line on stderr and exit, with 2 for a user's mistake"""
    print(*(f"error: {fault}" for fault in faults), sep="\n", file=sys.stderr)
    for note in on_fail:
        note("; ".join(faults))
    raise SystemExit(code)


def explain_missing(kind, error, trace):
    """Print one line with the remedy if a required module is missing, and exit with 2; an excepthook."""
    if not (issubclass(kind, ModuleNotFoundError) and error.name in REQUIRED):
        return sys.__excepthook__(kind, error, trace)
    venv = os.path.join(ROOT, ".venv")
    how = "install the requirements first: make setup, or pip install -r requirements.txt"
    if os.path.isdir(venv) and os.path.realpath(sys.prefix) != os.path.realpath(venv):
        windows, others = [f"{venv}\\Scripts\\activate"], ["source", f"{venv}/bin/activate"]
        activate = terminal.command_line(windows if os.name == "nt" else others)
        how = f"activate the environment first: {activate}"
    fail(f"{sys.executable} has no module {error.name}; {how}")


def library(name, package=""):
    """an optional library, imported where it is needed; exits with 2 and how to install it where it is not
    there"""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        fail(f"this needs {package or name}, which is not installed: pip install {package or name}")


def need_packages(names, extra):
    """Exit with 2 if packages are missing, naming all of them and the extra of pyproject.toml with them."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        how = (
            f'pip install {" ".join(missing)}, or, in the folder of this project, pip install -e ".[{extra}]"'
        )
        fail(f"this needs {', '.join(missing)}, not installed: {how}")


sys.excepthook = explain_missing  # every command imports this file before torch and numpy
