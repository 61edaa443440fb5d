"""
Write your own text as tokens: .txt, .jsonl (one object a line) and .parquet files, each by its ending.

    python prepare/text.py --files='books/*.txt'                                       data/text/
    python prepare/text.py --files='docs/**/*.jsonl' --column=body --tokenizer=gpt2 --name=docs
    python prepare/text.py --files=stories.txt --separator='<|endoftext|>' --vocab_size=2048 --name=stories

A .txt file is one document, and the last val_fraction of the bytes of all .txt files is held out; with
--separator it is many. Documents of the other kinds, and separated ones, are held out by a hash of their
text. Streams, on all cores; what is stopped goes on with the same command. The tokens take about half the
bytes of the text.
"""

import sys

import sources
import stream

import config

FLAGS = {
    "files": ("", "which files: a path or a quoted pattern such as 'texts/**/*.txt'"),
    "column": ("text", "the field of a .jsonl line or column of a .parquet file that holds the text"),
    "separator": (
        "",
        "what ends a document within a .txt file, as '<|endoftext|>' or '\\n\\n\\n'; '' = only its end",
    ),
}
FLAGS |= stream.FLAGS | {
    "name": ("text", "name of the data set"),
    "tokenizer": ("sentencepiece", stream.FLAGS["tokenizer"][1]),
    "val_fraction": (0.05, "share of the text that is held out"),
}

if __name__ == "__main__":
    cfg = config.load(sys.argv[1:], __doc__, FLAGS, only=("data_dir",), check_run=False)
    config.need_flags(cfg, "files")
    paths = sources.find(cfg.files)
    stream.prepare(
        cfg,
        lambda: [sources.Files(paths, cfg.column, cfg.separator, cfg.val_fraction, cfg.max_documents)],
        stream.source_of("prepare/text.py", cfg, FLAGS) + f" {sources.fingerprint(paths)}",
    )
