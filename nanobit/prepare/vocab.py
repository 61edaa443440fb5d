"""The tokenizer of a data set: characters, an encoding of tiktoken, or a SentencePiece model."""

import base64
import difflib
import hashlib
import io
import json
import math
import os
import pathlib
import re

from tqdm import tqdm

from nanobit.cli import fail, library
from nanobit.prepare import hub, token_files
from nanobit.tokenizer import make_tokenizer, read_sentencepiece

TRAIN_CHARS = 50_000_000  # characters of text that a new SentencePiece model is trained on
MODEL = "tokenizer.model"


def pick(cfg, folder, texts):
    """Return (spec, marks, vocab_size) of cfg.tokenizer; its file is written into folder. marks:
    {"eot": id}, with "bos" if another token begins a text. A new tokenizer is made of texts, an iterable; the
    spec of a trained model, with its content, is taken as it is."""
    wanted = cfg.tokenizer
    if isinstance(wanted, dict):
        return of_model(wanted, folder)
    if wanted == "char":
        chars = set().union(*map(set, tqdm(texts, desc="characters", unit=" texts", disable=None)))
        if "\0" in chars:
            fail("the text holds a NUL character, which the char tokenizer needs for itself: is it text?")
        chars = "\0" + "".join(sorted(chars))  # id 0 ends a text
        return token_files.char_tokenizer(chars), {"eot": 0}, len(chars)
    if wanted.endswith(".model") and not os.path.isfile(wanted):
        fail(f"tokenizer = {wanted!r} does not exist; expected a file, org/name on the hub, or an encoding")
    path = os.path.join(wanted, MODEL) if os.path.isdir(wanted) else wanted
    if wanted == "sentencepiece" or os.path.isfile(path) or "/" in wanted:
        spec, content, marks, vocab_size = sentencepiece(cfg, path, texts)
    else:
        spec, content, marks, vocab_size = tiktoken(wanted)
    spec["sha256"] = hashlib.sha256(content).hexdigest()
    token_files.write_file(os.path.join(folder, spec["file"]), content)
    return spec, marks, vocab_size


def of_model(spec, folder):
    """Return what pick returns for the spec of a trained model's tokenizer."""
    entry = {key: value for key, value in spec.items() if key not in ("content", "eot", "bos")}
    if "content" in spec:
        token_files.write_file(os.path.join(folder, spec["file"]), spec["content"])
    marks = {key: spec[key] for key in ("eot", "bos") if key in spec}
    return entry, marks, make_tokenizer(spec).size


def sentencepiece(cfg, path, texts):
    """Return (spec, content, marks, vocab_size) of SentencePiece: a file, of the hub, or trained here."""
    wanted = cfg.tokenizer
    if wanted == "sentencepiece":
        content = train(cfg, library("sentencepiece"), texts)
    elif os.path.isdir(wanted) and not os.path.isfile(path):
        fail(no_model(wanted))
    else:
        local = path if os.path.isfile(path) else hub.model_file(wanted, MODEL)
        content = pathlib.Path(local).read_bytes()
    model, marks = read_sentencepiece(content, wanted)
    probe = "two  spaces,\na line"
    if model.decode(model.encode(probe)) != probe:
        print(f"warning: tokenizer = {wanted!r} changes white space: decoding does not give the text back")
    if wanted == "sentencepiece":  # one trained here has a bos, too, but eot plays both parts
        marks = {"eot": marks["eot"]}
    elif entry := entry_beside(path, content):
        marks = {key: entry[key] for key in ("eot", "bos") if key in entry}
    return {"kind": "sentencepiece", "file": MODEL}, content, marks, model.vocab_size()


def no_model(folder):
    """Return the fault of a folder that holds no SentencePiece model."""
    other = os.path.exists(os.path.join(folder, "tokenizer.json"))
    remedy = "tokenizer.json, as of Llama 3, is not supported" if other else "expected one of SentencePiece"
    return f"tokenizer = {folder!r}: the folder has no {MODEL}; {remedy}"


