"""
Write a trained model for other engines: a folder for transformers, or a GGUF file for llama.cpp.

    python export.py --ckpt=runs/demo --format=hf --out=demo_hf
    python export.py --ckpt=runs/demo --format=hf --out=demo_latent --latent
    python export.py --ckpt=runs/train_text --format=gguf --out=text.gguf --type=q2_0
    python export.py --ckpt=runs/train_text --format=hf --out=text_hf --verify

--verify loads what was written with another reader (transformers; the llama.cpp binding cyllama) and compares
logits and, where the data set of the run is here, the validation loss, and shows greedy text beside; the last
line of stdout is then one JSON object. Needs `pip install -e ".[export]"`, and for --verify
`".[export,verify]"`.
"""

import os
import shutil
import signal
import sys

import config
from nanobit.cli import Flag, fail

TYPES = ("tq2_0", "q2_0", "tq1_0", "q8_0", "q5_0", "q4_0", "f16", "f32")
FLAGS = {
    "ckpt": Flag("", "a run folder, RUN/best, a step folder or a checkpoint.pt", required=True),
    "format": Flag(
        "", "hf: a folder for transformers | gguf: a file for llama.cpp", ("hf", "gguf"), required=True
    ),
    "out": Flag("", "the folder or file to write", required=True),
    "latent": Flag(False, "the float master weights, for further training", only_with="format=hf"),
    "type": Flag(
        "", f"{' | '.join(TYPES)}; '' = the smallest that fits", ("", *TYPES), only_with="format=gguf"
    ),
    "embed": Flag("q8_0", f"{' | '.join(TYPES[3:])}: embedding and head", TYPES[3:], only_with="format=gguf"),
    "force": Flag(False, "replace what an earlier export has written to out"),
    "verify": Flag(False, "load it with an independent reader and compare"),
    "eval_tokens": Flag(8192, "tokens of the validation set for the loss; 0 = none", only_with="verify"),
    "data_dir": Flag("data", "folder of all data sets, if it has moved since the run", only_with="verify"),
}


def derive(cfg):
    """Take the slash off the end of --out; return the faults of its ending."""
    given = cfg.out
    cfg.out = given.rstrip("/" + os.sep)
    if cfg.origin["out"] != "default" and not cfg.out:
        return [f"out = {given!r} is not a name; give the folder or file to write"]
    if cfg.format == "gguf" and not cfg.out.endswith(".gguf"):
        return [f"out = {given!r} must end in .gguf"]
    if cfg.format == "hf" and cfg.out.endswith(".gguf"):
        return [f"out = {given!r} ends in .gguf, but --format=hf writes a folder"]
    return []


cfg = config.load(doc=__doc__, flags=FLAGS, only=(), derive=derive)

import torch

from nanobit import checkpoint, cli, data, record, weights
from nanobit.export import card, gguf_file, hf, llama, verify

torch.set_grad_enabled(False)


def make_room():
    """exit with 2 where `out` is there and may not be replaced"""
    if not os.path.exists(cfg.out):
        if not os.path.isdir(os.path.dirname(cfg.out) or "."):
            fail(f"out = {cfg.out!r}: there is no folder {os.path.dirname(cfg.out)}; make it first")
        return
    if not (hf if cfg.format == "hf" else gguf_file).is_ours(cfg.out):
        fail(f"out = {cfg.out!r} is there and no earlier export, so it is not replaced; choose another")
    if not cfg.force:
        fail(f"out = {cfg.out!r} is there already; choose another, or replace it with --force")


def validation(part):
    """windows (inputs, targets), each (1, T), of the validation set of a run, none where it is not here"""
    data_dir = part["config"]["data_dir"] if cfg.origin["data_dir"] == "default" else cfg.data_dir
    place = os.path.join(data_dir, part["config"]["dataset"])
    if not cfg.eval_tokens or not os.path.exists(os.path.join(place, "meta.json")):
        print(f"no loss is compared: {'eval_tokens = 0' if not cfg.eval_tokens else f'{place} is not here'}")
        return []
    _, val_windows = data.of_trained(part, "val", data_dir=data_dir)
    return list(val_windows.fixed(cfg.eval_tokens, 1, torch.device("cpu")))


def compared(size):
    """the size of an export beside that of the weights it was made from"""
    tensors = {w.data_ptr(): w for w in part["model"].values()}.values()
    return f" ({size / sum(w.nbytes for w in tensors):.0%} of the float32 weights)"


make_room()
needed = ["safetensors", "tokenizers"] if cfg.format == "hf" else ["gguf"]
if cfg.verify:
    needed += ["transformers", "accelerate"] if cfg.format == "hf" else ["cyllama"]
cli.need_packages(needed, "export,verify" if cfg.verify else "export")
if llama.is_folder(cfg.ckpt):
    fail(f"ckpt = {cfg.ckpt!r} is a folder for transformers already; give a run, as the one it was made from")
part, folder = weights.trained(cfg.ckpt)
run_dir = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
if os.path.abspath(folder) != checkpoint.step_dir(run_dir, part["step"]):
    run_dir = ""  # one that was set aside or copied: its run's curve is of others
windows = validation(part) if cfg.verify else []
kind, partial = cfg.type or gguf_file.smallest(part), f"{cfg.out}.tmp-{os.getpid()}"
if cfg.latent and part["config"]["ternary"]:
    print("latent: float weights for training; they are ternary only in nanoBit's forward", file=sys.stderr)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    if cfg.format == "gguf":
        gguf_file.write(part, partial, kind, cfg.embed)
    else:
        hf.write(part, partial, cfg.latent)
        card.write(part, partial, run_dir, cfg.latent)
    make_room()  # again: that took a while
    # from here on Ctrl-C waits until it is said that the export is written
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.path.isdir(cfg.out):  # a file is replaced in one step
        os.rename(cfg.out, f"{partial}.old")
    os.replace(partial, cfg.out)
except OSError as error:
    fail(f"out = {cfg.out!r} cannot be written: {error}; is there room, and may you write there?", code=1)
except KeyboardInterrupt:
    raise SystemExit(128 + signal.SIGINT) from None
finally:
    if os.path.exists(f"{partial}.old") and not os.path.exists(cfg.out):
        os.rename(f"{partial}.old", cfg.out)
    for path in (partial, f"{partial}.old"):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.exists(path):
            os.remove(path)
if cfg.format == "gguf":
    size, types = os.path.getsize(cfg.out), f"{kind}, embedding {cfg.embed}"
    print(f"wrote {cfg.out}: {size:,} bytes{compared(size)}, {types}, step {part['step']:,}")
    if kind == "q2_0":
        print("q2_0 needs a llama.cpp of 2026 (type 42); --type=f16 is for all, and larger")
else:
    size = sum(entry.stat().st_size for entry in os.scandir(cfg.out))
    print(f"wrote {cfg.out}: {size:,} bytes{compared(size)}, step {part['step']:,}")
    if part["config"]["n_expert"] and part["config"]["ternary"] and not cfg.latent:
        print(f"written as {hf.DEQUANTISED}")
sys.stdout.flush()
signal.signal(signal.SIGINT, signal.SIG_DFL)
if cfg.verify:
    if cfg.format == "gguf":
        found = verify.gguf(part, cfg.out, kind, cfg.embed, windows)
    else:
        found = verify.hf(part, cfg.out, cfg.latent, windows)
    print(record.to_json(found))
    raise SystemExit(0 if found["good"] else 1)
