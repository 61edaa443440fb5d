"""
Formats of text files: how the documents of a file are found in its bytes.

A reader yields (offset, line, value) for each document: where the file continues after it, as a byte of the
unpacked content, the number of its line or row, and the value that should be its text. It can start from any
such offset and line. It exits with 2 and one line if the file does not have its format.
"""

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
EXPECTED = (
    "expected UTF-8 text, .jsonl, .csv, .tsv or .parquet; of these all but .parquet also as .gz or .zst"
)
BINARY = {"PDF": b"%PDF", "Word, Excel or .zip": b"PK\x03\x04"}  # their first bytes
MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
}  # before UTF-16, whose mark begins one of these
MARKS |= {"UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
LINE_END = re.compile(rb"\r\n|\n|\r")


def kind_of(path):
    """Return ('txt', 'jsonl', 'csv', 'tsv' or 'parquet', '' or '.gz' or '.zst') by a file's ending."""
    stem, ending = os.path.splitext(path.lower())
    packing = ending if ending in PACKINGS else ""
    return KINDS.get(os.path.splitext(stem)[1] if packing else ending, "txt"), packing


class Zst(io.RawIOBase):
    """The content of a .zst file of one or more frames. EOFError if it ends within a frame."""

    def __init__(self, raw):
        self.zstandard, self.raw = library("zstandard"), raw
        self.frame, self.packed, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.raw.read(2**17)
            if not self.packed:
                if self.frame:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self.frame = (
                    self.frame or self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                )
                self.ready = self.frame.decompress(self.packed)
            except self.zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


@contextlib.contextmanager
def opened(path):
    """Open (the unpacked content of a file, the file itself), both binary, as a context. Exits with 2 if it
    is damaged."""
    packing = kind_of(path)[1]
    try:
        with open(path, "rb") as raw:
            if packing == ".gz":
                yield gzip.GzipFile(fileobj=raw), raw
            else:
                yield io.BufferedReader(Zst(raw), LONGEST) if packing else raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(f"{printable(path)} is damaged, or not a {packing} file: {error}; make or download it again")


def go_to(file, offset, place=0):
    """Move from byte `place` of an unpacked file to a later one; what cannot seek is read up to there."""
    if file.seekable():
        file.seek(offset)
    while not file.seekable() and place < offset and (part := file.read(min(LONGEST, offset - place))):
        place += len(part)


def text_start(path):
    """Return the byte at which the text of a file starts: 0, or 3 after a byte order mark. Exits with 2 if
    the file is not UTF-8 text: UTF-16, or an archive or a picture, which have NUL bytes."""
    kind, packing = kind_of(path)
    shown = printable(path)
    if kind == "parquet":
        if packing:
            fail(f"{shown}: unpack it first; a .parquet file is compressed inside")
        return 0
    with opened(path) as (file, _):
        head = file.read(8000)
    for charset, marks in MARKS.items():
        if head.startswith(marks):
            fail(f"{shown} is {charset}; convert it: iconv -f {charset} -t UTF-8 {shown} > utf8.txt")
    for program, mark in BINARY.items():
        if head.startswith(mark):
            fail(f"{shown} is a {program} file, not text; save its text as a .txt file first; {EXPECTED}")
    if b"\0" in head:
        fail(f"{shown} is not text: byte {head.index(0):,} is NUL; {EXPECTED}")
    return 3 if head.startswith(codecs.BOM_UTF8) else 0


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
        at = f"byte {offset + error.start:,} (0x{part[error.start]:02x})"
        how = "if it is text in another encoding, convert it first (iconv -f latin1 -t utf-8)"
        fail(f"{printable(path)}: {at} is not UTF-8; {how}; {EXPECTED}")


def separator_pattern(separator, any_line_end):
    """Return a regular expression (bytes) for a separator. any_line_end: a line end in it matches each of
    \\n, \\r\\n and \\r, but never half of one."""
    line_end = rb"(?:\r\n|\r(?!\n)|\n)"
    parts = re.split(r"\r\n|\r|\n", separator) if any_line_end else [separator]
    return re.compile(line_end.join(re.escape(part.encode()) for part in parts))


def next_block(file):
    """Return the next bytes of a file, not ending between \\r and \\n."""
    block = file.read(LONGEST)
    while block.endswith(b"\r") and (more := file.read(1)):
        block += more
    return block


def separated(file, path, offset, separator):
    """Yield the documents of a text that end at a separator (a pattern of separator_pattern) or the end of
    the file; those of white space alone are left out."""
    longest = 2 * len(separator.pattern)  # no match is longer
    rest, begin, searched = b"", 0, 0  # a document begins at rest[begin]
    while True:
        found = separator.search(rest, searched)
        if not found:
            rest, block = rest[begin:], next_block(file)
            begin, searched = 0, max(0, len(rest) - longest)
            rest += block
            if len(rest) > LARGEST:
                fail(f"{printable(path)}: no separator within {LARGEST:,} bytes")
            if block:
                continue
        if begin == len(rest):
            return
        end, after = found.span() if found else (len(rest), len(rest))
        text = decode(path, rest[begin:end], offset)
        offset += after - begin
        begin = searched = after
        if text.strip():
            yield offset, 0, text


def whole_lines(file, path, line):
    """Yield the lines of a file, each (number, bytes)."""
    while raw := file.readline(LARGEST):
        line += 1
        if len(raw) == LARGEST:
            fail(f"{printable(path)}: line {line} is over {len(raw):,} bytes; {EXPECTED}")
        yield line, raw


def json_lines(file, path, offset, line, column):
    """Yield the documents of a file of JSON objects, one a line. The first one must have the column; if a
    later one does not, its value is None."""
    is_first, path = line == 0, printable(path)
    for number, raw in whole_lines(file, path, line):
        offset += len(raw)
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:  # also if it is not UTF-8
            fail(f"{path}: line {number} is not JSON ({error}); expected one object a line")
        if not isinstance(row, dict) or is_first and column not in row:
            has = printable(", ".join(row)) if isinstance(row, dict) else type(row).__name__
            fail(f"{path}: line {number} has no {column!r}, but {has}; name the text with --column=")
        is_first = False
        yield offset, number, row.get(column)


def table_rows(file, path, start, offset, line, column, delimiter, plain_quotes=False):
    """Yield the documents of a table in text, whose first row, at byte `start`, names the columns. A row may
    have several lines, if a cell is quoted; with plain_quotes quotes are characters as all others.

    Exits with 2 if a cell has quotes that do not fit its beginning and end, or if quotes join lines of a .tsv
    file that are whole rows without them: the writer of such a file does not quote cells."""
    csv.field_size_limit(LARGEST)
    quoting = csv.QUOTE_NONE if plain_quotes else csv.QUOTE_MINIMAL
    shown, place = printable(path), start  # place: the byte after the lines that were read
    number, tabs = line, []  # the last line of the last row; the tabs of each line read since

    def lines():
        nonlocal place
        for _, raw in whole_lines(file, path, 0):
            place += len(raw)
            tabs.append(raw.count(b"\t"))
            yield decode(path, raw, place - len(raw))

    rows = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        names = next(rows, [])
        if column not in names:
            has = printable(", ".join(names))
            fail(f"{shown} has no column {column!r}, but {has}; name the text with --column=")
        before = rows.line_num
        if offset:
            go_to(file, offset, place)
            place = offset
        number = max(line, before)
        tabs.clear()
        for row in rows:
            if delimiter == "\t" and len(tabs) > 1 and {*tabs} == {len(names) - 1} != {0}:
                raise csv.Error(f"a cell joins {len(tabs)} lines that are whole rows without its quotes")
            number += len(tabs)
            tabs.clear()
            if row:
                at = names.index(column)
                yield place, number, row[at] if at < len(row) else None
    except csv.Error as error:
        how = "" if plain_quotes else '; if its " are characters of the text, set --plain_quotes'
        fail(f"{shown}: the row at line {number + 1} cannot be read: {error}{how}")


def parquet_rows(path, done, column):
    """Yield the documents of a .parquet file after its first `done` rows; offset is a row's
    share of the bytes."""
    parquet = library("pyarrow.parquet", "pyarrow")
    shown, size = printable(path), os.path.getsize(path)
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own error is one
        fail(f"{shown} is not a parquet file: {error}")
    names, n = file.schema_arrow.names, file.metadata.num_rows
    if column not in names:
        has = printable(", ".join(names))
        fail(f"{shown} has no column {column!r}, but {has}; name the text with --column=")
    row = 0
    for group in range(file.num_row_groups):
        in_group = file.metadata.row_group(group).num_rows
        if row + in_group <= done:
            row += in_group
            continue
        for value in arrow_values(file.read_row_group(group, [column])[column]):
            row += 1
            if row > done:
                yield size * row // n, row, value


def arrow_values(column):
    """Return the Python values of a column of arrow; texts as bytes if one of them is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast("binary").to_pylist()


def text_of(value):
    """Return (text, '') of a value, or ('', why it has none). TypeError if it is something else than text."""
    if value is None or value != value:  # NaN is how tables of numbers write a missing text
        return "", "null"
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return "", "not UTF-8"
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:
        return "", "half a surrogate pair"
    return (value, "") if value.strip() else ("", "empty")
