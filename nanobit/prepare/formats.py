"""Formats of text files: how the documents of a file are found in its bytes.

A reader (READERS) yields (offset, line, value) for each document: the byte of the unpacked content after it,
the number of its line or row, and the value that should be its text. It can continue at any such offset and
line. start: the byte at which the text starts; options: the flags. Exits with 2 and one line if the file
does not have its format."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib

from nanobit.cli import fail, library
from nanobit.terminal import printable

LONGEST = 2**20  # bytes of a text file that are read in search of a line end
LARGEST = 2**26  # bytes of a document in a file of several: it is held in memory
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
KINDS |= {".csv": "csv", ".tsv": "tsv"}
PACKINGS = (".gz", ".zst")
EXPECTED = "expected UTF-8 text, .jsonl, .csv, .tsv or .parquet; all but .parquet also as .gz or .zst"
FOREIGN = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}  # by their first bytes
FOREIGN |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # which begin one of UTF-32
FOREIGN |= {b"%PDF": "PDF", b"PK\x03\x04": "Word, Excel or .zip"}
LINE_END = re.compile(rb"\r\n|\n|\r")


def kind_of(path):
    """Return ('txt', 'jsonl', 'csv', 'tsv' or 'parquet', '' or '.gz' or '.zst') by a file's ending."""
    stem, ending = os.path.splitext(path.lower())
    if ending in PACKINGS:
        return KINDS.get(os.path.splitext(stem)[1], "txt"), ending
    return KINDS.get(ending, "txt"), ""


class ZstdFile(io.RawIOBase):
    """The content of a .zst file of one or more frames. EOFError if it ends within a frame."""

    def __init__(self, raw):
        self.raw = raw
        self.decompressor = library("zstandard").ZstdDecompressor(max_window_size=2**31)
        self.frame, self.packed, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready and (packed := self.packed or self.raw.read(2**17)):
            self.frame = self.frame or self.decompressor.decompressobj()
            self.ready = self.frame.decompress(packed)
            self.packed = self.frame.unused_data  # of the next frame
            if self.frame.eof:
                self.frame = None
        if self.frame and not self.ready:
            raise EOFError("it ends within a frame")
        n = min(len(buffer), len(self.ready))
        buffer[:n] = self.ready[:n]
        self.ready = self.ready[n:]
        return n


@contextlib.contextmanager
def opened(path):
    """Open (the unpacked content of a file, the file itself), both binary. Exits with 2 if it is damaged."""
    packing = kind_of(path)[1]
    errors = (EOFError, zlib.error, gzip.BadGzipFile)
    if packing == ".zst":
        errors += (library("zstandard").ZstdError,)
    try:
        with open(path, "rb") as raw:
            if packing == ".gz":
                yield gzip.GzipFile(fileobj=raw), raw
            elif packing == ".zst":
                yield io.BufferedReader(ZstdFile(raw), LONGEST), raw
            else:
                yield raw, raw
    except errors as error:
        fail(f"{printable(path)} is damaged, or not a {packing} file: {error}; make or download it again")


def go_to(file, offset, current=0):
    """Move from byte `current` of an unpacked file to a later one; what cannot seek is read up to there."""
    if file.seekable():
        file.seek(offset)
        return
    while current < offset and (part := file.read(min(LONGEST, offset - current))):
        current += len(part)


def text_start(path):
    """Return the byte at which the text of a file starts. Exits with 2 if it is not UTF-8 text."""
    shown = printable(path)
    match kind_of(path):
        case "parquet", "":
            return 0
        case "parquet", _:
            fail(f"{shown}: unpack it first; a .parquet file is compressed inside")
    with opened(path) as (file, _):
        head = file.read(8000)
    for mark, name in FOREIGN.items():
        if head.startswith(mark) and name.startswith("UTF"):
            fail(f"{shown} is {name}; convert it: iconv -f {name} -t UTF-8 {shown} > utf8.txt")
        if head.startswith(mark):
            fail(f"{shown} is a {name} file, not text; save its text as a .txt file first; {EXPECTED}")
    if b"\0" in head:  # an archive or a picture
        fail(f"{shown} is not text: byte {head.index(0):,} is NUL; {EXPECTED}")
    return 3 if head.startswith(codecs.BOM_UTF8) else 0  # after a byte order mark


def text_size(path):
    """Return the number of bytes of a file's unpacked content."""
    if not kind_of(path)[1]:
        return os.path.getsize(path)
    with opened(path) as (file, _):
        return sum(len(part) for part in iter(lambda: file.read(LONGEST), b""))


def decode(path, part, offset):
    """Return the text of UTF-8 bytes that begin at byte `offset` of a file. Exits with 2 if they are not."""
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        at = f"{printable(path)}: byte {offset + error.start:,} (0x{part[error.start]:02x})"
        fail(f"{at} is not UTF-8; convert another encoding first (iconv -f latin1 -t utf-8); {EXPECTED}")


def separator_pattern(flag, keep_crlf):
    """Return a regular expression (bytes) for a --separator, in which \\n, \\r and \\t stand for these
    characters. Unless they are kept, a line end in it matches \\n, \\r\\n and \\r, but never half of one."""
    separator = flag.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")
    parts = [separator] if keep_crlf else re.split(r"\r\n|\r|\n", separator)
    return re.compile(rb"(?:\r\n|\r(?!\n)|\n)".join(re.escape(part.encode()) for part in parts))


