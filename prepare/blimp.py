"""
Write BLiMP, pairs of sentences of which one is grammatical, as a task for evaluate.py.

    python prepare/blimp.py                          from the Hugging Face hub (package datasets)
    python prepare/blimp.py --files='blimp/*.jsonl'  from local files, as in the authors' own repository
    python evaluate.py --ckpt=runs/baseline --dataset=blimp

67 paradigms of 1,000 pairs each. data/<name>/ then holds them as text in task.jsonl, for each model's own
tokenizer, and meta.json. Takes a minute, and 15 MB.

Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", 2020 (arXiv 1912.00582).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit import cli
from nanobit.prepare import examples

FLAGS = {
    "repo": cli.Flag("nyu-mll/blimp", "data set on the hub, or a folder like one", not_with="files"),
    "config": cli.Flag("", "its configuration, a paradigm; '' = all", not_with="files"),
    "split": cli.Flag("train", "its split", not_with="files"),
    "revision": cli.Flag("", "its commit, branch or tag; '' = the newest", not_with="files"),
    "files": cli.Flag("", "local jsonl files to read instead, as 'folder/*.jsonl'"),
    "name": cli.Flag("blimp", "name of the data set"),
}
COLUMNS = ("sentence_good", "sentence_bad", "UID", "linguistics_term")

if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    rows = [{key: examples.text(where, row, key) for key in COLUMNS} for where, row in examples.read(cfg)]
    examples.write_task(cfg, "blimp", rows)