def entry_beside(path, content):
    """Return the tokenizer entry of the data set or export beside the file at path, or None."""
    for name in ("meta.json", "config.json"):
        try:
            beside = json.loads(pathlib.Path(path).with_name(name).read_bytes())
            spec = beside["tokenizer"] | beside if name == "meta.json" else beside["nanobit"]["tokenizer"]
            if spec["sha256"] == hashlib.sha256(content).hexdigest() and spec["eot"] >= 0:
                return spec
        except (OSError, ValueError, LookupError, TypeError):  # another program's file
            continue
    return None


def train(cfg, spm, texts):
    """Return a new SentencePiece model of the first TRAIN_CHARS of the text, like LLaMA's: BPE with bytes for
    what has no piece, each digit alone, nothing normalized."""
    failures, left = [], TRAIN_CHARS

    def lines():
        nonlocal left
        try:
            for text in tqdm(texts, desc="tokenizer", unit=" texts", disable=None):
                for line in text.split("\n"):
                    if line.strip():
                        yield line[:65536]
                left -= len(text)
                if left < 0:
                    return
        except BaseException as error:  # the library would report it as its own
            failures.append(error)

    out = io.BytesIO()
    options = dict(model_type="bpe", vocab_size=cfg.vocab_size, byte_fallback=True, split_digits=True)
    options |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    options |= dict(allow_whitespace_only_pieces=True, character_coverage=0.9999)
    options |= dict(max_sentence_length=2**20)  # bytes: a longer line would silently be left out
    options |= dict(num_threads=1)  # the same model each time
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=lines(), model_writer=out, **options)
    except (RuntimeError, OSError, ValueError) as error:  # a vocabulary too large or small for the text
        if not failures:
            explain(cfg.vocab_size, " ".join(str(error).split()), TRAIN_CHARS - left)
    if failures:
        raise failures[0]
    return out.getvalue()


def explain(vocab_size, error, n_chars):
    """Exit with one line for an error of sentencepiece that was given a text of n_chars characters."""
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        fail(f"vocab_size = {vocab_size} is too small; at least {match[1]}, or --tokenizer=char")
    if match := re.search(r"value <= (\d+)", error):
        remedy = f"{suited(n_chars)} suits it; the largest possible is {match[1]}"
        fail(f"vocab_size = {vocab_size} is too large for a text of {n_chars:,} characters; {remedy}")
    fail(f"vocab_size = {vocab_size}: sentencepiece cannot train on this text: {error[-200:]}")


def suited(size):
    """Return the flag for a tokenizer that suits so many characters of text: 200 or more for each token."""
    vocab_size = 2 ** int(math.log2(max(1, size / 200)))
    return f"--vocab_size={vocab_size}" if vocab_size >= 512 else "--tokenizer=char"


def warn_if_large(vocab_size, n_tokens, size):
    """Print a warning if a tokenizer trained here has too little text (tokens, bytes) for its vocabulary."""
    if n_tokens < 50 * vocab_size and suited(size) != f"--vocab_size={vocab_size}":
        what = f"vocab_size = {vocab_size:,} is large for {n_tokens:,} tokens of text: a model sees each"
        remedy = f"{suited(size)} suits so little text (under another --name=)"
        print(f"warning: {what} {n_tokens / vocab_size:.1f} times on average; {remedy}")


def tiktoken(name):
    """Return (spec, content of a .tiktoken file, marks, vocab_size) of an encoding of tiktoken."""
    lib = library("tiktoken")
    if name not in lib.list_encoding_names():
        if os.path.isdir(name):
            fail(no_model(name))
        known = ["char", "sentencepiece", *lib.list_encoding_names()]
        remedy = f"expected a file, a hub repository (org/name) or one of {', '.join(known)}"
        if near := difflib.get_close_matches(name, known, n=1):
            remedy = f"did you mean {near[0]}?"
        fail(f"tokenizer = {name!r} is unknown; {remedy}")
    try:
        encoding = lib.get_encoding(name)
    except OSError as error:  # what its HTTP library raises is one
        fail(f"tokenizer = {name!r} cannot be downloaded ({type(error).__name__}); try again", code=1)
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    spec = {"kind": "tiktoken", "name": name, "file": "tokenizer.tiktoken"}
    spec |= {"pattern": encoding._pat_str, "special": encoding._special_tokens}
    return spec, content, {"eot": encoding.eot_token}, encoding.n_vocab
