"""A trained model as a dict: the part of a checkpoint.pt, or what a folder for transformers holds instead."""

import os
import sys
from types import SimpleNamespace

import torch

import config
from model import Transformer
from nanobit import checkpoint, distributed, parts
from nanobit.cli import fail
from nanobit.export import hf, llama
from nanobit.terminal import printable

HF = ", or an export for transformers"


def initial(path):
    """Return the part of a checkpoint.pt that init_from stands for; a Hugging Face folder is one too"""
    if llama.is_folder(path):
        return checked_export(path, to_train=True)
    return checkpoint.load(
        distributed.from_main(lambda: checkpoint.locate(path, setting="init_from", also=HF))
    )


def trained(path):
    """Return (part of a checkpoint.pt, where it was found) of a trained model: that of a checkpoint, see
    locate, or of a folder that export.py has written. Prints on stderr which step that is, and how to use
    the best."""
    if llama.is_folder(path):
        part = checked_export(path)
        print(f"using {path}, step {part['step']}", file=sys.stderr)
        settings = config.assignments(config.DEFAULT) | config.with_ratios(part["config"])
        return part | dict(config=settings), path
    folder = checkpoint.locate(path, also=HF)
    part, run_dir = checkpoint.load(folder), os.path.normpath(os.path.join(folder, "..", ".."))
    with torch.device("meta"):
        needed = Transformer(SimpleNamespace(**part["config"])).state_dict()
    parts.check_shapes(folder, part["model"], needed)
    with checkpoint.reading():
        best, hint = checkpoint.best_step(run_dir), ""
    if best not in (None, part["step"]):
        hint = f"; its best evaluation was at step {best}: --ckpt={os.path.join(run_dir, 'best')}"
    print(f"using run {printable(part['config']['run_id'])}, step {part['step']}{hint}", file=sys.stderr)
    return part, folder


def checked_export(path, to_train=False):
    """Return the part that an exported folder stands for, see hf.read. Exits with 2 if a weight is not
    finite."""
    part = hf.read(path, to_train)
    try:
        parts.check_finite(part["model"])
    except ValueError as error:
        fail(f"{path}: {error}; export an earlier step")
    return part
