"""Data sets and files of the Hugging Face hub, or of a local folder laid out like one."""

import os
import re
import sys
import time

from nanobit.cli import fail, library
from nanobit.prepare import formats

WAITS = (1, 2, 4, 8)  # seconds before the hub is asked again


class Hub:
    """One split of a data set, streamed: the column of cfg.repo (a name or a local folder) with the text."""

    def __init__(self, cfg, hub_split, split):
        self.cfg, self.split = cfg, split
        if not os.path.isdir(cfg.repo):  # name the commit: the branch may change before this is resumed
            info = library("huggingface_hub").HfApi().dataset_info
            cfg.revision = ask(lambda: info(cfg.repo, revision=cfg.revision or None), named(cfg)).sha
        self.data = open_split(cfg, cfg.config, hub_split)
        self.done = 0  # rows read
        self.unusable = 0  # of these, rows without a text
        columns = self.data.column_names or list(next(self.rows(), {}))
        if cfg.column not in columns:
            fail(f"column = {cfg.column!r} is not in {cfg.repo}; it has {', '.join(columns)}")
        # the others need not be decoded; as a table of arrow a text may be something else than UTF-8
        self.data = self.data.select_columns([cfg.column]).with_format("arrow")
        info = (self.data.info.splits or {}).get(hub_split)
        self.total = getattr(info, "num_examples", 0)
        self.size = getattr(info, "num_bytes", 0)
        if cfg.max_documents:
            self.total = min(cfg.max_documents, self.total or cfg.max_documents)

    def pieces(self, state):
        self.done = self.unusable = 0
        if state:
            self.done, self.unusable = state["done"], state.get("unusable", 0)
            self.data.load_state_dict(state["hub"])
        for row in self.rows():  # a table of one row
            if self.done - self.unusable == self.cfg.max_documents > 0:
                return
            self.done += 1
            value = formats.arrow_values(row[self.cfg.column])[0]
            place = f"row {self.done:,} of {self.cfg.repo}"
            piece = formats.piece_of(value, self.cfg.column, place, self.split)
            self.unusable += piece[0] is None
            yield piece

    def rows(self):
        """Yield the rows of the data set. Exits with 2 if a file of it cannot be read."""
        try:
            yield from self.data
        except Exception as error:  # pyarrow, pandas and datasets have no common type for it
            if is_network(error):
                raise
            where = f"repo = {self.cfg.repo!r}: a file after row {self.done:,} cannot be read"
            remedy = "prepare/text.py --files= reads its files, downloaded, and skips rows without text"
            fail(f"{where} ({described(error)}); {remedy}")

    def state(self):
        return {"done": self.done, "unusable": self.unusable, "hub": self.data.state_dict()}

    def fraction(self):
        if self.total:
            return self.done / self.total
        shard = self.data.state_dict()["examples_iterable"]
        while "examples_iterable" in shard:
            shard = shard["examples_iterable"]
        return shard.get("shard_idx", 0) / self.data.num_shards or None


def open_split(cfg, config_name, split):
    """Return a split of cfg.repo as datasets streams it."""
    datasets = library("datasets")
    datasets.disable_progress_bars()
    options = dict(split=split, revision=cfg.revision or None, streaming=True)
    what = f"config = {config_name!r} of {named(cfg)}"
    return ask(lambda: datasets.load_dataset(cfg.repo, config_name or None, **options), what)


def named(cfg):
    """Return the data set as errors name it."""
    return f"repo = {cfg.repo!r}" + f", revision = {cfg.revision!r}" * bool(cfg.revision)


def model_file(repo, name):
    """Return the local path of a file of a model repository, downloaded."""
    hub = library("huggingface_hub")
    missing = f"has no {name} (a tokenizer.json is not supported); expected a file, org/name or an encoding"
    return ask(lambda: hub.hf_hub_download(repo, name), f"tokenizer = {repo!r}", missing)


def ask(call, what, missing="is neither a folder nor on the hub, or it is private (then `hf auth login`)"):
    """Return call(), a question to the hub. Ask again after a wait if the hub answers with a failure. Exits
    with one line about `what`: with 1 if the hub cannot be reached, else with 2."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not is_network(error) or "HTTP" not in names_of(error):
                explain(error, what, missing)
            print(f"the hub failed ({type(error).__name__}); again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def explain(error, what, missing):
    """Exit with one line for an error of the hub's libraries."""
    text = described(error)
    names = names_of(error)
    if is_network(error):
        fail(f"{what}: the hub cannot be reached ({text}); try again, or name a local copy", code=1)
    if "Dataset scripts are no longer supported" in text:
        remedy = "--revision=refs/convert/parquet --config=default reads the hub's converted copy"
        fail(f"{what} holds a loading script, which datasets no longer runs; {remedy}")
    if "GatedRepoError" in names or "is a gated dataset" in text:
        fail(f"{what} is gated: accept its terms on its page, then `hf auth login`; or name a local copy")
    if "NotFoundError" in names or "HFValidationError" in names:
        fail(f"{what} {missing}")
    fail(f"{what} cannot be read: {text}")


def described(error):
    """Return an error as a short text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def names_of(error):
    """Return the names of an error's type and its bases: the hub's libraries have no common type of error."""
    return " ".join(ancestor.__name__ for ancestor in type(error).__mro__)


def is_network(error):
    """Return whether waiting may help against an error."""
    names = names_of(error)
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:  # nothing cached, no network
        return True
    if "NotFoundError" in names or "GatedRepoError" in names:  # they are HTTP errors, too
        return False
    return re.search("Connect|Timeout|HTTP|Http|Protocol|Network|IncompleteRead", names) is not None
