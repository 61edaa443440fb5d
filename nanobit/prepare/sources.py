"""Documents of files. A source (Files here, Hub in hub.py) has size, its bytes of text (0 if not known), and

pieces(state)   yield (split, text, first, last) from the start (None) or a state: a part of a document,
                and whether it is its first and last part. split is '' if the text decides whether it is
                held out. A row that holds no text is (None, why not, which row, '')
state()         where it stands after the last piece, as JSON
fraction()      the part of it that is read, 0 to 1, or None if that is not known
"""

import glob
import hashlib
import json
import math
import os

from tqdm import tqdm

from nanobit.cli import fail
from nanobit.files import warn_once
from nanobit.prepare import formats
from nanobit.terminal import printable


class Files:
    """Text files, each of the format that its ending names, in the order of their names. Without a separator
    a text is one document, and the last val_fraction of the bytes of all texts, cut at a line end, is held
    out; other documents are held out by their text. Line ends become \\n, unless keep_crlf is set. The offset
    of a state is a byte of the unpacked file."""

    def __init__(self, paths, cfg):
        self.cfg = cfg
        texts = [path for path in paths if is_text(path) and not cfg.separator]  # each one document
        beyond = set(texts[cfg.max_documents or len(texts) :])
        self.max_rows = max(0, (cfg.max_documents or math.inf) - len(texts))
        self.paths = [path for path in paths if path not in beyond]
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.size = sum(self.sizes)
        self.starts = [formats.text_start(path) for path in self.paths]
        # where a whole text ends, and where its held-out tail begins, in bytes: {number of the file: byte}
        numbers = [i for i, path in enumerate(self.paths) if is_text(path) and not cfg.separator]
        self.ends = {i: formats.text_size(self.paths[i]) for i in numbers}
        self.borders = borders(self.paths, self.ends, cfg.val_fraction)
        self.place = {}  # {file, offset, line, documents} after the last piece
        self.raw = None  # the open file, as it lies on the disk

    def pieces(self, state):
        start = state or dict(file=0, offset=0, line=0, documents=0)
        self.place = dict(start)
        for i in range(start["file"], len(self.paths)):
            if i > start["file"]:
                self.place |= dict(file=i, offset=0, line=0)
            if i not in self.ends and self.place["documents"] >= self.max_rows:
                continue
            with formats.opened(self.paths[i]) as (file, self.raw):
                if i in self.ends:
                    yield from self.text(i, file)
                    continue
                for piece in self.rows(i, file):
                    if self.place["documents"] >= self.max_rows:
                        break
                    self.place["documents"] += piece[0] is not None
                    yield piece

    def state(self):
        return dict(self.place)

    def fraction(self):
        i = self.place["file"]
        packing = formats.kind_of(self.paths[i])[1]
        position = self.raw.tell() if packing else self.place["offset"]
        share = (sum(self.sizes[:i]) + position) / self.size
        if self.ends:  # whole texts may follow the last row
            return share
        return max(share, self.place["documents"] / (self.max_rows or math.inf))

    def text(self, i, file):
        """Yield a text, split where its held-out tail begins, in parts that end at a line end."""
        path = self.paths[i]
        offset = max(self.place["offset"], self.starts[i])
        formats.go_to(file, offset)
        rest = b""
        for split, end in (("train", self.borders[i]), ("val", self.ends[i])):
            first = offset in (self.starts[i], self.borders[i])
            while offset < end:
                size = min(formats.LONGEST, end - offset)
                part = rest + file.read(size - len(rest))
                if len(part) < size:
                    fail(f"{printable(path)} has become shorter while it was read")
                at = last_break(path, part) if offset + size < end else size
                rest = part[at:]
                text = self.unified(formats.decode(path, part[:at], offset))
                offset += at
                self.place["offset"] = offset
                yield split, text, first, offset == end
                first = False

    def unified(self, text):
        """Return text with \\n for every line end, unless they are kept."""
        if self.cfg.keep_crlf:
            return text
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def rows(self, i, file):
        """Yield the documents of a file that holds several."""
        path = self.paths[i]
        ending = formats.kind_of(path)[0]
        unit = "row" if ending == "parquet" else "line"
        where = (self.starts[i], max(self.starts[i], self.place["offset"]), self.place["line"])
        for offset, line, value in formats.READERS[ending](file, path, *where, self.cfg):
            self.place |= dict(offset=offset, line=line)
            place = f"{unit} {line:,} of {printable(path)}"
            split, text, *ends = formats.piece_of(value, self.cfg.column, place, split="")
            yield split, self.unified(text), *ends


