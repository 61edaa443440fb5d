"""Write a trained model for other engines: a folder for transformers, a GGUF file for llama.cpp, a page for
browsers.

    python export.py --ckpt=runs/demo --format=hf --out=demo_hf
    python export.py --ckpt=runs/demo --format=hf --out=demo_latent --latent
    python export.py --ckpt=runs/train_text --format=gguf --out=text.gguf --type=q2_0
    python export.py --ckpt=models/stories --format=gguf --out=stories.gguf --type=f16
    python export.py --ckpt=runs/demo --format=web --out=adder.html
    python export.py --ckpt=runs/train_text --format=hf --out=text_hf --verify

A page is one HTML file that holds the model and runs it, without a server or a network.

--verify loads what was written with another reader (transformers; cyllama, a binding of llama.cpp; Node) and
compares logits, greedy text and, if the data set is here, the validation loss; stdout then ends with one JSON
line. hf and gguf need `pip install -e ".[export]"`, and for --verify `".[export,verify]"`."""

import os
import shutil
import signal
import sys

import config
from nanobit.cli import Flag, fail

TYPES = ("tq2_0", "q2_0", "tq1_0", "q8_0", "q5_0", "q4_0", "f16", "f32")
EMBED = {"gguf": TYPES[3:], "web": ("int8", "f16")}  # the first is the default
EMBED_TYPES = "; ".join(f"{name}: {' | '.join(types)}" for name, types in EMBED.items())
ENDING = {"hf": "", "gguf": ".gguf", "web": ".html"}
FLAGS = {
    "ckpt": Flag("", "a run folder, RUN/best, step folder, checkpoint.pt or exported folder", required=True),
    "format": Flag("", "hf: transformers | gguf: llama.cpp | web: one page", tuple(ENDING), required=True),
    "out": Flag("", "the folder or file to write", required=True),
    "latent": Flag(False, "the float master weights, for further training", only_with="format=hf"),
    "type": Flag("", f"{' | '.join(TYPES)}; '' = one that fits", ("", *TYPES), only_with="format=gguf"),
    "embed": Flag("", f"embedding and head, {EMBED_TYPES}; '' = the first"),
    "force": Flag(False, "replace what an earlier export has written to out"),
    "verify": Flag(False, "load it with an independent reader and compare"),
    "eval_tokens": Flag(8192, "tokens of the validation set for the loss; 0 = none", only_with="verify"),
    "data_dir": Flag("data", "folder of all data sets, if it has moved since the run", only_with="verify"),
}


def derive(cfg):
    """Take the slash off the end of --out, choose the first type for --embed; yield their faults."""
    given = cfg.out
    cfg.out = given.rstrip("/" + os.sep)
    ending = ENDING.get(cfg.format, "")
    if cfg.origin["out"] != "default" and not cfg.out:
        yield f"out = {given!r} is not a name; give the folder or file to write"
    elif cfg.out and not cfg.out.endswith(ending):
        yield f"out = {given!r} must end in {ending} for --format={cfg.format}"
    elif cfg.format == "hf" and cfg.out.endswith((".gguf", ".html")):
        yield f"out = {given!r} is the name of a file; --format=hf writes a folder"
    types = EMBED.get(cfg.format, ())
    if cfg.embed and cfg.embed not in types:
        yield f"embed = {cfg.embed!r} does not apply to --format={cfg.format}; there is {EMBED_TYPES}"
    elif types:
        cfg.embed = cfg.embed or types[0]


cfg = config.load(doc=__doc__, flags=FLAGS, only=(), derive=derive)

import torch

from nanobit import checkpoint, cli, files, record, weights
from nanobit.export import card, gguf_file, hf, verify
from nanobit.export.web import html_file

torch.set_grad_enabled(False)


def make_room():
    """Exit with 2 if `out` exists and may not be replaced, or its folder is missing."""
    writer = {"hf": hf, "gguf": gguf_file, "web": html_file}[cfg.format]
    if not os.path.exists(cfg.out):
        if not os.path.isdir(os.path.dirname(cfg.out) or "."):
            fail(f"out = {cfg.out!r}: the folder {os.path.dirname(cfg.out)} does not exist; make it first")
    elif not writer.is_ours(cfg.out):
        fail(f"out = {cfg.out!r} exists and is not an earlier export, so it is not replaced; choose another")
    elif not cfg.force:
        fail(f"out = {cfg.out!r} exists already; choose another, or replace it with --force")


