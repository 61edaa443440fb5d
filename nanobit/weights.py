"""A trained model as a dict: the part of a checkpoint.pt or of an exported folder. And its data set."""

import os
import sys
from types import SimpleNamespace

import torch

import config
from model import Transformer
from nanobit import checkpoint, data, distributed, files, parts
from nanobit.cli import fail
from nanobit.run_dir import reading
from nanobit.terminal import printable
from nanobit.tokenizer import bos_of

HF = ", or an export for transformers"


def initial(path):
    """Return the part that init_from stands for, of a checkpoint or a Hugging Face folder."""
    if part := exported(path, to_train=True):
        return part
    folder = distributed.from_main(lambda: checkpoint.locate(path, setting="init_from", also=HF))
    return checkpoint.load(folder)


def trained(path):
    """Return (part, folder) of a checkpoint, see locate, or of an exported folder; print which step it is."""
    if part := exported(path):
        print(f"using {path}, step {part['step']}", file=sys.stderr)
        part["config"] = config.assignments(config.DEFAULT) | config.with_ratios(part["config"])
        return part, path
    folder = checkpoint.locate(path, also=HF)
    part = checkpoint.load(folder)
    with torch.device("meta"):
        needed = Transformer(SimpleNamespace(**part["config"])).state_dict()
    parts.check_shapes(folder, part["model"], needed)
    run_dir = os.path.normpath(os.path.join(folder, "..", ".."))
    with reading():
        best = checkpoint.best_step(run_dir)
    line = f"using run {printable(part['config']['run_id'])}, step {part['step']}"
    if best not in (None, part["step"]):
        line += f"; its best evaluation was at step {best}: --ckpt={os.path.join(run_dir, 'best')}"
    print(line, file=sys.stderr)
    return part, folder


def exported(path, to_train=False):
    """Return the part of an exported folder, see hf.read, or None for another path. Exits with 2 for NaN."""
    if not files.is_hf_folder(path):
        return None
    from nanobit.export import hf  # here, so that training loads it only for such a folder

    part = hf.read(path, to_train)
    try:
        parts.check_finite(part["model"])
    except ValueError as error:
        fail(f"{path}: {error}; export an earlier step")
    return part


def data_of(part, split, dataset="", data_dir="", verify=False):
    """Return (meta, windows of a split, as long as the model's context) of the data set on which the model of
    a part was trained, or of another that its tokenizer made. Exits with 2 if another tokenizer did."""
    trained = part["config"]
    changes = dict(dataset=dataset or trained["dataset"], data_dir=data_dir or trained["data_dir"])
    changes |= dict(vocab_size=0, tokenize_on_fly=False, origin=dict(dataset="", prepare=""))
    cfg = SimpleNamespace(**trained | changes)
    cfg.prepare = trained["prepare"] if cfg.dataset == trained["dataset"] else ""
    meta = data.meta(cfg, split, verify)
    if meta["tokenizer"]["sha256"] != part["tokenizer"]["sha256"]:
        remedy = "name one that the model's tokenizer made, or its folder with --data_dir"
        fail(f"dataset = {cfg.dataset!r} has another tokenizer than the model; {remedy}")
    if bos_of(meta) != bos_of(part["tokenizer"]):
        fault = f"its texts begin with token {bos_of(meta)}, the model's with {bos_of(part['tokenizer'])}"
        remedy = "prepare it with --tokenizer= and the folder of the model's own data set or export"
        fail(f"dataset = {cfg.dataset!r}: {fault}; {remedy}")
    return meta, data.Windows(cfg, meta, split)