def next_block(file):
    """Return the next bytes of a file, not ending between \\r and \\n."""
    block = file.read(LONGEST)
    while block.endswith(b"\r") and (more := file.read(1)):
        block += more
    return block


def separated(file, path, start, offset, line, options):
    """Yield the documents of a text, which end at a separator, but for those of white space alone."""
    go_to(file, offset)
    pattern = separator_pattern(options.separator, options.keep_crlf)
    rest, block = b"", b"begin"
    while block:
        block = next_block(file)
        rest += block
        if len(rest) > LARGEST:
            fail(f"{printable(path)}: no separator within {LARGEST:,} bytes")
        spans = [match.span() for match in pattern.finditer(rest)]
        if not block:  # the end of the file ends a document, too
            spans.append((len(rest), len(rest)))
        begin = 0
        for end, after in spans:
            text = decode(path, rest[begin:end], offset)
            offset += after - begin
            begin = after
            if text.strip():
                yield offset, 0, text
        rest = rest[begin:]


def whole_lines(file, path, line):
    """Yield the lines of a file, each (number, bytes)."""
    while raw := file.readline(LARGEST):
        line += 1
        if len(raw) == LARGEST:
            fail(f"{printable(path)}: line {line} is over {len(raw):,} bytes; {EXPECTED}")
        yield line, raw


def need_column(what, column, names):
    """Exit with 2 if the column of the texts is not one of the names in a file or a line."""
    if column not in names:
        names = printable(", ".join(names))
        fail(f"{what} has no column {column!r}, but {names}; name the text with --column=")


def json_lines(file, path, start, offset, line, options):
    """Yield the documents of a file of JSON objects, one a line; only the first one must have the column."""
    go_to(file, offset)
    column = options.column
    is_first = line == 0
    for number, raw in whole_lines(file, path, line):
        offset += len(raw)
        if not raw.strip():
            continue
        what = f"{printable(path)}: line {number}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:  # also if it is not UTF-8
            fail(f"{what} is not JSON ({error}); expected one object a line")
        if not isinstance(row, dict):
            fail(f"{what} has no column {column!r}: it is {type(row).__name__}, expected an object")
        if is_first:
            need_column(what, column, row)
        is_first = False
        yield offset, number, row.get(column)


def table_rows(file, path, start, offset, line, options):
    """Yield the documents of a table in text, whose first row, at byte `start`, names the columns. A quoted
    cell may have several lines; with plain_quotes quotes are characters. Exits with 2 if quotes do not fit a
    cell, or join lines of a .tsv file that are whole rows without them: its writer does not quote cells."""
    go_to(file, start)
    csv.field_size_limit(LARGEST)
    delimiter = {"csv": ",", "tsv": "\t"}[kind_of(path)[0]]
    quoting = csv.QUOTE_NONE if options.plain_quotes else csv.QUOTE_MINIMAL
    current = start  # the byte after the lines that were read
    number = line  # the last line of the last row
    tabs = []  # those of each line read since

    def lines():
        nonlocal current
        for _, raw in whole_lines(file, path, 0):
            current += len(raw)
            tabs.append(raw.count(b"\t"))
            yield decode(path, raw, current - len(raw))

    rows = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        names = next(rows, [])
        need_column(printable(path), options.column, names)
        at = names.index(options.column)
        number = max(line, rows.line_num)
        if offset > start:
            go_to(file, offset, current)
            current = offset
        tabs.clear()
        for row in rows:
            if delimiter == "\t" and len(tabs) > 1 and {*tabs} == {len(names) - 1} != {0}:
                raise csv.Error(f"a cell joins {len(tabs)} lines that are whole rows without its quotes")
            number += len(tabs)
            tabs.clear()
            if row:
                yield current, number, row[at] if at < len(row) else None
    except csv.Error as error:
        remedy = '; if its " are characters of the text, set --plain_quotes' * (not options.plain_quotes)
        fail(f"{printable(path)}: the row at line {number + 1} cannot be read: {error}{remedy}")


def parquet_rows(file, path, start, offset, line, options):
    """Yield the documents of a .parquet file after its row `line`; offset is a row's share of the bytes."""
    parquet = library("pyarrow.parquet", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own error is one
        fail(f"{printable(path)} is not a parquet file: {error}")
    need_column(printable(path), options.column, file.schema_arrow.names)
    size = os.path.getsize(path)
    end = 0
    for group in range(file.num_row_groups):
        first = end + 1
        end += file.metadata.row_group(group).num_rows
        if end <= line:
            continue
        column = file.read_row_group(group, [options.column])[options.column]
        for row, value in enumerate(arrow_values(column), first):
            if row > line:
                yield size * row // file.metadata.num_rows, row, value


READERS = {"txt": separated, "jsonl": json_lines, "parquet": parquet_rows}
READERS |= {"csv": table_rows, "tsv": table_rows}


def arrow_values(column):
    """Return the Python values of a column of arrow; texts as bytes if one of them is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast("binary").to_pylist()


def piece_of(value, column, place, split):
    """Return the piece (sources.py) that a value of a column is. Exits with 2 if it is of another type."""
    if value is None or value != value:  # NaN is how tables of numbers write a missing text
        return None, "null", place, ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, "not UTF-8", place, ""
    if not isinstance(value, str):
        fail(f"{column!r} in {place} is {type(value).__name__}, not text; name the text with --column=")
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "half a surrogate pair", place, ""
    return (split, value, True, True) if value.strip() else (None, "empty", place, "")
