"""
Write the TinyStories of Eldan and Li (arXiv 2305.07759) as tokens of a SentencePiece model trained on them.

    python prepare/tinystories.py                                    data/tinystories/
    python prepare/tinystories.py --max_documents=20000 --name=few   a first try, in a minute

Downloads the data set while it reads it: about 1 GB, and 1 GB of tokens in all. Streams, on all cores; the
same command continues what was stopped."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanobit.prepare import stream

DEFAULTS = {
    "name": "tinystories",
    "repo": "roneneldan/TinyStories",
    "val_split": "validation",
    "tokenizer": "sentencepiece",
}

if __name__ == "__main__":
    stream.prepare_hub(__doc__, "prepare/tinystories.py", DEFAULTS)
