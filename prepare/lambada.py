"""
Write LAMBADA, passages whose last word a model is to guess, as a task for evaluate.py.

    python prepare/lambada.py                            from the Hugging Face hub (package datasets)
    python prepare/lambada.py --files='lambada/*.jsonl'  from local files, a {"text": ...} a line
    python evaluate.py --ckpt=runs/baseline --dataset=lambada

The default is the text that GPT-2 was scored on, 5,153 passages. data/<name>/ then holds them as text in
task.jsonl, for each model's own tokenizer, and meta.json. Takes seconds, and 2 MB.

Paperno et al., "The LAMBADA dataset: Word prediction requiring a broad discourse context", 2016 (arXiv
1606.06031).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit import cli
from nanobit.prepare import examples

FLAGS = {
    "repo": cli.Flag(
        "EleutherAI/lambada_openai", "data set on the hub, or a folder like one", not_with="files"
    ),
    "config": cli.Flag(
        "default", "its configuration: default is English; de, en, es, fr, it", not_with="files"
    ),
    "split": cli.Flag("test", "its split", not_with="files"),
    "revision": cli.Flag("", "its commit, branch or tag; '' = the newest", not_with="files"),
    "files": cli.Flag("", "local jsonl files to read instead, as 'folder/*.jsonl'"),
    "name": cli.Flag("lambada", "name of the data set"),
}


def passage(where, row):
    """Return {"text": ...} of a row: at least two words, of which the last is the one to guess."""
    text = examples.text(where, row, "text")
    if " " not in text:
        cli.fail(f"{where}: {text!r} is one word; the last word needs a context before it")
    return {"text": text}


if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    examples.write_task(cfg, "lambada", [passage(where, row) for where, row in examples.read(cfg)])
