"""Tokenizers: characters, SentencePiece, tiktoken's byte-level BPE. All have size, the number of ids, and

encode(text)       the ids of a text; decode gives it back, but for U+2581 of SentencePiece
encode_on(text)    the ids of text that continues earlier text
decode(ids)        the text, without ids of no token: a model may have more rows than its tokenizer
"""

import base64
import hashlib
import pathlib

from nanobit.cli import fail, library
from nanobit.terminal import printable


class CharTokenizer:
    """One token per character, in the order of spec["chars"]."""

    def __init__(self, spec):
        self.chars = spec["chars"]
        # a NUL is not text: its id is that of the end-of-text token (prepare/vocab.py)
        self.ids = {char: i for i, char in enumerate(self.chars) if char != "\0"}
        self.size = len(self.chars)

    def encode(self, text):
        """Return the ids of text. ValueError for a character that the training text did not have."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            chars = "".join(self.ids)
            shown = chars[:200] + "..." * (len(chars) > 200)
            raise ValueError(f"the tokenizer has no character {error.args[0]!r}; it has {shown!r}") from None

    encode_on = encode

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids if i < len(self.chars))


def read_sentencepiece(content, path):
    """Return (model, marks) of a SentencePiece file's content: {"eot": id}, and "bos" if another token begins
    a text. Exits with 2 if it is not one, or has no eos."""
    model = library("sentencepiece").SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError:
        remedy = "expected a tokenizer.model (a tokenizer.json, as of Llama 3, is not supported)"
        fail(f"tokenizer {path} is not a SentencePiece model; {remedy}")
    if model.eos_id() < 0:
        fail(f"tokenizer {path} has no end-of-text token (eos)")
    marks = {"eot": model.eos_id()}
    if model.bos_id() not in (-1, model.eos_id()):
        marks["bos"] = model.bos_id()
    return model, marks


class SentencePieceTokenizer:
    def __init__(self, spec):
        self.model = library("sentencepiece").SentencePieceProcessor(model_proto=spec["content"])
        self.encode = self.model.encode
        self.size = self.model.vocab_size()
        self.newline = self.model.encode("\n")
        self.keeps_lines = self.model.decode(self.newline) == "\n"  # false if it normalizes white space

    def encode_on(self, text):
        """Return the ids of text without the space that SentencePiece puts before a text."""
        ids = self.model.encode("\n" + text)
        if self.keeps_lines and ids[: len(self.newline)] == self.newline:
            return ids[len(self.newline) :]
        return self.encode(text)

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.size])


def ranks_of(spec):
    """Return {bytes: rank} of a tiktoken tokenizer."""
    lines = (line.split() for line in spec["content"].splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


class TiktokenTokenizer:
    def __init__(self, spec):
        ranks = ranks_of(spec)
        self.known = {*ranks.values(), *spec["special"].values()}  # some encodings leave gaps
        options = dict(pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=spec["special"])
        self.model = library("tiktoken").Encoding(spec["name"], **options)
        self.encode = self.encode_on = self.model.encode_ordinary  # names of special tokens are ordinary text
        self.size = self.model.n_vocab

    def decode(self, ids):
        return self.model.decode([i for i in ids if i in self.known])


KINDS = {"char": CharTokenizer, "sentencepiece": SentencePieceTokenizer, "tiktoken": TiktokenTokenizer}


def spec_of(meta, folder):
    """Return what a checkpoint needs of a data set's tokenizer, by its meta.json: the entry `tokenizer`, the
    content of the file in this folder, eot, the id that ends a text, and bos if another begins one."""
    spec = {key: meta[key] for key in ("eot", "bos") if key in meta}
    return spec | with_content(meta["tokenizer"], folder)


def make_tokenizer(spec):
    """Return the tokenizer of a spec that has its content. Exits with 2 if it cannot be made of that."""
    if spec["kind"] not in KINDS:
        fail(f"tokenizer kind {spec['kind']!r} is unknown; this version reads {', '.join(KINDS)}")
    try:
        return KINDS[spec["kind"]](spec)
    except Exception as error:  # each library raises its own
        what = printable(f"{type(error).__name__}: {error}")[:200]
        fail(f"the {spec['kind']} tokenizer is damaged ({what}); restore its data set, checkpoint or export")


def with_content(spec, folder):
    """Return a spec with the content (bytes) of its file in folder, if it has one. Exits with 2 if bad."""
    if "file" not in spec:
        return spec
    path = pathlib.Path(folder, spec["file"])
    if not path.exists():
        fail(f"tokenizer {path} is missing; make this folder again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != spec["sha256"]:
        fail(f"tokenizer {path} is not the one that belongs there (sha256); make this folder again")
    return spec | {"content": content}


def bos_of(spec):
    """Return the id that begins a text: that of bos, or the end-of-text token if the spec has no bos."""
    return spec.get("bos", spec["eot"])


def encode_prompt(tokenizer, bos, text):
    """Return the ids of a prompt: the one that begins a text first (bos_of), as in training."""
    return [bos, *tokenizer.encode(text)]


def continuation(tokenizer, prompt, new):
    """Return the text that the ids `new` add to a prompt (ids of encode_prompt)."""
    # decoded together: a SentencePiece text alone loses its leading space
    return tokenizer.decode(prompt[1:] + new)[len(tokenizer.decode(prompt[1:])) :]


class TextStream:
    """The text of tokens that come one by one after the ids of earlier text. A character of which only some
    tokens have come waits for the others, three at most, since UTF-8 has four bytes for it. Decodes a window
    of 8 to 16 tokens each time: all of them would take O(n^2)."""

    def __init__(self, tokenizer, before):
        self.decode = tokenizer.decode
        self.window = list(before[-8:])
        self.shown = len(self.decode(self.window))  # characters of the window's text

    def add(self, token):
        """Return the text that is complete with one more token."""
        self.window.append(token)
        text = self.decode(self.window)
        n_open = min(3, len(text) - len(text.rstrip("\ufffd")))
        new = text[self.shown : len(text) - n_open]
        self.shown += len(new)
        if len(self.window) == 16:
            del self.window[:8]
            self.shown -= len(text) - len(self.decode(self.window))
        return new

    def end(self):
        """Return what still waits: a character that stays incomplete."""
        return self.decode(self.window)[self.shown :]