def last_break(path, part):
    """Return where to cut a part of a document: after a line, or before a word, or between characters."""
    end = max(part.rfind(b"\n"), part.rfind(b"\r", 0, -1)) + 1  # after a last \r there may be a \n
    if end:
        return end
    warn_once(path, f"{printable(path)} has a line of over {len(part):,} bytes; cut at words instead")
    end = part.rfind(b" ", 1)
    if end > 0:
        return end
    end = len(part)
    while end > len(part) - 4 and part[end - 1] & 0xC0 == 0x80:  # it continues a character of UTF-8
        end -= 1
    if part[end - 1] >= 0xC0 or part[end - 1 :] == b"\r":
        end -= 1  # a character's first byte goes to the next part with all of it, \r with its \n
    return end


def is_text(path):
    """Return whether a file is plain text, not rows of which each has one."""
    return formats.kind_of(path)[0] == "txt"


def find(pattern, flag="files"):
    """Return the files of a glob pattern (** for folders below), sorted; the name of an existing file or
    folder stands for itself. Exits with 2 if there are none, or all are empty, and names the flag."""
    folder, name = os.path.split(pattern)
    if os.path.isfile(pattern):
        pattern = glob.escape(pattern)
    elif os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        state = "is a folder; name its files" if os.path.isdir(pattern) else "matches no file"
        fail(f"{flag} = {pattern!r} {state}, for example --{flag}='texts/**/*.txt', quoted")
    for path in paths:
        if not os.access(path, os.R_OK):
            fail(f"{printable(path)} cannot be read (permission denied)")
        if os.path.getsize(path) == 0:
            print(f"warning: {printable(path)} is empty")
    if not any(map(os.path.getsize, paths)):
        fail(f"{flag} = {pattern!r}: no text in {len(paths)} file{'s' * (len(paths) > 1)}")
    return paths


def warn_of_separator(paths, separator, keep_crlf):
    """Print a warning if a separator occurs in none of the texts; the first match ends the search."""
    texts = [path for path in paths if is_text(path)]
    if not separator or not texts:
        return
    pattern = formats.separator_pattern(separator, keep_crlf)
    longest = 2 * len(pattern.pattern)  # no match is longer
    for path in texts:
        with formats.opened(path) as (file, _):
            block = b""
            while more := formats.next_block(file):
                block = block[-longest:] + more
                if pattern.search(block):
                    return
    shown = ", ".join(map(printable, texts[:3])) + ", ..." * (len(texts) > 3)
    print(f"warning: separator = {separator!r} does not occur in {shown}: each file is one document")


def borders(paths, ends, val_fraction):
    """Return {i: byte} for texts paths[i] of ends[i] bytes: where the last val_fraction begins."""
    left = (1 - val_fraction) * sum(ends.values())  # bytes to train on in this text and later ones
    cuts = {}
    inside = None  # (i, byte) of a text that is to be cut inside its last line
    for i, size in ends.items():
        at = min(size, max(0, int(left)))
        cuts[i] = line_end(paths[i], at, size)
        if at < cuts[i] == size:
            inside = i, at
        left -= size
    if inside and cuts == ends:  # the last line, perhaps the only one, would not be held out
        i, at = inside
        block = block_at(paths[i], at)  # cut after the word, or the character if the word does not end
        cuts[i] = at + (block.index(b" ") if b" " in block else character_end(block))
    return cuts


def line_end(path, at, size):
    """Return the end of the line at byte `at` of a file; of an endless one, of the character."""
    if at in (0, size):
        return at
    block = block_at(path, at - 1)
    if match := formats.LINE_END.search(block):
        return at - 1 + match.end()
    return size if at - 1 + len(block) == size else at + character_end(block[1:])


def block_at(path, at):
    """Return at most LONGEST bytes of a file's unpacked content, from byte `at` on."""
    with formats.opened(path) as (file, _):
        formats.go_to(file, at)
        return file.read(formats.LONGEST)


def character_end(block):
    """Return the number of bytes at the start of a block that continue a character of UTF-8."""
    return next((n for n, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 0)


def fingerprint(paths):
    """Return a short hash of the names and the content of files, which changes with them."""
    size = sum(map(os.path.getsize, paths))
    whole = hashlib.sha256()
    with tqdm(desc="checking", total=size, unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    content.update(block)
                    bar.update(len(block))
            whole.update(json.dumps([path, content.hexdigest()]).encode())
    return whole.hexdigest()[:12]


def stamp(paths):
    """Return a short hash of the names, sizes and times of files, which stands for that of their content."""
    known = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
