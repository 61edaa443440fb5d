"""What the tasks of text share (LAMBADA, BLiMP): rows from the hub or from files, and data/<name>/ with an
example a line, for each model's own tokenizer."""

import json
import os

from nanobit import cli
from nanobit.prepare import sources, token_files


def file_rows(pattern):
    """[("file, line 3", row)] of local jsonl files, in the order of their names"""
    rows = []
    for path in sources.find(pattern):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append((f"{path}, line {number}", json.loads(line)))
                except ValueError as error:  # also where it is not UTF-8
                    cli.fail(f"{path}, line {number}: not JSON ({error}); expected one object a line")
    return rows


def rows(cfg, config_name):
    """[("repo config/split, row 3", row)] of one configuration of the hub's data set"""
    found = sources.open_hub(cfg, config_name, cfg.split)
    try:
        return [(f"{cfg.repo} {config_name}/{cfg.split}, row {i}", row) for i, row in enumerate(found)]
    except Exception as error:  # streamed: what reading the first row raises is the hub's too
        sources.explain(cfg, config_name, cfg.split, error)


def text(where, row, column):
    """the text in a column of a row, without white space around it. Exits with 2 where there is none."""
    found = row.get(column) if isinstance(row, dict) else None
    if not isinstance(found, str) or not found.strip():
        has = f"it has {', '.join(row)}" if isinstance(row, dict) else f"it is {row!r}"
        cli.fail(f"{where}: no text in column {column!r}; {has}")
    return found.strip()


def write_task(cfg, task, examples):
    """data_dir/name/: task.jsonl, one example (dict) a line, then meta.json"""
    if not examples:
        cli.fail(f"{cfg.files or cfg.repo} holds no rows")
    given = ("files",) if cfg.files else ("repo", "config", "split", "revision")
    source = f"prepare/{task}.py " + " ".join(f"--{key}={getattr(cfg, key)}" for key in given)
    folder = token_files.open_data_set(cfg.data_dir, cfg.name, source)
    content = "".join(json.dumps(example) + "\n" for example in examples)
    token_files.write_file(os.path.join(folder, "task.jsonl"), content.encode())
    meta = dict(dataset=cfg.name, task=task, source=source, examples=len(examples), complete=True)
    token_files.write_file(os.path.join(folder, "meta.json"), json.dumps(meta, indent=1).encode())
    print(f"{folder}: {len(examples):,} examples, as {examples[0]}")
