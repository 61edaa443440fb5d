"""Loss masks as files: which targets they name, that damage is one line, and who may use them."""

import json
import os

import faults
import numpy as np
import pytest
import torch
from conftest import final, settings, train, write_data
from masks import T, add_masks, stored, windows, write_masked

from nanobit import data, distributed, shards
from nanobit.prepare import token_files
from nanobit.run_dir import steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2])
def test_the_targets_of_a_step_are_those_of_all_its_slots(tmp_path, monkeypatch, world):
    """Each rank finds the number of targets of a step, through the end of an epoch and two shards, and each
    micro-step gets its part of it."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 16 * T + 1)
    monkeypatch.setattr(distributed, "WORLD", world)
    data_dir = add_masks(write_data(tmp_path, n_train=2 * (16 * T + 1)))
    w = windows(data_dir, batch_size=2, total_batch_size=8 * T, eval_every=0)
    w.cfg.accumulation = 4 // world
    for step in range(6):
        n = sum(int((w.batch(8 * step + slot, 1, CPU)[1] >= 0).sum()) for slot in range(8))
        assert w.counted(step) == n
        for rank in range(world):
            monkeypatch.setattr(distributed, "RANK", rank)
            for micro in range(w.cfg.accumulation):
                assert w.micro_batch(step, micro, CPU)[2].item() == pytest.approx(n / 4)
    beyond = w.micro_batch(0, w.cfg.accumulation, CPU)
    assert all(map(torch.equal, beyond, w.micro_batch(1, 0, CPU))), "the next step's first"


def test_targets_are_the_tokens_that_their_mask_names(tmp_path):
    """The mask of a token decides on it as a target: inputs stay, targets that do not count are -100."""
    data_dir = write_masked(tmp_path)
    tokens, counts = stored(data_dir)
    w = windows(data_dir)
    inputs, targets, divisor = w.tensor([(0, i) for i in range(31)], CPU)
    assert torch.equal(inputs, tokens[:, :-1])
    assert torch.equal(targets, torch.where(counts > 0, tokens[:, 1:], -100))
    assert divisor == counts.sum()


# masks that are wrong


def in_meta(change):
    """Return a change of a data set: change(meta), in place."""

    def edit(folder):
        path = os.path.join(folder, "meta.json")
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        change(meta)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(meta, file)

    return edit


def in_mask(change):
    """Return a change of a data set: the training mask is change(its bytes)."""

    def edit(folder):
        path = os.path.join(folder, "train_00000.mask")
        content = np.fromfile(path, np.uint8)
        change(content).tofile(path)

    return edit


def flip(mask):
    mask[40] ^= 1
    return mask


WRONG = {
    "missing": (lambda folder: os.remove(f"{folder}/train_00000.mask"), "train_00000.mask is missing"),
    "short": (in_mask(lambda mask: mask[:-1]), "train_00000.mask has 496 bytes, meta.json says 497"),
    "long": (in_mask(lambda mask: np.append(mask, mask[:1])), "train_00000.mask has 498 bytes"),
    "changed": (in_mask(flip), "train_00000.mask has changed: its sha256"),
    "not of 0 and 1": (in_mask(lambda mask: mask * 2), "train_00000.mask holds 2, but a mask is of 0 and 1"),
    "of one split": (
        in_meta(lambda meta: meta["shards"]["val_00000.bin"].pop("mask_sha256")),
        "shards.val_00000.bin.mask_sha256 is missing",
    ),
    "not named": (
        in_meta(lambda meta: [shard.pop("mask_sha256") for shard in meta["shards"].values()]),
        ".mask_sha256 is missing",
    ),
    "no sha256": (
        in_meta(lambda meta: meta["shards"]["train_00000.bin"].update(mask_sha256="x")),
        "train_00000.bin.mask_sha256 = 'x', expected 64 hexadecimal digits",
    ),
    "not counted": (in_meta(lambda meta: meta.pop("counted")), "counted.train is missing or 0"),
    "without targets": (in_meta(lambda meta: meta["counted"].update(val=0)), "counted.val is missing or 0"),
    "window": (in_meta(lambda meta: meta.update(window="16")), "window = '16', expected a whole number"),
    "incomplete": (
        in_meta(lambda meta: meta.update(complete=False)),
        "tiny is not complete; prepare it again",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("tokenize_on_fly", [False, True])
def test_wrong_masks_are_one_line(tmp_path, capsys, name, tokenize_on_fly):
    """Masks that are missing, damaged or contradict meta.json end with one line, as shards do; so does a data
    set with masks that is still being written."""
    change, says = WRONG[name]
    data_dir = write_masked(tmp_path)
    change(os.path.join(data_dir, "tiny"))
    with pytest.raises(SystemExit) as stop:
        windows(data_dir, tokenize_on_fly=tokenize_on_fly)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_checked_mask_is_not_read_again(tmp_path, monkeypatch):
    """A mask is checked once on a machine, and again with --verify_data."""

    data_dir = write_masked(tmp_path)
    cfg = settings(data_dir=data_dir)
    read, real = [], shards.check_shard
    monkeypatch.setattr(shards, "check_shard", lambda *args: (read.append(args[1]), real(*args))[1])
    for verify, n in ((False, 4), (False, 4), (True, 8)):
        data.meta(cfg, verify=verify)
        assert len(read) == n
    assert {*read} == {"train_00000.bin", "train_00000.mask", "val_00000.bin", "val_00000.mask"}


def test_another_context_is_refused_in_one_line(tmp_path, out_dir):
    """Windows begin with a conversation, and so only the seq_len that they were made for reads them."""
    data_dir = write_masked(tmp_path)
    _, err = train(data_dir, out_dir, "r", code=2, seq_len=32, total_batch_size=128)
    assert err.startswith("error: seq_len = 32, but ")
    assert "in windows of 16 tokens; set --seq_len=16" in err
    assert err.count("\n") == 1


def test_a_mask_that_is_cut_ends_a_run_that_saves_first(tmp_path, out_dir):
    """A mask that is cut during a run ends it with one line; the run is saved."""
    data_dir = write_masked(tmp_path)
    patch = faults.truncate_at_update(6, f"{data_dir}/tiny/train_00000.mask", 100)
    changes = dict(save_every=0, eval_every=0, sample_every=0)
    _, err = train(data_dir, out_dir, "r", patch=patch, code=1, **changes)
    assert err.count("error: ") == 1
    assert "train_00000.mask has become shorter" in err
    assert steps(f"{out_dir}/r"), "the run is saved"


def test_a_complete_data_set_with_masks_trains_on_the_fly(tmp_path, out_dir):
    """tokenize_on_fly changes nothing for a complete data set."""
    data_dir = write_masked(tmp_path)
    for run_id, on_fly in (("a", False), ("b", True)):
        train(data_dir, out_dir, run_id, tokenize_on_fly=on_fly, max_steps=3, eval_every=0, sample_every=0)
    torch.testing.assert_close(final(f"{out_dir}/a", 3), final(f"{out_dir}/b", 3), rtol=0, atol=0)
