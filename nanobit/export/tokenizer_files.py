"""A tokenizer for other engines: the files that AutoTokenizer reads, the pieces and merges of a GGUF file."""

import os

from nanobit import chat
from nanobit.cli import fail, library
from nanobit.files import write_json
from nanobit.tokenizer import bos_of, ranks_of

CONTENT = {"sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}  # the file of its content


def pieces(spec):
    """Return [(piece, score, kind)] of a SentencePiece tokenizer; kind is normal, byte, control or unknown.
    Exits with 2 if it splits or changes text in a way that the files cannot state."""
    model = library("sentencepiece").SentencePieceProcessor(model_proto=spec["content"])
    tests = dict(byte=model.IsByte, control=model.IsControl, unknown=model.IsUnknown)
    rows = []
    for i in range(model.vocab_size()):
        kind = next((name for name, test in tests.items() if test(i)), "normal")
        rows.append((model.IdToPiece(i), model.GetScore(i), kind))
    ranks = [score for _, score, kind in rows if kind == "normal"]
    if any(rank % 1 for rank in ranks):
        fail("the SentencePiece tokenizer is not a BPE model (its scores are not ranks): only BPE is written")
    if ranks.count(0) > 1:  # such a symbol has the score 0, which the first merge has too
        fail("the SentencePiece tokenizer has user-defined symbols, which no merge makes: not to be written")
    text = " \uff21  \ufb01\t."  # a wide A and a ligature, which NFKC replaces
    if model.normalize(text) != ("\u2581" + text).replace(" ", "\u2581"):
        remedy = "train it with --normalization_rule_name=identity --remove_extra_whitespaces=false"
        fail(f"the SentencePiece tokenizer normalizes text, or puts no space before it: {remedy}")
    return rows


def merge_of(ranks, token):
    """Return the two parts of which byte-pair merging makes a token, by the ranks below its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs)
        assert rank < ranks[token], "a token that no merges make"
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def visible(token):
    """Return bytes as the characters of byte-level BPE (GPT-2): printable ones as themselves."""
    return token.decode("latin-1").translate(VISIBLE)


SAME = {*range(33, 127), *range(161, 173), *range(174, 256)}
VISIBLE = {b: 256 + i for i, b in enumerate(b for b in range(256) if b not in SAME)}


def is_gpt2(spec):
    """Return whether a tiktoken tokenizer splits text as GPT-2 does, the only rule that all readers know."""
    return spec["name"] in ("gpt2", "r50k_base")


def bpe_of(spec):
    """Return (vocab {text: id}, merges [(left, right)]) of a tiktoken tokenizer in visible characters."""
    ranks = ranks_of(spec)
    ordered = sorted(ranks, key=ranks.get)
    merges = [tuple(map(visible, merge_of(ranks, token))) for token in ordered if len(token) > 1]
    return {visible(token): ranks[token] for token in ordered}, merges


def fast_tokenizer(spec):
    """Return (tokenizer of the tokenizers library, names of the tokens that begin and end a text)."""
    lib = library("tokenizers")
    models, pre, decoders = lib.models, lib.pre_tokenizers, lib.decoders
    if spec["kind"] == "char":
        names = [char.replace("\0", chat.CHAR_END) for char in spec["chars"]]
        # an unknown character is an error: this name is not in the vocabulary
        made = lib.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
        made.pre_tokenizer = pre.Split(lib.Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    elif spec["kind"] == "tiktoken":
        vocab, merges = bpe_of(spec)
        made = lib.Tokenizer(models.BPE(vocab, merges))
        # this library reads {1,3}+ as {1,3} repeated; without its possessive + it matches the same texts
        pattern = lib.Regex(spec["pattern"].replace("{1,3}+", "{1,3}"))
        split = pre.Split(pattern, "isolated")
        made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(sorted(spec["special"], key=spec["special"].get))
        names = {i: name for name, i in spec["special"].items()}
    else:
        rows = pieces(spec)
        names = [piece for piece, _, _ in rows]
        vocab = {piece: i for i, piece in enumerate(names)}
        order = []
        for piece, score, kind in rows:
            cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if kind == "normal"]
            order += [(-score, vocab[a], vocab[b], (a, b)) for a, b in cuts if {a, b} <= vocab.keys()]
        merges = [pair for *_, pair in sorted(order)]
        unknown = next(piece for piece, _, kind in rows if kind == "unknown")
        made = lib.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        spaces = lib.normalizers.Replace(" ", "\u2581")
        made.normalizer = lib.normalizers.Sequence([lib.normalizers.Prepend("\u2581"), spaces])
        strip = decoders.Strip(content=" ", left=1)
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        made.decoder = decoders.Sequence(parts)
        special = [piece for piece, _, kind in rows if kind == "control"]
        made.add_special_tokens([lib.AddedToken(piece, special=True, normalized=False) for piece in special])
    begin, end = names[bos_of(spec)], names[spec["eot"]]
    made.add_special_tokens([lib.AddedToken(name, special=True, normalized=False) for name in (begin, end)])
    template = dict(single=f"{begin} $A", special_tokens=[(begin, bos_of(spec))])
    made.post_processor = lib.processors.TemplateProcessing(**template)
    if spec["kind"] == "tiktoken":
        steps = [lib.processors.ByteLevel(trim_offsets=False), made.post_processor]
        made.post_processor = lib.processors.Sequence(steps)
    return made, begin, end


def write(spec, out, seq_len):
    """Write the files from which AutoTokenizer makes this tokenizer, with the first token of a text, and the
    template of conversations if the model was trained on them."""
    made, begin, end = fast_tokenizer(spec)
    made.save(os.path.join(out, "tokenizer.json"))
    content = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=begin, eos_token=end)
    content |= dict(clean_up_tokenization_spaces=False, model_max_length=seq_len)
    if "chat" in spec:
        content["chat_template"] = chat.jinja(spec)
    write_json(os.path.join(out, "tokenizer_config.json"), content)
    if spec["kind"] in CONTENT:
        with open(os.path.join(out, CONTENT[spec["kind"]]), "wb") as file:
            file.write(spec["content"])
