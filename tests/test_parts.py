"""Damaged and hostile checkpoints: what is wrong costs one line, and no code in a file is run."""

import io
import math
import os
import pickle
import zipfile

import pytest
import torch
from checkpoints import refusal, write
from parts import part_of

from nanobit import checkpoint, saving, weights
from nanobit.checkpoint import TRAINER


class Evil:
    """What makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Return the folder that Evil makes."""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    return tmp_path / "evil"


def saved(value):
    """Return the bytes of what torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def bomb():
    """Return a checkpoint.pt of a few kilobytes with 100 MB of zeros in the place of a tensor of 4 kB."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.ones(1000)))) as small:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name in small.namelist():
                file.writestr(name, bytes(10**8) if name.endswith("data/0") else small.read(name))
    return out.getvalue()


HOSTILE = {
    "torch pickle": lambda: saved(Evil()),
    "pickle": lambda: pickle.dumps(Evil()),
    "empty": lambda: b"",
    "random bytes": lambda: os.urandom(999),
    "cut": lambda: saved(torch.ones(9))[:200],
    "zip bomb": bomb,
}


def test_the_hostile_pickle_would_run_code(evil):
    """The pickle of the next tests makes a folder where it is loaded without care."""
    pickle.loads(pickle.dumps(Evil()))
    assert evil.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_a_checkpoint_is_not_run(run_dir, evil, name):
    """A pickle that would run code, other bytes and a zip bomb cost one line, and nothing happens."""
    err = refusal(checkpoint.load, write(run_dir, content=HOSTILE[name]()))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "none of which was run" in err
    assert not evil.exists()


def test_code_in_the_state_of_training_is_not_run(run_dir, evil):
    """A trainer.pt that would run code costs one line, and nothing happens."""
    folder = write(run_dir, trainer=dict(best=Evil()))
    assert "none of which was run" in refusal(checkpoint.load, folder, TRAINER)
    assert not evil.exists()


@pytest.mark.parametrize(
    "error, code, says",
    [
        (MemoryError(), 1, "(MemoryError: ); the memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "you tried); the memory"),
        (RuntimeError("failed finding\ncentral directory"), 2, "(RuntimeError: failed finding central dir"),
        (pickle.UnpicklingError("run it with weights_only=False"), 2, "(UnpicklingError): it is damaged"),
    ],
)
def test_a_lack_of_memory_is_not_damage(run_dir, monkeypatch, capsys, error, code, says):
    """A checkpoint that does not fit in memory exits with 1; what the library reports is printed, except its
    advice to run the code in the file."""

    def failing(*args, **kwargs):
        raise error

    folder = write(run_dir)
    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(SystemExit) as stop:
        checkpoint.load(folder)
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert says in err
    assert err.count("\n") == 1


SIZES = [
    dict(n_layer=10**8),
    dict(n_layer=0),
    dict(n_layer=3),
    dict(n_head=0),
    dict(n_head=-2),
    dict(n_head=64),
    dict(n_kv_head=0),
    dict(n_head=2.5),
    dict(n_embd=2**30),
    dict(ffn_dim=2**40),
    dict(vocab_size=2**31),
    dict(vocab_size=0),
    dict(vocab_multiple=2**40),
    dict(seq_len=2**40),
    dict(seq_len=0),
    dict(n_expert=10**9),
    dict(n_expert=10**9, n_expert_active=2**62),
    dict(dropout=5.0),
    dict(rope_theta=0.0),
    dict(dataset=["x"]),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_are_compared_with_the_tensors(run_dir, sizes):
    """What a checkpoint.pt claims is compared with what it holds, before anything is built."""
    err = refusal(weights.trained, write(run_dir, config=sizes))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert next(iter(sizes)) in err or "shape" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(tokenizer=dict(kind=["\x1b[2J"])), "tokenizer ['\\x1b[2J']"),
        (dict(config=3), "damaged"),
        (dict(model=3), "damaged"),
        (dict(tokenizer=None), "damaged"),
        (dict(tokenizer=dict(eot=10**6)), "eot = 1000000"),
        (dict(model={"norm.weight": torch.ones(3)}), "norm.weight: shape (3,) in the file, (64,) by"),
        (dict(model={"more\x1b": torch.ones(3)}), "more\\x1b: shape (3,) in the file, none by"),
        (dict(model={"norm.weight": torch.ones(1).expand(64)}), "norm.weight is torch.float32"),
        (dict(model={"norm.weight": torch.ones(64, dtype=torch.int8)}), "norm.weight is torch.int8"),
        (dict(model={"norm.weight": torch.full((64,), math.nan)}), "norm.weight holds NaN"),
        (
            dict(model={"blocks.1.attn.q_proj.weight": torch.full((64, 64), math.inf)}),
            "q_proj.weight holds NaN",
        ),
    ],
)
def test_what_a_checkpoint_lacks_is_named(run_dir, changes, says):
    """A part that is missing, of another type or not finite is named in one line, with all text from the file
    escaped."""
    err = refusal(weights.trained, write(run_dir, **changes))
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_tensor_that_is_missing_is_named(run_dir):
    """A checkpoint.pt without one of the tensors of its model exits with 2 and names it."""
    tensors = part_of()["model"]
    del tensors["blocks.1.ffn_norm.weight"]
    part = part_of() | dict(format=checkpoint.FORMAT, step=1, model=tensors)
    folder = saving.save(run_dir, 1, part, {})
    assert "blocks.1.ffn_norm.weight: shape none in the file" in refusal(weights.trained, folder)
