"""Small checkpoints, whole and damaged, for the tests of what writes and reads them."""

import contextlib
import hashlib
import io
import os

import pytest
import torch
from parts import part_of

from nanobit import checkpoint, saving
from nanobit.files import write_json


def save(run_dir, step):
    """Save a checkpoint whose weights are its step; returns its folder."""
    part = dict(format=1, step=step, model={"w": torch.full((1000,), float(step))})
    return saving.save(str(run_dir), step, part, dict(format=checkpoint.FORMAT, step=step, optimizer={}))


def write(run_dir, step=60, content=None, trainer=None, **changes):
    """Save a checkpoint of a random model of run r with these changes, or with these bytes as checkpoint.pt,
    and a manifest that agrees; returns its folder."""
    part = part_of() | dict(format=checkpoint.FORMAT, step=step)
    part["config"]["run_id"] = "r"
    part |= {key: part[key] | value if type(value) is dict else value for key, value in changes.items()}
    state = dict(format=checkpoint.FORMAT, step=step, optimizer=[], best={}, stale_evals=0, skipped=[0, 0])
    state |= dict(scaler={}, data=dict(complete=True, shards={}))
    folder = saving.save(run_dir, step, part, state | (trainer or {}))
    if content is not None:
        with open(os.path.join(folder, checkpoint.MODEL), "wb") as file:
            file.write(content)
        entry = {checkpoint.MODEL: dict(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())}
        write_json(os.path.join(folder, "manifest.json"), {"files": entry})
    return folder


def flip(path, at=-200, bit=1):
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte[0] ^ bit]))


def no_room(*args, **options):
    """Fail as a full disk does."""
    raise OSError(28, "No space left on device")


def refusal(function, *args):
    """Return the lines on stderr of a call that exits with 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    return err.getvalue()
