"""Text files for the tests of preparations: written, packed too, and read as pieces of documents."""

import gzip
from types import SimpleNamespace

import pytest

from nanobit.prepare import sources


def written(path, content):
    """Write a file with this content (bytes), packed as its ending says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        packer = pytest.importorskip("zstandard").ZstdCompressor()
        content = packer.compress(content[:20]) + packer.compress(content[20:])
    path.write_bytes(content)
    return path


def options_of(**options):
    """Return the flags of prepare/text.py that decide how files are read."""
    flags = dict(column="text", separator="", val_fraction=0.1, max_documents=0)
    return SimpleNamespace(**flags | dict(keep_crlf=False, plain_quotes=False) | options)


def of_files(paths, state=None, **options):
    """Return (pieces, the state after each) of files, read from a state on."""
    files = sources.Files([str(path) for path in paths], options_of(**options))
    found = [(piece, files.state()) for piece in files.pieces(state)]
    return [piece for piece, _ in found], [state for _, state in found]
