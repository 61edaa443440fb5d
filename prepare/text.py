"""
Write your own text as tokens. The ending of a file selects how it is read:

    .jsonl .json .ndjson    one JSON object a line, whose field --column is the text of a document
    .csv .tsv               a table whose first row names its columns; --column holds the texts. Cells may be
                            quoted, as pandas and spreadsheets write them, and then have several lines; for
                            a file whose " are characters of the text, set --plain_quotes
    .parquet                a table, too; --column holds the texts
    .txt and all others     the text itself, in UTF-8; other content (archives, pictures, UTF-16) is refused

All but .parquet may be compressed, as .txt.gz or .jsonl.zst (which needs the package zstandard).

    python prepare/text.py --files='books/*.txt'                                       data/text/
    python prepare/text.py --files='docs/**/*.jsonl' --column=body --tokenizer=gpt2 --name=docs
    python prepare/text.py --files=stories.txt --separator='<|endoftext|>' --vocab_size=2048 --name=stories

A .txt file is one document, or with --separator many. Of single documents the last val_fraction of the
bytes of all .txt files is held out. Documents of the other kinds, and separated ones, are held out by a hash
of their text. Line ends become \\n. Rows without a text are skipped and counted.

The text is streamed, on all cores. The same command continues a preparation that was stopped. The tokens
take about half the bytes of the text. A file that was touched or copied counts as the same text; one that
was edited does not.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
import nanobit.cli  # noqa: F401 -- first: it explains a missing package
from nanobit.prepare import sources, stream

FLAGS = {
    "files": ("", "which files: a path or a quoted pattern such as 'texts/**/*.txt'"),
    "column": ("text", "the field of a .jsonl line or column of a .csv, .tsv or .parquet file with the text"),
    "separator": (
        "",
        "what ends a document within a .txt file, as '<|endoftext|>' or '\\n\\n\\n'; '' = only its end",
    ),
    "keep_crlf": (
        False,
        "leave line ends as they are: \\r\\n of Windows and \\r of old Macs do not become \\n",
    ),
    "plain_quotes": (
        False,
        'a .csv or .tsv file was written without quoting: each line is a row, and " is a character of it',
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
    sources.warn_of_separator(paths, cfg.separator, cfg.keep_crlf)

    def open_streams():
        options = (cfg.column, cfg.separator, cfg.val_fraction, cfg.max_documents, cfg.keep_crlf)
        return [sources.Files(paths, *options, cfg.plain_quotes)]

    stream.prepare(cfg, open_streams, stream.source_of("prepare/text.py", cfg, FLAGS), paths)
