"""Write conversations as tokens, for a model that is to answer. Each line of a .jsonl file (also .gz or .zst)
is one object, in one of three forms:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}        input may be missing

user and assistant alternate; a first message may have the role system. Other fields are ignored.

    python prepare/chat.py --files='talks/*.jsonl' --ckpt=runs/train_text                    data/chat/
    python prepare/chat.py --files='talks/*.jsonl' --val_files=talks/held_out.jsonl --ckpt=runs/train_text

The tokenizer and the length of a window are those of the model. Conversations share windows; none is split.
One that is longer ends after its last whole answer that fits. Only answers are learned: the mask beside the
tokens says which these are. Whole conversations are held out, those that a hash of their text selects, or
those of --val_files. Rows that are malformed or occur twice are skipped and counted.

The files are streamed, on all cores. The same command continues a preparation that was stopped, unless a file
was edited."""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit import chat
from nanobit.cli import Flag, fail
from nanobit.prepare import conversations, sources, stream, token_files
from nanobit.tokenizer import make_tokenizer

MODEL = "the model that is to answer: a run folder, RUN/best, step folder, checkpoint.pt or exported folder"
FLAGS = {
    "files": Flag("", "which files: a path or a quoted pattern such as 'talks/**/*.jsonl'", required=True),
    "ckpt": Flag("", MODEL, required=True),
    "val_files": Flag(
        "", "files of which all is held out; files that --files matches too are not trained on"
    ),
    "val_fraction": Flag(0.05, "share of the conversations to hold out", (), "[0, 1)", not_with="val_files"),
    "window": Flag(0, "tokens of a window, seq_len while training; 0 = the context of the model"),
    "name": Flag("chat", "name of the data set"),
    "workers": stream.FLAGS["workers"],
    "max_bad_rows": Flag(
        1000, "rows to skip that are malformed or occur twice; longer or empty ones do not count"
    ),
}


def main():
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    held_out = sources.find(cfg.val_files, "val_files") if cfg.val_files else []
    files = [("val", path) for path in held_out]
    held_out_paths = set(map(os.path.realpath, held_out))
    others = [path for path in sources.find(cfg.files) if os.path.realpath(path) not in held_out_paths]
    files += [("train" if held_out else "", path) for path in others]
    if len(files) == len(held_out):
        fail(f"files = {cfg.files!r} and val_files = {cfg.val_files!r}: no file is left to train on")

    from nanobit import weights  # here, since workers import this file, and need no torch

    part, _ = weights.trained(cfg.ckpt)
    take_tokenizer(cfg, part["tokenizer"])
    context = part["config"]["seq_len"]
    cfg.window = cfg.window or context
    if not 2 <= cfg.window <= context:
        fail(f"window = {cfg.window:,}: expected 2 to {context:,}, the context of ckpt = {cfg.ckpt!r}")
    if held_out:
        cfg.val_fraction = 0.0
    source = token_files.source_of("prepare/chat.py", cfg, ("files", "val_files", "val_fraction", "window"))
    source += f" --tokenizer={cfg.tokenizer['sha256'][:12]}"
    layout = (
        functools.partial(conversations.Writer, cfg),
        functools.partial(conversations.encode_chunk, cfg.window),
    )
    paths = [path for _, path in files]
    stream.prepare(cfg, lambda: [conversations.Conversations(files)], source, paths, layout)


def take_tokenizer(cfg, spec):
    """Set cfg.tokenizer to that of the model. Exits with 2 if conversations cannot be written with it."""
    try:
        chat.check_tokenizer(make_tokenizer(spec), spec)
    except chat.BadConversation as error:
        fail(f"ckpt = {cfg.ckpt!r}: {error}; train a model on text that has them, or with another tokenizer")
    cfg.tokenizer = spec | {"chat": chat.FORMAT}


if __name__ == "__main__":
    main()
