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
from nanobit import terminal
from nanobit.cli import fail

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, but while it writes
FLAGS = {
    "ckpt": ("", "a run folder (its newest checkpoint), RUN/best, a step folder or a checkpoint.pt"),
    "format": ("", "hf: a folder for transformers | gguf: a file for llama.cpp"),
    "out": ("", "the folder or file to write"),
    "latent": (False, "hf: the float master weights, for further training (--init_from)"),
    "type": ("", "gguf: tq2_0 | q2_0 | tq1_0 | q8_0 | q5_0 | q4_0 | f16 | f32; '' = the smallest that fits"),
    "embed": ("q8_0", "gguf: f32 | f16 | q8_0 | q5_0 | q4_0: of embedding and head"),
    "force": (False, "replace what an earlier export has written to out"),
    "verify": (False, "load it with an independent reader and compare"),
    "eval_tokens": (8192, "verify: tokens of the validation set for the loss; 0 = none"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("data_dir",), check_run=False)
config.need_flags(cfg, "ckpt", "format", "out")
faults = []
for key, known in (
    ("format", ("hf", "gguf")),
    ("type", ("", "tq2_0", "tq1_0", "q2_0", "f32", "f16", "q8_0", "q5_0", "q4_0")),
    ("embed", ("f32", "f16", "q8_0", "q5_0", "q4_0")),
):
    if getattr(cfg, key) not in ("", *known):
        faults.append(
            f"{key} = {getattr(cfg, key)!r} is unknown; choose one of {', '.join(filter(None, known))}"
        )
for key, its in (("latent", "hf"), ("type", "gguf"), ("embed", "gguf")):
    if cfg.origin[key] != "default" and cfg.format in ("hf", "gguf") and cfg.format != its:
        faults.append(f"--{key} is of --format={its}; leave it out")
for key in ("eval_tokens", "data_dir"):
    if cfg.origin[key] != "default" and not cfg.verify:
        faults.append(f"--{key} is of --verify; add that")
if cfg.eval_tokens < 0:
    faults.append(f"eval_tokens = {cfg.eval_tokens} must not be negative")
if not cfg.out.strip("/" + os.sep):
    faults.append(f"out = {cfg.out!r} is no name; it is the folder or file to write")
elif cfg.format in ("hf", "gguf") and cfg.out.endswith(".gguf") != (cfg.format == "gguf"):
    ending = "must end in .gguf" if cfg.format == "gguf" else "ends in .gguf, but --format=hf writes a folder"
    faults.append(f"out = {cfg.out!r} {ending}")
if faults:
    fail(*faults)
cfg.out = cfg.out.rstrip("/" + os.sep)
terminal.end_with_output()

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
