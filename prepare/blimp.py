"""Write BLiMP, pairs of sentences of which one is grammatical, as a task for evaluate.py.

    python prepare/blimp.py                          from the Hugging Face hub (package datasets)
    python prepare/blimp.py --files='blimp/*.jsonl'  from local files, as in the authors' own repository
    python evaluate.py --ckpt=runs/train_tinystories --dataset=blimp

67 paradigms of 1,000 pairs each, as text in data/<name>/task.jsonl. Takes a minute, and 15 MB.
Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", 2020 (arXiv 1912.00582)."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit.prepare import examples

FLAGS = examples.flags("blimp", repo="nyu-mll/blimp", config="", split="train")
COLUMNS = ("sentence_good", "sentence_bad", "UID", "linguistics_term")

if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    rows = [{key: examples.text(where, row, key) for key in COLUMNS} for where, row in examples.read(cfg)]
    examples.write_task(cfg, "blimp", rows)
