"""
Where documents come from: a data set of the Hugging Face hub (or a folder laid out like one), or files.

A source is read in order, piece by piece, never as a whole, and knows where it stands:

    pieces(state)   yield (split, text, first, last): a part of a document, and whether it is its first and
                    its last part; from the start (None) or from a state
    state()         where it stands after the last piece, as JSON
    fraction()      the part of it that is behind, 0 to 1, or None where that is not known
    size            bytes of text in all, 0 where that is not known

split is '' where the document's text decides whether it is held out.
"""

import glob
import hashlib
import json
import os
import sys
import time

import tokens  # noqa: F401 -- it puts the project's folder on the path

from config import fail, library

LONGEST = 2**20  # bytes of a text file that are read in search of a line end
LARGEST = 2**26  # bytes of a document in a file of several: it is held in memory


class Hub:
    """one split of a data set on the hub, streamed: repo (name or local folder), config, column, revision"""

    def __init__(self, cfg, hub_split, split):
        self.cfg, self.split = cfg, split
        self.revision = cfg.revision = commit(cfg)  # the data set may be changed before this is resumed
        self.data = open_hub(cfg, cfg.config, hub_split)
        columns = self.data.column_names or list(next(iter(self.data), {}))
        if cfg.column not in columns:
            fail(f"column = {cfg.column!r} is not in {cfg.repo}; it has {', '.join(columns)}")
        self.data = self.data.select_columns([cfg.column])  # the others need not be decoded
        known = (self.data.info.splits or {}).get(hub_split)
        self.total, self.done = known.num_examples if known else 0, 0
        if cfg.max_documents:
            self.total = min(cfg.max_documents, self.total or cfg.max_documents)
        self.size = known.num_bytes if known else 0  # bytes of text, where that is known

    def pieces(self, state):
        self.done = state["done"] if state else 0
        if state:
            self.data.load_state_dict(state["hub"])
        for row in self.data:
            if self.done == self.cfg.max_documents > 0:
                return
            text = row[self.cfg.column]
            if type(text) is not str:
                fail(f"column = {self.cfg.column!r} of {self.cfg.repo} holds {type(text).__name__}, not text")
            self.done += 1
            yield self.split, text, True, True

    def state(self):
        return {"done": self.done, "hub": self.data.state_dict()}

    def fraction(self):
        if self.total:
            return self.done / self.total
        shard = self.data.state_dict()["examples_iterable"]
        while "examples_iterable" in shard:
            shard = shard["examples_iterable"]
        return shard.get("shard_idx", 0) / self.data.num_shards or None


def commit(cfg):
    """the commit that cfg.revision of cfg.repo stands for now; cfg.revision itself for a folder"""
    if os.path.isdir(cfg.repo):
        return cfg.revision
    hub = library("huggingface_hub").HfApi()
    try:
        return patiently(lambda: hub.dataset_info(cfg.repo, revision=cfg.revision or None)).sha
    except Exception as error:  # told apart as below
        explain(cfg, cfg.config, cfg.split, error)


def open_hub(cfg, config_name, split):
    """datasets.load_dataset, its errors told in a line with their remedy; exits with 2, or with 1 where the
    hub is not to be reached"""
    datasets = library("datasets")
    datasets.disable_progress_bars()
    how = dict(split=split, revision=cfg.revision or None, streaming=True)
    try:
        return patiently(lambda: datasets.load_dataset(cfg.repo, config_name or None, **how))
    except Exception as error:  # what load_dataset raises is told apart by its text: it has few types
        explain(cfg, config_name, split, error)


