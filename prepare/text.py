"""Write your own text as tokens. The ending of a file selects how it is read:

    .jsonl .json .ndjson    one JSON object a line, whose field --column is the text of a document
    .csv .tsv               a table whose first row names its columns, of which --column holds the texts;
                            quoted cells may have several lines, unless --plain_quotes is set
    .parquet                a table, too; --column holds the texts
    .txt and all others     the text itself, in UTF-8

All but .parquet may be compressed, as .txt.gz or .jsonl.zst (which needs the package zstandard).

    python prepare/text.py --files='books/*.txt'                                       data/text/
    python prepare/text.py --files='docs/**/*.jsonl' --column=body --tokenizer=gpt2 --name=docs
    python prepare/text.py --files=stories.txt --separator='<|endoftext|>' --vocab_size=2048 --name=stories

A .txt file is one document, or with --separator many. The end of single documents is held out, of the others
those that a hash of their text selects. Line ends become \\n. Rows without a text are skipped and counted.

The text is streamed, on all cores. The same command continues a preparation that was stopped, unless a file
was edited. The tokens take about half the bytes of the text."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
from nanobit.cli import Flag
from nanobit.prepare import sources, stream

FLAGS = {
    "files": Flag("", "which files: a path or a quoted pattern such as 'texts/**/*.txt'", required=True),
    "column": Flag("text", "the field of a .jsonl line or column of a table that holds the text"),
    "separator": Flag("", "ends a document of a .txt file, as '<|endoftext|>' or '\\n\\n'; '' = its end"),
    "keep_crlf": Flag(False, "leave line ends as they are: \\r\\n and \\r do not become \\n"),
    "plain_quotes": Flag(False, 'a table was written without quoting: a line is a row, " is a character'),
}
FLAGS |= stream.FLAGS
FLAGS["name"] = Flag("text", "name of the data set")
FLAGS["tokenizer"] = FLAGS["tokenizer"]._replace(default="sentencepiece")
FLAGS["max_documents"] = Flag(0, "documents to read at most; 0 = all")
FLAGS["val_fraction"] = Flag(0.05, "share of the text that is held out", within="[0, 1)")

if __name__ == "__main__":
    cfg = config.load(doc=__doc__, flags=FLAGS, only=("data_dir",))
    paths = sources.find(cfg.files)
    sources.warn_of_separator(paths, cfg.separator, cfg.keep_crlf)
    source = stream.source_of("prepare/text.py", cfg, FLAGS)
    stream.prepare(cfg, lambda: [sources.Files(paths, cfg)], source, paths)
