"""
Where documents come from: a data set of the Hugging Face hub (or a folder laid out like one), or files.

A source is read in order, piece by piece, never as a whole, and knows where it stands:

    pieces(state)   yield (split, text, first, last): a part of a document, and whether it is its first and
                    its last part; from the start (None) or from a state. A row that holds no text is
                    (None, why not, which row, '')
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

from tqdm import tqdm

from nanobit.cli import fail, library
from nanobit.prepare import formats
from nanobit.terminal import printable


class Hub:
    """one split of a data set on the hub, streamed: repo (name or local folder), config, column, revision"""

    def __init__(self, cfg, hub_split, split):
        self.cfg, self.split = cfg, split
        self.revision = cfg.revision = commit(cfg)  # the data set may be changed before this is resumed
        self.data, self.done, self.unusable = open_hub(cfg, cfg.config, hub_split), 0, 0
        columns = self.data.column_names or list(next(self.rows(), {}))
        if cfg.column not in columns:
            fail(f"column = {cfg.column!r} is not in {cfg.repo}; it has {', '.join(columns)}")
        # the others need not be decoded; as a table of arrow a text may be something else than UTF-8
        self.data = self.data.select_columns([cfg.column]).with_format("arrow")
        known = (self.data.info.splits or {}).get(hub_split)
        self.total = known.num_examples if known else 0
        if cfg.max_documents:
            self.total = min(cfg.max_documents, self.total or cfg.max_documents)
        self.size = known.num_bytes if known else 0  # bytes of text, where that is known

    def pieces(self, state):
        self.done, self.unusable = (state["done"], state.get("unusable", 0)) if state else (0, 0)
        if state:
            self.data.load_state_dict(state["hub"])
        for row in self.rows():  # a table of one row
            if self.done - self.unusable == self.cfg.max_documents > 0:
                return
            self.done += 1
            try:
                text, fault = formats.text_of(formats.arrow_values(row[self.cfg.column])[0])
            except TypeError as error:
                fail(f"column = {self.cfg.column!r} of {self.cfg.repo} holds {error}, not text")
            self.unusable += bool(fault)
            if fault:
                yield None, fault, f"row {self.done:,} of {self.cfg.repo}", ""
            else:
                yield self.split, text, True, True

    def rows(self):
        """Yield the rows of the data set. Exits with 2 if a file of it cannot be read: what datasets reads in
        blocks, as .jsonl and .csv, has no next row then."""
        rows = iter(self.data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # pyarrow, pandas and datasets have no common type for it
                if is_network(error):
                    raise
                where = f"repo = {self.cfg.repo!r}: a file after row {self.done:,} cannot be read"
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                how = "prepare/text.py --files= reads its files, downloaded, and skips rows without text"
                fail(f"{where} ({text}); {how}")
            yield row

    def state(self):
        return {"done": self.done, "unusable": self.unusable, "hub": self.data.state_dict()}

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
    """Text files, each of the format that its ending names, in the order of their names.

    Without a separator a text is one document, and the last val_fraction of the bytes of all texts, cut at a
    line end, is held out; documents of the other formats, and separated ones, are held out by their text.
    Line ends become \\n, unless keep_crlf is set. plain_quotes: as of formats.table_rows. The offset of a
    state is a byte of the unpacked file.
    """

    def __init__(
        self, paths, column, separator, val_fraction, max_documents=0, keep_crlf=False, plain_quotes=False
    ):
        self.column, self.keep_crlf, self.revision, self.documents = column, keep_crlf, "", 0
        self.plain_quotes = plain_quotes
        self.separator = separator_of(separator, keep_crlf)
        whole = [path for path in paths if is_text(path) and not separator]  # each one document
        self.paths = [path for path in paths if path not in whole[max_documents or len(whole) :]]
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.starts = [formats.text_start(path) for path in self.paths]
        self.max_documents, self.size = max_documents, sum(self.sizes)
        self.where, self.raw, self.warned = {}, None, set()
        texts = [(i, path) for i, path in enumerate(self.paths) if is_text(path) and not separator]
        self.ends = {i: formats.text_size(path) for i, path in texts}
        train = (1 - val_fraction) * sum(self.ends.values())
        self.borders, cut = {}, None  # where the held-out tail of a text begins, in bytes
        for i, size in self.ends.items():
            at = min(size, max(0, int(train)))
            self.borders[i] = line_end(self.paths[i], at, size)
            if at < self.borders[i] == size:
                cut = i, at
            train -= size
        if cut and self.borders == self.ends:  # the last line, perhaps the only one, would not be held out
            self.borders[cut[0]] = word_end(self.paths[cut[0]], cut[1])

    def pieces(self, state):
        first, self.documents = (state["file"], state["documents"]) if state else (0, 0)
        for i in range(first, len(self.paths)):
            self.where = dict(state) if state and i == first else {"file": i, "offset": 0, "line": 0}
            with formats.opened(self.paths[i]) as (file, self.raw):
                if i in self.borders:
                    yield from self.text(i, file)
                    continue
                for piece in self.rows(i, file):
                    if self.documents == self.max_documents > 0:
                        return
                    self.documents += piece[0] is not None
                    yield piece

    def state(self):
        return self.where | {"documents": self.documents}

    def fraction(self):
        i = self.where["file"]
        is_packed = formats.kind_of(self.paths[i])[1]
        behind = sum(self.sizes[:i]) + (self.raw.tell() if is_packed else self.where["offset"])
        share = self.documents / self.max_documents if self.max_documents else 0.0
        return max(share, behind / self.size)

    def text(self, i, file):
        """Yield a text as one document, or two at the border of what is held out, in parts of at most LONGEST
        bytes that end at a line end if they have one."""
        path, rest = self.paths[i], b""
        self.where["offset"] = max(self.where["offset"], self.starts[i])
        formats.go_to(file, self.where["offset"])
        for split, end in (("train", self.borders[i]), ("val", self.ends[i])):
            first = self.where["offset"] in (self.starts[i], self.borders[i])
            while (offset := self.where["offset"]) < end:
                size = min(formats.LONGEST, end - offset)
                part = rest + file.read(size - len(rest))
                if len(part) < size:
                    fail(f"{printable(path)} has become shorter while it was read")
                at = len(part) if offset + len(part) == end else self.cut(i, part)
                part, rest = part[:at], part[at:]
                self.where = {"file": i, "offset": offset + len(part), "line": 0}
                text = self.unified(formats.decode(path, part, offset))
                yield split, text, first, offset + len(part) == end
                first = False

    def unified(self, text):
        """Return text with \\n for every line end, unless they are kept."""
        return text if self.keep_crlf or "\r" not in text else text.replace("\r\n", "\n").replace("\r", "\n")

    def cut(self, i, part):
        """where a part of a document ends: after a line, or before a word, or else between two characters"""
        end = max(part.rfind(b"\n"), part.rfind(b"\r", 0, -1)) + 1  # behind a last \r there may be a \n
        if not end:
            if i not in self.warned:
                path = printable(self.paths[i])
                print(f"warning: {path} has a line of over {len(part):,} bytes; cut at words instead")
                self.warned.add(i)
            end = part.rfind(b" ", 1)
        if end <= 0:
            end = len(part)
            while end > len(part) - 4 and part[end - 1] & 0xC0 == 0x80:  # it continues a character of UTF-8
                end -= 1
            # a character's first byte goes to the next part with all of it, \r with its \n
            end -= part[end - 1] >= 0xC0 or part[end - 1 :] == b"\r"
        return end

    def rows(self, i, file):
        """Yield the documents of a file that holds several."""
        path, column, start = self.paths[i], self.column, self.starts[i]
        offset, line, kind = self.where["offset"], self.where["line"], formats.kind_of(path)[0]
        if kind == "parquet":
            values = formats.parquet_rows(path, line, column)
        elif kind in ("csv", "tsv"):
            formats.go_to(file, start)
            delimiter = "," if kind == "csv" else "\t"
            where = (start, offset, line)
            values = formats.table_rows(file, path, *where, column, delimiter, self.plain_quotes)
        else:
            offset = max(offset, start)
            formats.go_to(file, offset)
            if kind == "jsonl":
                values = formats.json_lines(file, path, offset, line, column)
            else:
                values = formats.separated(file, path, offset, self.separator)
        for offset, line, value in values:
            self.where = {"file": i, "offset": offset, "line": line}
            place = f"{'row' if kind == 'parquet' else 'line'} {line:,} of {printable(path)}"
            try:
                text, fault = formats.text_of(value)
            except TypeError as error:
                fail(f"{column!r} in {place} is {error}, not text; name the text with --column=")
            if fault:
                yield None, fault, place, ""
            else:
                yield "", self.unified(text), True, True


def is_text(path):
    """Return whether a file is plain text, not rows of which each has one."""
    return formats.kind_of(path)[0] == "txt"


def separator_of(flag, keep_crlf):
    """Return the pattern of a --separator, in which \\n, \\r and \\t stand for these characters."""
    for name, char in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t")):
        flag = flag.replace(name, char)
    return formats.separator_pattern(flag, any_line_end=not keep_crlf)


def find(pattern):
    """Return the files of a glob pattern (** for folders below), sorted. The name of an existing file or
    folder stands for itself, whatever characters it has. Exits with 2 if there are none, or all are empty."""
    folder, name = os.path.split(pattern)
    if os.path.isfile(pattern):
        pattern = glob.escape(pattern)
    elif os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
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
            fail(f"{printable(path)} cannot be read (permission denied)")
        if os.path.getsize(path) == 0:
            print(f"warning: {printable(path)} is empty")
    if not any(map(os.path.getsize, paths)):
        fail(f"files = {pattern!r}: no text in {len(paths)} file{'s' * (len(paths) > 1)}")
    return paths


def warn_of_separator(paths, separator, keep_crlf):
    """Print a warning if a separator occurs in none of the texts; the first one found ends the search."""
    texts = [path for path in paths if is_text(path)]
    pattern = separator_of(separator, keep_crlf)
    for path in texts if separator else ():
        with formats.opened(path) as (file, _):
            longest, block = 2 * len(pattern.pattern), b""
            while more := formats.next_block(file):
                block = block[-longest:] + more
                if pattern.search(block):
                    return
    if separator and texts:
        shown = ", ".join(map(printable, texts[:3])) + ", ..." * (len(texts) > 3)
        print(f"warning: separator = {separator!r} does not occur in {shown}: each file is one document")


def line_end(path, at, size):
    """the end of the line at byte `at` of a file; of an endless one the next end of a character"""
    if at in (0, size):
        return at
    with formats.opened(path) as (file, _):
        formats.go_to(file, at - 1)
        block = file.read(formats.LONGEST)
    if found := formats.LINE_END.search(block):
        return at - 1 + found.end()
    return size if at - 1 + len(block) == size else at + character_end(block[1:])


def word_end(path, at):
    """Return the end of the word at byte `at` of a file, or of the character if the word does not end."""
    with formats.opened(path) as (file, _):
        formats.go_to(file, at)
        block = file.read(formats.LONGEST)
    space = block.find(b" ")
    return at + (space if space >= 0 else character_end(block))


def character_end(block):
    """Return the number of bytes at the start of a block that continue a character of UTF-8."""
    return next((n for n, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 0)


def fingerprint(paths):
    """Return a short hash of the names and the content of files, which changes with them."""
    size = sum(map(os.path.getsize, paths))
    whole = hashlib.sha256()
    with tqdm(desc="checking", total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for path in paths:
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    content.update(block)
                    bar.update(len(block))
            whole.update(json.dumps([path, content.hexdigest()]).encode())
    return whole.hexdigest()[:12]


def stamp(paths):
    """Return a short hash of the names, sizes and times of files: while it is the same, their content counts
    as unchanged without being read."""
    known = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