def patiently(call):
    """call(), made again after a wait where the hub answers, but with a failure of its own"""
    for wait in (1, 2, 4, 8, 0):
        try:
            return call()
        except Exception as error:
            has_answered = any("HTTP" in kind.__name__ for kind in type(error).__mro__)
            if not wait or not has_answered or not is_network(error):
                raise
            print(f"the hub failed ({type(error).__name__}); again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def explain(cfg, config_name, split, error):
    """exit with a line for an error of the hub or of load_dataset"""
    text = " ".join(str(error).split())
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if "Dataset scripts are no longer supported" in text:
        how = "--revision=refs/convert/parquet --config=default reads the hub's converted copy"
        fail(f"repo = {cfg.repo!r} holds a loading script, which datasets no longer runs; {how}")
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        fail(f"repo = {cfg.repo!r} is gated: accept its terms on its page, then `hf auth login`")
    if is_network(error):
        how = "try again, or name a local folder as --repo="
        fail(f"the hub cannot be reached ({text[:200]}); {how}", code=1)
    if any(kind.endswith("NotFoundError") or kind == "HFValidationError" for kind in kinds):
        what = f"repo = {cfg.repo!r}" + (f" with revision = {cfg.revision!r}" if cfg.revision else "")
        fail(f"{what} is neither a folder nor on the hub, or it is private (then `hf auth login`)")
    if "BuilderConfig" in text or "Config name is missing" in text:
        fail(f"config = {config_name!r} of {cfg.repo}: {text}")
    if "split" in text.lower() and "ValueError" in kinds:
        fail(f"split = {split!r} of {cfg.repo}: {text}")
    fail(f"repo = {cfg.repo!r} cannot be read: {type(error).__name__}: {text[:300]}")


def is_network(error):
    """whether an error is one that waiting may mend: datasets, huggingface_hub and their HTTP library have no
    common type for it. A file that is absent is told by their HTTP errors too, but has a type of its own."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:  # nothing cached, no network
        return True
    if any(name.endswith(("NotFoundError", "GatedRepoError")) for name in names):
        return False
    kinds = ("Connect", "Timeout", "HTTP", "Http", "Protocol", "Network", "IncompleteRead")
    return any(kind in name for kind in kinds for name in names)


def hub_file(repo, name):
    """the local path of a file of a model repository on the hub, downloaded; errors in a line as above"""
    hub = library("huggingface_hub")
    try:
        return patiently(lambda: hub.hf_hub_download(repo, name))
    except Exception as error:  # told apart as above
        text = " ".join(str(error).split())[:200]
        if "GatedRepoError" in [kind.__name__ for kind in type(error).__mro__]:
            how = "accept its licence on its page, then `hf auth login`; or name a tokenizer.model of yours"
            fail(f"tokenizer = {repo!r} is gated: {how}")
        if is_network(error):
            how = "try again, or name a file"
            fail(f"tokenizer = {repo!r}: the hub cannot be reached ({text}); {how}", code=1)
        how = "expected a file, a hub repository that holds one, or the name of an encoding"
        fail(f"tokenizer = {repo!r} has no {name} (a tokenizer.json is not supported); {how}")


class Files:
    """text files: .txt, .jsonl (or .json, a document a line) and .parquet, each by its ending, in the order
    of their names.

    Without a separator a .txt file is one document, and the last val_fraction of the bytes of all .txt
    files, cut at a line end, is held out; documents of the other kinds, and separated ones, are held out by
    their text.
    """

    def __init__(self, paths, column, separator, val_fraction, max_documents=0):
        self.column, self.revision, self.documents = column, "", 0
        self.separator = separator.replace("\\n", "\n").replace("\\t", "\t").encode()
        whole = [path for path in paths if kind_of(path) == "txt" and not separator]  # each one document
        self.paths = [path for path in paths if path not in whole[max_documents or len(whole) :]]
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.max_documents, self.size = max_documents, sum(self.sizes)
        self.where, self.warned = {}, set()
        texts = [i for i, path in enumerate(self.paths) if path in whole]
        train = (1 - val_fraction) * sum(self.sizes[i] for i in texts)
        self.borders = {}  # where the held-out tail of a .txt file begins, in bytes
        for i in texts:
            self.borders[i] = line_end(self.paths[i], min(self.sizes[i], max(0, int(train))), self.sizes[i])
            train -= self.sizes[i]

    def pieces(self, state):
        first, self.documents = state["file"] if state else 0, state["documents"] if state else 0
        for i in range(first, len(self.paths)):
            self.where = dict(state) if state and i == first else {"file": i, "offset": 0, "line": 0}
            kind, is_whole = kind_of(self.paths[i]), i in self.borders
            text = self.text if is_whole else self.separated
            for piece in {"txt": text, "jsonl": self.lines, "parquet": self.rows}[kind](i):
                if not is_whole:
                    if self.documents == self.max_documents > 0:
                        return
                    self.documents += 1
                yield piece

    def state(self):
        return self.where | {"documents": self.documents}

    def fraction(self):
        behind = sum(self.sizes[: self.where["file"]]) + self.where["offset"]
        share = self.documents / self.max_documents if self.max_documents else 0.0
        return max(share, behind / self.size)

    def text(self, i):
        """a .txt file as one document, or two at the border of what is held out, in parts of at most
        LONGEST bytes that end at a line end where there is one"""
        with open(self.paths[i], "rb") as file:
            for split, end in (("train", self.borders[i]), ("val", self.sizes[i])):
                first = self.where["offset"] in (0, self.borders[i])
                while (offset := self.where["offset"]) < end:
                    file.seek(offset)
                    part = file.read(min(LONGEST, end - offset))
                    if offset + len(part) < end:
                        part = part[: self.cut(i, part)]
                    self.where = {"file": i, "offset": offset + len(part), "line": 0}
                    yield split, self.decoded(i, part, offset), first, offset + len(part) == end
                    first = False

    def cut(self, i, part):
        """where a part of a document ends: after a line, or before a word, or else between two characters"""
        end = part.rfind(b"\n") + 1
        if not end:
            if i not in self.warned:
                print(
                    f"warning: {self.paths[i]} has a line of over {len(part):,} bytes; cut at words instead"
                )
                self.warned.add(i)
            end = part.rfind(b" ", 1)
        if end <= 0:
            end = len(part)
            while end > len(part) - 4 and part[end - 1] & 0xC0 == 0x80:  # it continues a character of UTF-8
                end -= 1
            end -= part[end - 1] >= 0xC0  # the character's first byte: all of it goes to the next part
        return end

    def separated(self, i):
        """documents of a .txt file that end at a separator or the end of the file"""
        with open(self.paths[i], "rb") as file:
            file.seek(self.where["offset"])
            rest, begin, searched = b"", 0, 0  # a document begins at rest[begin]
            while True:
                end = rest.find(self.separator, searched)
                if end < 0:
                    rest, block = rest[begin:], file.read(LONGEST)
                    begin, searched = 0, max(0, len(rest) - len(self.separator))
                    rest += block
                    if len(rest) > LARGEST:
                        fail(f"{self.paths[i]}: no separator {self.separator!r} within {LARGEST:,} bytes")
                    if block:
                        continue
                    end = len(rest)
                if begin == len(rest):
                    return
                offset = self.where["offset"]
                text = self.decoded(i, rest[begin:end], offset)
                searched = min(len(rest), end + len(self.separator))
                self.where = {"file": i, "offset": offset + searched - begin, "line": 0}
                begin = searched
                if text.strip():
                    yield "", text, True, True

    def decoded(self, i, part, offset):
        try:
            return part.decode()
        except UnicodeDecodeError as error:
            at = f"byte {offset + error.start:,} (0x{part[error.start]:02x})"
            charset = "utf-16" if {0xFE, 0xFF} & set(part[error.start : error.start + 2]) else "latin1"
            how = f"if it is text, convert it first (iconv -f {charset} -t utf-8)"
            fail(f"{self.paths[i]}: {at} is not UTF-8; {how}")

    def lines(self, i):
        """documents of a .jsonl file"""
        path = self.paths[i]
        with open(path, "rb") as file:
            file.seek(self.where["offset"])
            while line := file.readline(LARGEST):
                number = self.where["line"] + 1
                if len(line) == LARGEST:
                    fail(
                        f"{path}: line {number} is over {len(line):,} bytes; expected one JSON object a line"
                    )
                self.where = {"file": i, "offset": self.where["offset"] + len(line), "line": number}
                if line.strip():
                    yield "", self.field(path, number, line), True, True

    def field(self, path, number, line):
        try:
            row = json.loads(line)
        except ValueError as error:  # also where it is not UTF-8
            fail(f"{path}: line {number} is not JSON ({error}); expected one object a line")
        if not isinstance(row, dict) or self.column not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            fail(f"{path}: line {number} has no {self.column!r}, but {found}; name the text with --column=")
        if not isinstance(row[self.column], str):
            fail(f"{path}: {self.column!r} of line {number} is {type(row[self.column]).__name__}, not text")
        if any(0xD800 <= ord(char) < 0xE000 for char in row[self.column]):
            fail(f"{path}: {self.column!r} of line {number} holds half a surrogate pair, which is not text")
        return row[self.column]

    def rows(self, i):
        """documents of a .parquet file; `line` counts its rows, `offset` is their share of its bytes"""
        parquet = library("pyarrow.parquet", "pyarrow")
        path, done = self.paths[i], self.where["line"]
        try:
            file = parquet.ParquetFile(path)
        except ValueError as error:  # pyarrow's own error is one
            fail(f"{path} is no parquet file: {error}")
        names, n = file.schema_arrow.names, file.metadata.num_rows
        if self.column not in names:
            fail(
                f"{path} has no column {self.column!r}, but {', '.join(names)}; name the text with --column="
            )
        row = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row + size <= done:
                row += size
                continue
            for text in file.read_row_group(group, [self.column])[self.column].to_pylist():
                row += 1
                if row <= done:
                    continue
                if not isinstance(text, str):
                    fail(f"{path}: {self.column!r} of row {row} is {type(text).__name__}, not text")
                self.where = {"file": i, "offset": self.sizes[i] * row // n, "line": row}
                yield "", text, True, True


def kind_of(path):
    """'txt', 'jsonl' or 'parquet', by a file's ending"""
    ending = os.path.splitext(path)[1].lower()
    return {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(ending, "txt")


def find(pattern):
    """the files of a glob pattern (** for folders below), sorted; exits with 2 where there are none, or all
    are empty"""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        how = (
            "it is a folder; name its files:"
            if os.path.isdir(pattern)
            else "no file is there; as an example:"
        )
        fail(f"files = {pattern!r}: {how} --files='texts/**/*.txt', quoted")
    for path in paths:
        if not os.access(path, os.R_OK):
            fail(f"{path} cannot be read (permission denied)")
        if os.path.getsize(path) == 0:
            print(f"warning: {path} is empty")
    if not any(map(os.path.getsize, paths)):
        fail(f"files = {pattern!r}: no text in {len(paths)} file{'s' * (len(paths) > 1)}")
    return paths


def line_end(path, at, size):
    """the end of the line at byte `at` of a file; of an endless one the next end of a character"""
    if at in (0, size):
        return at
    with open(path, "rb") as file:
        file.seek(at - 1)
        line = file.readline(LONGEST)
    if line.endswith(b"\n") or at - 1 + len(line) == size:
        return at - 1 + len(line)
    with open(path, "rb") as file:
        file.seek(at)
        return at + next((n for n, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80), 0)


def fingerprint(paths):
    """a short hash of the names, sizes and times of files, to tell whether they have changed"""
    known = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
