"""Data sets with loss masks, for the tests."""

import hashlib
import json
import os

import numpy as np
import torch
from conftest import settings, write_data

from nanobit import data

T = 16  # tokens of a window


def some_targets(n_windows, seed=0):
    """Return which targets count, (n, T) of 0 and 1: at random, more or fewer by window, at least one."""
    rng = np.random.default_rng(seed)
    counts = (rng.random((n_windows, T)) < rng.random((n_windows, 1))).astype(np.uint8)
    counts[:, rng.integers(T)] = 1
    return counts


def add_masks(data_dir, **targets):
    """Add masks to the data set `tiny` of data_dir: train, val (n, T) of 0 and 1, some_targets if missing."""
    folder = os.path.join(data_dir, "tiny")
    path = os.path.join(folder, "meta.json")
    with open(path, encoding="utf-8") as file:
        meta = json.load(file)
    meta["window"] = T
    meta["counted"] = dict.fromkeys(meta["tokens"], 0)
    for name, shard in meta["shards"].items():
        split = name.rpartition("_")[0]
        counts = targets.get(split)
        if counts is None:
            counts = some_targets((shard["tokens"] - 1) // T)
        mask = np.zeros(shard["tokens"], np.uint8)
        mask[1 : 1 + counts.size] = counts.ravel()
        mask.tofile(os.path.join(folder, name.replace(".bin", ".mask")))
        shard["mask_sha256"] = hashlib.sha256(mask).hexdigest()
        meta["counted"][split] += int(mask.sum())
    with open(path, "w", encoding="utf-8") as file:
        json.dump(meta, file)
    return data_dir


def write_masked(folder, **targets):
    """Write a data set of 31 and 12 windows with masks, see add_masks; return data_dir."""
    return add_masks(write_data(folder, n_train=31 * T + 1, n_val=12 * T + 1), **targets)


def windows(data_dir, split="train", **changes):
    cfg = settings(data_dir=data_dir, **changes)
    return data.Windows(cfg, data.meta(cfg), split)


def stored(data_dir, split="train"):
    """Return (windows of token ids (n, T + 1), which of their targets count (n, T)), of the files."""
    ids = np.fromfile(os.path.join(data_dir, "tiny", f"{split}_00000.bin"), "<u2").astype(np.int64)
    mask = np.fromfile(os.path.join(data_dir, "tiny", f"{split}_00000.mask"), np.uint8)
    n = (len(ids) - 1) // T
    tokens = np.stack([ids[i * T : i * T + T + 1] for i in range(n)])
    return torch.from_numpy(tokens), torch.from_numpy(mask[1 : 1 + n * T].reshape(n, T)).float()
