"""nanobit/tokenizer.py: characters that a tokenizer lacks, and bytes that make no character."""

import parts
import pytest
from conftest import CHARS

from nanobit.tokenizer import TextStream, make_tokenizer


def test_tokenizer_names_the_character_it_does_not_have():
    """A character that the tokenizer lacks is named in a ValueError."""
    t = make_tokenizer({"kind": "char", "chars": CHARS})
    assert t.decode(t.encode("to be\n")) == "to be\n"
    with pytest.raises(ValueError, match="'É'"):
        t.encode("É")


@pytest.mark.parametrize("make", [parts.sentencepiece, parts.tiktoken])
def test_bytes_that_make_no_character_are_shown_in_time(make):
    """A byte is held back for three tokens at most, in bounded memory, and whole characters after such bytes
    are printed whole."""
    spec = make()
    tokenizer = make_tokenizer(spec)
    whole = tokenizer.encode_on("\U0001f600")
    byte, stream = whole[-1], TextStream(tokenizer, [spec["eot"]])
    shown = [stream.add(byte) for _ in range(1000)]
    assert not any(shown[:3])
    assert set(shown[3:]) == {"\ufffd"}
    assert len(stream.window) < 16
    assert "".join(map(stream.add, whole)) + stream.end() == "\ufffd" * 3 + "\U0001f600"