def validation(part):
    """Return windows (inputs, targets), each (1, T), of the validation set of a run, [] if it is missing."""
    data_dir = part["config"]["data_dir"] if cfg.origin["data_dir"] == "default" else cfg.data_dir
    folder = os.path.join(data_dir, part["config"]["dataset"])
    if not (cfg.eval_tokens and os.path.exists(os.path.join(folder, "meta.json"))):
        print(f"no loss is compared: that needs {folder} and eval_tokens above 0")
        return []
    _, val_windows = weights.data_of(part, "val", data_dir=data_dir)
    return [batch[:2] for batch in val_windows.fixed(cfg.eval_tokens, 1, torch.device("cpu"))]


def write(part, run_dir, type_name):
    """Write the export under a temporary name and rename it; what was there stays if that fails."""
    partial = f"{cfg.out}.tmp-{os.getpid()}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if cfg.format == "gguf":
            gguf_file.write(part, partial, type_name, cfg.embed)
        elif cfg.format == "web":
            html_file.write(part, partial, cfg.embed, *card.read(cfg.ckpt))
        else:
            hf.write(part, partial, cfg.latent)
            card.write(part, partial, run_dir, cfg.latent)
        make_room()  # again: that took a while
        # from here on Ctrl-C waits until the line that the export is written
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
        shutil.rmtree(f"{partial}.old", ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        if os.path.exists(partial):
            os.remove(partial)


def report(part, type_name):
    """Print what was written, and its size beside that of the float32 weights."""
    paths = [entry.path for entry in os.scandir(cfg.out)] if cfg.format == "hf" else [cfg.out]
    size = sum(map(os.path.getsize, paths))
    tensors = {w.data_ptr(): w for w in part["model"].values()}.values()  # a tied one once
    packed = sum(w.numel() for w in tensors if w.dtype == torch.uint8)  # bytes of four weights each
    whole = 4 * (sum(w.numel() for w in tensors) + 3 * packed)
    embed = f", embedding {cfg.embed}"
    types = {"hf": "", "gguf": f", {type_name}{embed}", "web": embed}[cfg.format]
    share = f"{size / whole:.0%} of the float32 weights"
    print(f"wrote {cfg.out}: {size:,} bytes ({share}){types}, step {part['step']:,}")
    if cfg.format == "gguf" and type_name == "q2_0":
        print("q2_0 needs a llama.cpp of 2026 (type 42); --type=f16 is for all, and larger")
    if cfg.format == "hf" and part["config"]["n_expert"] and part["config"]["ternary"] and not cfg.latent:
        print(f"written as {hf.DEQUANTIZED}")
    sys.stdout.flush()


make_room()
needed = {"hf": ["safetensors", "tokenizers"], "gguf": ["gguf"], "web": []}[cfg.format]
if cfg.verify:
    needed += {"hf": ["transformers", "accelerate"], "gguf": ["cyllama"], "web": []}[cfg.format]
cli.need_packages(needed, "export,verify" if cfg.verify else "export")
if cfg.format == "hf" and files.is_hf_folder(cfg.ckpt):
    fail(f"ckpt = {cfg.ckpt!r} is a folder for transformers already; give a run, as the one it was made from")
part, folder = weights.trained(cfg.ckpt)
run_dir = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
if os.path.abspath(folder) != checkpoint.step_dir(run_dir, part["step"]):
    run_dir = folder  # renamed or copied: the record of the run that is above it is of other checkpoints
part.setdefault("curve", card.points(run_dir, part["step"]))  # an exported folder has it
windows = validation(part) if cfg.verify else []
type_name = cfg.type or gguf_file.default_type(part)
if cfg.latent and part["config"]["ternary"]:
    print("latent: float weights for training; they are ternary only in nanoBit's forward", file=sys.stderr)
write(part, run_dir, type_name)
report(part, type_name)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if cfg.verify:
    options = dict(hf=[cfg.latent], gguf=[type_name, cfg.embed], web=[cfg.embed])[cfg.format]
    result = getattr(verify, cfg.format)(part, cfg.out, *options, windows)
    print(record.to_json(result))
    raise SystemExit(int(not result["good"]))
