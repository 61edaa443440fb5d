"""Windows of the small data set, and what damages it."""

import json
import os

import torch
from conftest import settings

from nanobit import data

CPU = torch.device("cpu")


def windows(data_dir, split="train", **changes):
    """Return the windows of a split for a tiny run with these settings."""
    cfg = settings(data_dir=data_dir, **changes)
    return data.Windows(cfg, data.meta(cfg), split)


def damage(data_dir, name, change):
    """Replace the content of a file of the data set by change(content)."""
    path = os.path.join(data_dir, "tiny", name)
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(change(content))


def meta_with(**changes):
    """Return a change of meta.json, for damage: these values replace its own."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()
