"""What the preparations of tasks of text share (LAMBADA, BLiMP): flags, rows of hub or files, writing."""

import json
import os

from tqdm import tqdm

from nanobit.cli import Flag, fail, library
from nanobit.prepare import hub, sources, token_files


def flags(name, repo, config, split):
    """Return the flags of a script that prepares a task of text, with these defaults."""
    return {
        "repo": Flag(repo, "data set on the hub, or a folder like one", not_with="files"),
        "config": Flag(config, "its configuration, as a paradigm or a language; '' = all", not_with="files"),
        "split": Flag(split, "its split", not_with="files"),
        "revision": Flag("", "its commit, branch or tag; '' = the newest", not_with="files"),
        "files": Flag("", "local jsonl files to read instead, as 'folder/*.jsonl'"),
        "name": Flag(name, "name of the data set"),
    }


def read(cfg):
    """Return [(where it stands, row)] of local jsonl files, or of the hub's data set."""
    if cfg.files:
        return list(file_rows(cfg.files))
    names = tqdm(config_names(cfg), desc="downloading", disable=None)
    return [row for name in names for row in rows(cfg, name)]


def config_names(cfg):
    """Return the configurations of the hub's data set that are asked for: all if none is named."""
    if cfg.config:
        return [cfg.config]
    names = library("datasets").get_dataset_config_names
    return hub.ask(lambda: names(cfg.repo, revision=cfg.revision or None), hub.named(cfg))


def rows(cfg, config_name):
    """Return [("repo config/split, row 3", row)] of one configuration of the hub's data set."""
    place = f"{cfg.repo} {config_name}/{cfg.split}"
    split = hub.ask(lambda: list(hub.open_split(cfg, config_name, cfg.split)), place)
    return [(f"{place}, row {i}", row) for i, row in enumerate(split)]


def file_rows(pattern):
    """Yield ("file, line 3", row) of local jsonl files, in the order of their names."""
    for path in sources.find(pattern):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except ValueError as error:  # also if it is not UTF-8
                    fail(f"{path}, line {number}: not JSON ({error}); expected one object a line")


def text(where, row, column):
    """Return the text in a column of a row, without white space around it. Exits with 2 if it has none."""
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        content = f"has {', '.join(row)}" if isinstance(row, dict) else f"is {row!r}"
        fail(f"{where}: no text in column {column!r}; it {content}")
    return value.strip()


def write_task(cfg, task, examples):
    """Write data_dir/name/: task.jsonl, one example (dict) a line, then meta.json."""
    if not examples:
        fail(f"{cfg.files or cfg.repo} holds no rows")
    keys = ("files",) if cfg.files else ("repo", "config", "split", "revision")
    source = token_files.source_of(f"prepare/{task}.py", cfg, keys)
    folder = token_files.open_data_set(cfg.data_dir, cfg.name, source)
    content = "".join(json.dumps(example) + "\n" for example in examples)
    token_files.write_file(os.path.join(folder, "task.jsonl"), content.encode())
    meta = dict(dataset=cfg.name, task=task, source=source, examples=len(examples), complete=True)
    token_files.write_file(os.path.join(folder, "meta.json"), json.dumps(meta, indent=1).encode())
    print(f"{folder}: {len(examples):,} examples, as {examples[0]}")
