"""
Write a large text data set of the Hugging Face hub as tokens; by default FineWeb-Edu's sample of 10 billion
tokens in the LLaMA-2 tokenizer of 32,000 pieces, the data of the 95M baseline.

    python prepare/fineweb_edu.py                                    data/fineweb_edu/
    python prepare/fineweb_edu.py --tokenizer=path/to/tokenizer.model
    python prepare/fineweb_edu.py --config=sample-100BT --tokenizer=gpt2 --name=fineweb_edu_gpt2
    python prepare/fineweb_edu.py --repo=HuggingFaceFW/fineweb --config=sample-10BT --name=fineweb
    python prepare/fineweb_edu.py --repo=Skylion007/openwebtext --config= --tokenizer=gpt2 --name=openwebtext

Documents are held out by a hash of their text. The tokenizer is an open copy of LLaMA-2's, which is gated.
Streams, on all cores, 2 bytes of disk a token; the same command continues what was stopped."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanobit.prepare import stream

DEFAULTS = {
    "name": "fineweb_edu",
    "repo": "HuggingFaceFW/fineweb-edu",
    "config": "sample-10BT",
    "tokenizer": "hf-internal-testing/llama-tokenizer",  # a copy of LLaMA-2's that is not gated
    "val_fraction": 0.001,
}

if __name__ == "__main__":
    stream.prepare_hub(__doc__, "prepare/fineweb_edu.py", DEFAULTS)
