"""What earlier versions wrote is read back bit for bit.

tests/fixture was written by the code before the modules moved into nanobit/: a ternary run, a mixture trained
with Muon, their data set, and an export for transformers.

expected.json has the first 16 hex digits of the sha256 of each tensor, also computed by that code.
"""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import lines

from nanobit import checkpoint, data, record
from nanobit.export import hf

RUNS = ("ternary", "mixture")


@pytest.fixture(scope="module")
def fixture(tmp_path_factory):
    """Return a copy of tests/fixture: (its folder, expected.json)."""
    folder = tmp_path_factory.mktemp("earlier") / "fixture"
    shutil.copytree(os.path.join(os.path.dirname(__file__), "fixture"), folder)
    with open(folder / "expected.json", encoding="utf-8") as file:
        return folder, json.load(file)


def digests(tensors):
    """Return {name: digest} of {name: tensor}."""
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("run", RUNS)
def test_weights_and_optimizer_state(fixture, run):
    """Weights, optimizer state, best evaluation and counters are read bit for bit."""
    folder, expected = fixture
    step_folder = checkpoint.locate(str(folder / "runs" / run), resumable=True)
    part = checkpoint.load(step_folder)
    trainer = checkpoint.load(step_folder, checkpoint.TRAINER)
    assert digests(part["model"]) == expected[run]["weights"]
    for saved, state in zip(expected[run]["optimizer"], trainer["optimizer"], strict=True):
        tensors = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
        assert digests(tensors) == saved
    for key in ("best", "stale_evals", "skipped"):
        assert trainer[key] == expected[run][key]


@pytest.mark.parametrize("run", RUNS)
def test_tokens(fixture, run):
    """The batches of an earlier run hold the same tokens in the same order."""
    folder, expected = fixture
    part = checkpoint.load(checkpoint.locate(str(folder / "runs" / run)))
    cfg = SimpleNamespace(**part["config"] | dict(data_dir=str(folder / "data")), origin={})
    windows = data.Windows(cfg, data.meta(cfg), "train")
    batches = {
        step: torch.cat(windows.batch(int(step) * 4, 4, torch.device("cpu")))
        for step in expected[run]["tokens"]
    }
    assert digests(batches) == expected[run]["tokens"]


def test_record(fixture):
    """The record of an earlier run is read whole."""
    folder, _ = fixture
    run = str(folder / "runs" / "ternary")
    for name in (record.SCALARS, record.BITNET, record.EVENTS, record.SAMPLES):
        assert record.read(run, name) == lines(run, name)


def test_export(fixture):
    """An earlier export for transformers gives the same codes and scales."""
    folder, expected = fixture
    part = hf.read(str(folder / "ternary_hf"), False)
    assert digests(part["model"]) == expected["export"]
