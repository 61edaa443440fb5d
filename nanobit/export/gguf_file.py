"""
Models as one GGUF file, for llama.cpp: architecture llama, the tokenizer inside.

Ternary matrices are stored as codes with a scale in fp16 for each block (tq2_0, tq1_0, q2_0) or as floats
(f16, f32). No such file can state that the input of a token is rounded as a whole: llama.cpp rounds it in
smaller blocks, or with f32 not at all.
"""

import enum
import os

import numpy as np

import quant
from nanobit.cli import fail, library
from nanobit.export import hf, tokenizer_files
from nanobit.tokenizer import bos_of

NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
BLOCK = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn.router": "ffn_gate_inp"}
BLOCK |= {f"attn.{ours}_proj": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"))}
BLOCK |= {f"ffn.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
TERNARY = ("tq2_0", "tq1_0", "q2_0")
TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")
MARK = "nanobit.step"  # our key; others skip it
BLOCK_SIZE = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "q8_0": 32, "q5_0": 32, "q4_0": 32}


class More(enum.IntEnum):
    """The types of llama.cpp that the gguf package does not know yet."""

    Q2_0 = 42


def q2_0(codes, scale):
    """Return the bytes (rows, 18 in / 64) of codes (rows, in) with one scale: for each 64 the scale in fp16,
    then four neighbours to a byte, lowest bits first."""
    u = (codes + 1).astype(np.uint8).reshape(-1, 16, 4)
    packed = u[..., 0] | u[..., 1] << 2 | u[..., 2] << 4 | u[..., 3] << 6
    d = np.full((len(u), 1), scale, np.float16).view(np.uint8)
    return np.concatenate([d, packed], 1).reshape(len(codes), -1)


def interleaved(w, n_head):
    """Return rows of q or k (out, in) in the order of rotary positions that turn neighbours, not halves."""
    return w.view(n_head, 2, w.shape[0] // n_head // 2, -1).swapaxes(1, 2).reshape(w.shape)


def is_ours(path):
    """Return whether a path is a GGUF file that write() has written."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(256)
    return start.startswith(b"GGUF") and MARK.encode() in start


def their_name(name):
    """Return their name of one of our tensors; all experts of a layer are one tensor."""
    path = name.removesuffix(".weight")
    if path in NAMES:
        return f"{NAMES[path]}.weight"
    _, i, rest = path.split(".", 2)
    return f"blk.{i}.{BLOCK[rest]}.weight"


def check(part, kind, embed):
    """Exit with 2 if the widths of a model do not fit the blocks of a type, or the type not the model."""
    cfg = part["config"]
    faults = []
    hf.check(part)
    if kind in TERNARY and not cfg["ternary"]:
        faults.append(f"type = {kind!r} holds codes, and this is a float model; use {', '.join(TYPES)}")
    widths = {name: w.shape[-1] for name, w in part["model"].items() if name.endswith("_proj.weight")}
    for name, width in widths.items():
        if width % BLOCK_SIZE.get(kind, 1):
            fits = [other for other in (*TERNARY, *TYPES) if width % BLOCK_SIZE.get(other, 1) == 0]
            fits = [other for other in fits if other not in TERNARY or cfg["ternary"]]
            faults.append(
                f"type = {kind!r} has blocks of {BLOCK_SIZE[kind]}, and {name} is {width} wide; for it "
                f"--type={' or '.join(fits)}"
            )
            break
    if cfg["n_embd"] % BLOCK_SIZE.get(embed, 1):
        faults.append(
            f"embed = {embed!r} has blocks of {BLOCK_SIZE[embed]}, n_embd is {cfg['n_embd']}; use f16"
        )
    if kind in ("q5_0", "q4_0") and cfg["ternary"]:  # -8 to 7 times a step: -1 and 1 cannot both be held
        faults.append(f"type = {kind!r} rounds ternary weights, and takes more room than {smallest(part)}")
    if {" ", "\u2581"} <= set(part["tokenizer"].get("chars", "")):
        faults.append("the characters ' ' and U+2581 are one in a GGUF file; --format=hf")
    if part["tokenizer"]["kind"] == "tiktoken" and part["tokenizer"]["name"] not in ("gpt2", "r50k_base"):
        faults.append(f"llama.cpp would split text otherwise than {part['tokenizer']['name']!r}; --format=hf")
    if faults:
        fail(*faults)


def smallest(part):
    """Return the smallest type that holds a model."""
    widths = [w.shape[-1] for name, w in part["model"].items() if name.endswith("_proj.weight")]
    kinds = ("tq2_0", "q2_0", "f16") if part["config"]["ternary"] else ("f16",)
    return next(kind for kind in kinds if all(width % BLOCK_SIZE.get(kind, 1) == 0 for width in widths))


def encoded(gguf, w, kind, codes=None, scale=None):
    """Return (array, type of the gguf package) of a float tensor, or of codes with their scale."""
    if kind == "q2_0":
        sizes = gguf.constants.GGML_QUANT_SIZES
        sizes[More.Q2_0] = (64, 18)
        return q2_0(codes, scale), More.Q2_0
    kind = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.quants.quantize(np.ascontiguousarray(w, np.float32), kind), kind


def matrix(gguf, part, name, w, kind):
    """Return encoded() of one of our matrices: (out, in), or of experts (E, out, in)."""
    if w.dim() == 3:
        arrays, types = zip(*(matrix(gguf, part, name, expert, kind) for expert in w))
        return np.stack(arrays), types[0]
    if not hf.is_ternary(part, name):
        return encoded(gguf, w.numpy(), kind)
    codes, scale = quant.ternarize(w)
    # an all-zero block keeps its scale 0: its codes are 0 all the same
    return encoded(gguf, (codes / scale).numpy(), kind, codes.numpy(), 1 / scale.item())


def write(part, path, kind, embed):
    """Write one GGUF file at `path`; kind and embed: the types of matrices, and of embedding and head."""
    gguf = library("gguf")
    check(part, kind, embed)
    cfg = part["config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32(MARK, part["step"])
    writer.add_name(cfg["run_id"])
    writer.add_context_length(cfg["seq_len"])
    writer.add_embedding_length(cfg["n_embd"])
    writer.add_block_count(cfg["n_layer"])
    writer.add_feed_forward_length(cfg["ffn_dim"])
    writer.add_head_count(cfg["n_head"])
    writer.add_head_count_kv(cfg["n_kv_head"])
    writer.add_layer_norm_rms_eps(cfg["norm_eps"])
    writer.add_rope_dimension_count(cfg["n_embd"] // cfg["n_head"])
    writer.add_rope_freq_base(cfg["rope_theta"])
    writer.add_vocab_size(cfg["vocab_size"])
    if cfg["n_expert"]:
        writer.add_expert_count(cfg["n_expert"])
        writer.add_expert_used_count(cfg["n_expert_active"])
    add_tokenizer(gguf, writer, part["tokenizer"], cfg["vocab_size"])
    for name, w in part["model"].items():
        w = w.detach()
        if name == "head.weight" and cfg["tie_embeddings"]:
            continue
        if name in ("embed.weight", "head.weight"):
            array, dtype = encoded(gguf, w[: cfg["vocab_size"]].numpy(), embed)
        elif name.endswith("_proj.weight"):
            if name.endswith("attn.q_proj.weight"):
                w = interleaved(w, cfg["n_head"])
            elif name.endswith("attn.k_proj.weight"):
                w = interleaved(w, cfg["n_kv_head"])
            array, dtype = matrix(gguf, part, name, w, kind)
        else:
            array, dtype = encoded(gguf, w.numpy(), "f32")
        theirs = their_name(name)
        if w.dim() == 3:
            theirs = theirs.replace(".weight", "_exps.weight")
        writer.add_tensor(theirs, array, raw_dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()  # what is open cannot be deleted on Windows


def add_tokenizer(gguf, writer, spec, vocab_size):
    """Add the tokenizer of a spec with content, and the token that begins each text, as in training."""
    Kind = gguf.TokenType
    kinds = dict(normal=Kind.NORMAL, byte=Kind.BYTE, control=Kind.CONTROL, unknown=Kind.UNKNOWN)
    if spec["kind"] == "tiktoken":
        vocab, merges = tokenizer_files.bpe_of(spec)
        rows = {i: (text, 0.0, Kind.NORMAL) for text, i in vocab.items()}
        rows |= {i: (text, 0.0, Kind.CONTROL) for text, i in spec["special"].items()}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif spec["kind"] == "char":  # as pieces of one character: a space is written as U+2581 there
        names = [char.replace(" ", "\u2581").replace("\0", tokenizer_files.END) for char in spec["chars"]]
        rows = {i: (name, 0.0, Kind.NORMAL) for i, name in enumerate(names)}
        rows |= {i: (names[i], 0.0, Kind.CONTROL) for i in (spec["eot"], bos_of(spec))}
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(False)
    else:
        pieces = tokenizer_files.pieces(spec)
        rows = {i: (piece, score, kinds[kind]) for i, (piece, score, kind) in enumerate(pieces)}
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(True)
    rows = [rows.get(i, (f"<unused_{i}>", 0.0, Kind.UNUSED)) for i in range(vocab_size)]
    writer.add_token_list([text for text, *_ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for *_, kind in rows])
    writer.add_bos_token_id(bos_of(spec))
    writer.add_eos_token_id(spec["eot"])
    writer.add_add_bos_token(True)
