"""Write LAMBADA, passages whose last word a model is to guess, as a task for evaluate.py.

    python prepare/lambada.py                            from the Hugging Face hub (package datasets)
    python prepare/lambada.py --config=de --name=de      German; also es, fr, it
    python prepare/lambada.py --files='lambada/*.jsonl'  from local files, a {"text": ...} a line
    python evaluate.py --ckpt=runs/train_tinystories --dataset=lambada

The default is what GPT-2 was scored on, 5,153 passages, as text in data/<name>/task.jsonl, 2 MB.
Paperno et al., "The LAMBADA dataset: Word prediction requiring a broad discourse context", arXiv 1606.06031.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit.cli import fail
from nanobit.prepare import examples

FLAGS = examples.flags("lambada", repo="EleutherAI/lambada_openai", config="default", split="test")


def passage(where, row):
    """Return {"text": ...} of a row: at least two words, of which the last is the one to guess."""
    text = examples.text(where, row, "text")
    if " " not in text:
        fail(f"{where}: {text!r} is one word; the last word needs a context before it")
    return {"text": text}


if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    examples.write_task(cfg, "lambada", [passage(where, row) for where, row in examples.read(cfg)])
