"""The tokenizer of a page: what tokenizer.js needs to make the same ids as nanobit/tokenizer.py."""

from nanobit import chat
from nanobit.cli import fail
from nanobit.export import tokenizer_files
from nanobit.tokenizer import bos_of, make_tokenizer


def page_tokenizer(spec):
    """Return the tokenizer of a spec with content, as a dict for JSON. Exits with 2 if tokenizer.js would
    split text otherwise."""
    tokenizer = make_tokenizer(spec)
    entry = dict(kind=spec["kind"], bos=bos_of(spec), eot=spec["eot"], chat=spec.get("chat"))
    entry["special_names"] = chat.special_names(tokenizer)
    if spec["kind"] == "char":
        return entry | dict(chars=spec["chars"])
    if spec["kind"] == "sentencepiece":
        unknown = tokenizer.model.unk_id()
        return entry | dict(pieces=tokenizer_files.pieces(spec), unknown_text=tokenizer.decode([unknown]))
    if not tokenizer_files.is_gpt2(spec):
        fail(f"the script of a page would split text otherwise than {spec['name']!r}; --format=hf")
    vocab, _ = tokenizer_files.bpe_of(spec)
    token_of = {i: text for text, i in vocab.items()}
    tokens = [token_of.get(i) for i in range(max(token_of) + 1)]  # None: an id of no token
    chars = "".join(tokenizer_files.visible(bytes([b])) for b in range(256))
    return entry | dict(tokens=tokens, bytes=chars, pattern=spec["pattern"], special=spec["special"])
