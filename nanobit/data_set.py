"""The meta.json of a prepared data set: it must agree with a schema, and with itself."""

import hashlib
import json
import os
import re

from nanobit.terminal import printable


class Damaged(Exception):
    """The error of a data set that is not what its meta.json says, or that cannot be read now: one line."""


# The schema of meta.json. A rule is (what is expected, test), the {field: rule} of an object, or the
# [pattern, rule] of an object whose fields all match the pattern. An object may have more fields.


def whole(least, most):
    return f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most


def matching(expected, pattern):
    return expected, lambda v: type(v) is str and re.fullmatch(pattern, v) is not None


COUNT = whole(0, 2**50)
ID = whole(0, 2**24 - 1)
TEXT = matching("a text that is not empty", r"(?s).+")
SHA256 = matching("64 hexadecimal digits", r"[0-9a-f]{64}")
FILE = matching("the name of a file in this folder", r"[\w-][\w.-]*")
KIND = matching("'char' or 'sentencepiece' or 'tiktoken'", "char|sentencepiece|tiktoken")
META = {
    "complete": ("true or false", lambda v: type(v) is bool),
    "dtype": matching("'uint16' or 'uint32'", "uint16|uint32"),
    "vocab_size": whole(1, 2**24),
    "eot": ID,
    "tokens": [r"\w+", COUNT],
    "bytes": [r"\w+", COUNT],
    "shards": [r"\w+_\d{5}\.bin", {"tokens": whole(1, 2**40), "sha256": SHA256}],
    "tokenizer": {"kind": KIND, "sha256": SHA256},
}
OPTIONAL = {"bos": ID, "task": TEXT, "command": TEXT}
OPTIONAL |= {"window": whole(1, 2**24), "counted": [r"\w+", COUNT]}  # of a data set with loss masks
TOKENIZER = {  # what each kind has besides
    "char": {"chars": TEXT},
    "sentencepiece": {"file": FILE},
    "tiktoken": {"file": FILE, "name": TEXT, "pattern": TEXT, "special": ["(?s).*", ID]},
}


def fault(value, rule, name):
    """Return what is wrong with a value, called `name` in the line, or ''."""
    if isinstance(rule, tuple):
        expected, is_right = rule
        return "" if is_right(value) else f"{name} = {shown(value)}, expected {expected}"
    if type(value) is not dict:
        return f"{name or 'its content'} is {shown(value)}, expected an object"
    if isinstance(rule, list):
        pattern, part = rule
        if strange := [field for field in value if not re.fullmatch(pattern, field)]:
            return f"{name} has the entry {shown(strange[0])}"
        rule = dict.fromkeys(value, part)
    prefix = f"{name}." if name else ""
    for field, part in rule.items():
        if field not in value:
            return f"{prefix}{field} is missing"
        if text := fault(value[field], part, prefix + printable(field)):
            return text
    return ""


def shown(value):
    """Return a value of a file as a short text that is safe to print."""
    text = printable(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def is_masked(meta):
    """Return whether a data set has loss masks, one beside each shard."""
    return any("mask_sha256" in shard for shard in meta["shards"].values())


def mask_of(name):
    """Return the name of the loss mask of a shard."""
    return name.removesuffix(".bin") + ".mask"


def contradiction(meta):
    """Return how the fields of a meta.json, each of them right alone, disagree, or ''."""
    spec = meta["tokenizer"]
    ids = meta["vocab_size"]
    for key in ("eot", "bos"):
        if meta.get(key, 0) >= ids:
            return f"{key} = {meta[key]}, but vocab_size = {ids}"
    if meta["dtype"] == "uint16" and ids > 2**16:
        return f"vocab_size = {ids}, but dtype = 'uint16' has {2**16} ids"
    if spec["kind"] == "char":
        n = len(spec["chars"])
        digest = hashlib.sha256(spec["chars"].encode(errors="surrogatepass")).hexdigest()
        if n != ids or digest != spec["sha256"]:
            return f"tokenizer.chars are {n}, but vocab_size = {ids}, or their sha256 is another one"
    for split in sorted({name.rpartition("_")[0] for name in meta["shards"]}):
        names = sorted(name for name in meta["shards"] if name.rpartition("_")[0] == split)
        held = sum(meta["shards"][name]["tokens"] for name in names)
        expected = meta["tokens"].get(split, 0)
        if held > expected or (held < expected and meta["complete"]):
            return f"tokens.{split} = {expected}, but its shards have {held}"
        if names != [f"{split}_{i:05d}.bin" for i in range(len(names))]:
            return f"shards has {names[-1]}, but not all before it"
    return mask_fault(meta)


def mask_fault(meta):
    """Return how the loss masks that a meta.json names disagree with its other fields, or ''."""
    if not is_masked(meta) and "counted" not in meta:
        return ""
    for name, shard in meta["shards"].items():
        if text := fault(shard, {"mask_sha256": SHA256}, f"shards.{name}"):
            return text
        split = name.rpartition("_")[0]
        if meta["complete"] and not meta.get("counted", {}).get(split):
            return f"counted.{split} is missing or 0, but the shards have masks"
    return ""


def unreadable(path, error):
    """Return the line for a file that exists and cannot be read now (an OSError): it may be whole."""
    return f"{path} cannot be read now ({error.strerror}); repair that and run the same command again"


def read_meta(folder):
    """Return the meta.json of a data set of tokens. Raises Damaged with one line."""
    path = os.path.join(folder, "meta.json")
    again = f"restore it from a copy, or delete {folder} and prepare it again"
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
    except OSError as error:
        raise Damaged(unreadable(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({type(error).__name__}: {shown(str(error))}); {again}") from None
    if type(meta) is dict and "examples" in meta:
        remedy = f"not tokens to train on; to score a model: evaluate.py --dataset={os.path.basename(folder)}"
        raise Damaged(f"data set {folder} is a task of text, {remedy}")
    text = fault(meta, META, "")
    text = text or fault(meta, {field: rule for field, rule in OPTIONAL.items() if field in meta}, "")
    text = text or fault(meta["tokenizer"], TOKENIZER[meta["tokenizer"]["kind"]], "tokenizer")
    if text := text or contradiction(meta):
        raise Damaged(f"{path} is damaged: {text}; {again}")
    return meta
