"""Chunks of documents, read from sources: what a worker process tokenizes at a time."""

import collections
import functools
import hashlib
import sys
import time

from tqdm import tqdm

from nanobit.cli import fail
from nanobit.prepare import hub

CHUNK_CHARS = 2**20  # characters of text in a chunk
START = dict(stream=0, state=None)  # the mark before the first document
SHOWN = 3  # skipped rows that are shown of each kind
HARMLESS = ("empty", "too long")  # kinds that max_bad_rows does not limit
WAITS = (5, 15, 60, 120, 300)  # seconds before a lost connection is opened again


def texts(cfg, streams):
    """Yield the texts of the training documents (for the char tokenizer, of all), piece by piece."""
    for pieces, _, _ in chunks(cfg, streams, START):
        for split, text, _, _ in pieces:
            if split == "train" or cfg.tokenizer == "char":
                yield text


def chunks(cfg, streams, mark):
    """Yield (pieces, the mark after them, the share of the stream that is read): chunks of about CHUNK_CHARS,
    from a mark {stream, state, skipped: {reason: rows so far}} on. A source that fails for lack of a network
    is opened again at the last mark, after a wait."""
    failures = 0  # in a row
    while mark["stream"] < len(streams):
        try:
            for chunk in chunks_of(cfg, streams[mark["stream"]], mark):
                failures = 0
                mark = chunk[1]
                yield chunk
            mark = mark | dict(stream=mark["stream"] + 1, state=None)
        except Exception as error:
            if not hub.is_network(error):
                raise
            fault = f"the hub does not answer ({hub.described(error)})"
            if failures == len(WAITS):
                fail(f"{fault}; the same command continues", code=1)
            print(f"{fault}; again in {WAITS[failures]} s", file=sys.stderr)
            time.sleep(WAITS[failures])
            failures += 1


def chunks_of(cfg, stream, mark):
    """Yield the chunks of one stream, as in chunks()."""
    pieces, size = [], 0
    skipped = collections.Counter(mark.get("skipped", {}))
    for split, text, first, last in stream.pieces(mark["state"]):
        if split is None:
            skip(cfg, skipped, reason=text, place=first)
            continue
        pieces.append((split or split_of(text, cfg.val_fraction), text, first, last))
        size += len(text)
        if size >= CHUNK_CHARS:
            mark = mark | dict(state=stream.state(), skipped=dict(skipped))
            yield pieces, mark, stream.fraction()
            pieces, size = [], 0
    if pieces or skipped != mark.get("skipped", {}):
        yield pieces, mark | dict(state=stream.state(), skipped=dict(skipped)), 1.0


def split_of(text, val_fraction):
    """Return 'train' or 'val' by a hash of the text, so that all copies of a text are in the same split."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


def skip(cfg, skipped, reason, place, others=()):
    """Count a row that is not used. Exits with 2 if more than max_bad_rows of them are not harmless. others:
    {reason: n} of rows that are counted elsewhere."""
    skipped[reason] += 1
    if skipped[reason] <= SHOWN:
        show_once(f"skipped: {place} ({reason})")
    every = skipped + collections.Counter(others)
    n_bad = every.total() - sum(every[kind] for kind in HARMLESS)
    if reason not in HARMLESS and n_bad > cfg.max_bad_rows:
        remedy = "repair them, or allow more with --max_bad_rows="
        if hasattr(cfg, "column"):
            remedy = "repair them, name another --column=, or allow more with --max_bad_rows="
        fail(f"max_bad_rows = {cfg.max_bad_rows:,}: {counted(every)} up to {place}; {remedy}")


@functools.cache
def show_once(line):
    """Print a line on stderr, beside a bar; once, though a text is read twice if a tokenizer is trained."""
    tqdm.write(line, file=sys.stderr)


def counted(skipped):
    """Return skipped rows {reason: n} in words."""
    kinds = [f"{n:,} {reason}" for reason, n in sorted(skipped.items()) if n]
    return f"skipped rows: {', '.join(kinds) or 'none'}"
