"""The tokenizers of a page: tokenizer.js, in Node, makes what nanobit/tokenizer.py and nanobit/chat.py make."""

import base64
import random

import pytest
from parts import CHAR, NUL, llama_like, sentencepiece, tiktoken
from test_chat import HOSTILE, TALKS, talk

from nanobit import chat
from nanobit.export import tokenizer_files
from nanobit.export.web import node
from nanobit.export.web.tokenizer_data import page_tokenizer
from nanobit.tasks.talk import Conversation
from nanobit.tokenizer import TextStream, make_tokenizer

needs_node = pytest.mark.skipif(not node.is_installed(), reason="needs Node.js")

# what strings are made of: each is difficult for a tokenizer in some way
ATOMS = [
    *(
        "the",
        " cat",
        "CAT",
        "aaa",
        "aaaa",
        "a" * 70,
        "don't",
        "'LL",
        "it's",
        " 'tis",
        "12",
        "1212",
        "\u00bd",
        "\u0663",
    ),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
    ),
    *(
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u3000",
        "\x00",
        "\x01",
        "\x7f",
        "\x9f",
        "\u2581",
        " \u2581 ",
        "\ufffd",
        "\uffff",
    ),
    *(
        "\U0001f642",
        "\U0001f469\u200d\U0001f4bb",
        "\U0001f1e9\U0001f1ea",
        "\U0001f44d\U0001f3fd",
        "\u2764\ufe0f",
    ),
    *(
        "e\u0301",
        "\u0301",
        "a\u0308\u0323",
        "\u1112\u1161\u11ab",
        "\ud55c",
        "na\u00efve",
        "\u00df",
        "\u0130",
        "\ufb01",
    ),
    *(
        "\u65e5\u672c\u8a9e",
        "\u0440\u0443\u0441",
        "\u05e9\u05c1",
        "\u0639\u0631\u0628",
        "\u0928\u092e\u0938\u094d",
        "\U00020000",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<|endoftext|>",
        "</",
        "<|",
        "{}",
        "\\s",
        "$&",
        '"',
        "...",
        "!?",
        "_",
        "=" * 20,
    ),
]
WORDS = [
    "the",
    " cat",
    "don't",
    "12",
    "aaaaaaa",
    "\n",
    " the cat",
    "  ",
    "\U0001f642",
    "\u65e5\u672c",
    "cat's",
    "na\u00efve",
]


def difficult(n=300, seed=0):
    """Return n strings of 0 to 24 of the atoms, the first of which are the atoms themselves."""
    rng = random.Random(seed)
    made = ["", *ATOMS]
    return made + ["".join(rng.choices(ATOMS, k=rng.randint(2, 24))) for _ in range(n - len(made))]


STRINGS = difficult()


def chars():
    """Return a char tokenizer of the characters of all strings."""
    return dict(kind="char", sha256="x", eot=0, chars="\0" + "".join(sorted(set("".join(STRINGS)) - {"\0"})))


def without_bytes():
    """Return a SentencePiece tokenizer whose unknown characters have no bytes, and whose pieces cross spaces."""
    return sentencepiece(byte_fallback=False, vocab_size=110, split_by_whitespace=False)


def gpt2_like(size=700):
    """Return a byte-level BPE of many merges, which compete with each other, and of the pattern of GPT-2 as
    tiktoken writes it."""
    rng = random.Random(0)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        text = "".join(rng.choices(WORDS, k=4)).encode()
        start = rng.randrange(len(text))
        token = text[start : start + rng.randint(2, 6)]
        try:
            tokenizer_files.merge_of(ranks | {token: len(ranks)}, token)
            ranks.setdefault(token, len(ranks))
        except AssertionError:  # its parts are no tokens yet
            continue
    content = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken(pattern) | dict(content=content, special={"<|endoftext|>": size}, eot=size)


KINDS = [chars, sentencepiece, llama_like, without_bytes, tiktoken, gpt2_like]


def in_node(expression, spec, **data):
    """Return the value of an expression about the tokenizer t of a spec."""
    return node.call(
        ["tokenizer.js"], f"(t => {expression})(makeTokenizer(spec))", spec=page_tokenizer(spec), **data
    )
