"""Write a model as a GGUF file for llama.cpp: ternary matrices as codes with their scale, or as floats."""

import enum
import os

import numpy as np

from nanobit import chat
from nanobit.cli import fail, library
from nanobit.export import hf, tokenizer_files
from nanobit.tokenizer import bos_of

NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
NAMES |= {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn.router": "ffn_gate_inp"}  # of each block
NAMES |= {f"attn.{ours}_proj": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"))}
NAMES |= {f"ffn.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
SIZES = dict(seq_len="context_length", n_embd="embedding_length", n_layer="block_count")
SIZES |= dict(ffn_dim="feed_forward_length", n_head="head_count", n_kv_head="head_count_kv")
SIZES |= dict(norm_eps="layer_norm_rms_eps", head_size="rope_dimension_count", rope_theta="rope_freq_base")
SIZES |= dict(vocab_size="vocab_size", n_expert="expert_count", n_expert_active="expert_used_count")
TERNARY = ("tq2_0", "tq1_0", "q2_0")
TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")
MARK = "nanobit.step"  # our key; others skip it
Q2_0 = enum.IntEnum("Types", "Q2_0", start=42).Q2_0  # of llama.cpp; the gguf package does not know it yet
HEADS = {"q_proj": "n_head", "k_proj": "n_kv_head"}  # of the matrices whose rows are interleaved
BLOCK_SIZE = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "q8_0": 32, "q5_0": 32, "q4_0": 32}


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


def check(part, type_name, embed):
    """Exit with 2 if the widths of a model do not fit the blocks of a type, or the type not the model."""
    cfg = part["config"]
    faults = []
    hf.check(part)
    fits = fitting(part)
    if type_name in TERNARY and not cfg["ternary"]:
        faults.append(f"type = {type_name!r} holds codes, and this is a float model; use {', '.join(fits)}")
    elif type_name not in fits:
        text = f"has blocks of {BLOCK_SIZE[type_name]}, which do not divide the widths of all matrices"
        faults.append(f"type = {type_name!r} {text}; --type={' or '.join(fits)}")
    if cfg["n_embd"] % BLOCK_SIZE.get(embed, 1):
        text = f"has blocks of {BLOCK_SIZE[embed]}, n_embd is {cfg['n_embd']}; use f16"
        faults.append(f"embed = {embed!r} {text}")
    if type_name in ("q5_0", "q4_0") and cfg["ternary"]:  # -8 to 7 times a step: -1 and 1 cannot both be held
        faults.append(
            f"type = {type_name!r} rounds ternary weights, and takes more room than {default_type(part)}"
        )
    if {" ", "\u2581"} <= set(part["tokenizer"].get("chars", "")):
        faults.append("the characters ' ' and U+2581 are one in a GGUF file; --format=hf")
    if part["tokenizer"]["kind"] == "tiktoken" and not tokenizer_files.is_gpt2(part["tokenizer"]):
        faults.append(f"llama.cpp would split text otherwise than {part['tokenizer']['name']!r}; --format=hf")
    if faults:
        fail(*faults)


def fitting(part):
    """Return the types whose blocks divide the widths of a model's matrices."""
    widths = [w.shape[-1] for name, w in part["model"].items() if name.endswith("_proj.weight")]
    names = (*TERNARY, *TYPES) if part["config"]["ternary"] else TYPES
    return [name for name in names if not any(width % BLOCK_SIZE.get(name, 1) for width in widths)]


def default_type(part):
    """Return the first of tq2_0, q2_0 and f16 that holds a model."""
    return next(name for name in ("tq2_0", "q2_0", "f16") if name in fitting(part))


def encoded(gguf, w, type_name, scale=None):
    """Return (array, type of the gguf package) of a tensor, also of experts (E, out, in). With a scale, one
    for each matrix, w holds codes."""
    if w.dim() == 3:
        scales = [None] * len(w) if scale is None else scale
        arrays, types = zip(*(encoded(gguf, expert, type_name, s) for expert, s in zip(w, scales)))
        return np.stack(arrays), types[0]
    if scale is not None:
        if type_name == "q2_0":
            gguf.constants.GGML_QUANT_SIZES[Q2_0] = (64, 18)
            return q2_0(w.numpy(), 1 / scale.item()), Q2_0
        w = w / scale  # an all-zero block keeps its scale 0: its codes are 0, too
    gguf_type = gguf.GGMLQuantizationType[type_name.upper()]
    return gguf.quants.quantize(np.ascontiguousarray(w.numpy(), np.float32), gguf_type), gguf_type


def write(part, path, type_name, embed):
    """Write one GGUF file at `path`; type_name: of matrices, embed: of embedding and head."""
    gguf = library("gguf")
    check(part, type_name, embed)
    cfg = part["config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32(MARK, part["step"])
    writer.add_name(cfg["run_id"])
    sizes = cfg | dict(head_size=cfg["n_embd"] // cfg["n_head"])
    for name, theirs in SIZES.items():
        if cfg["n_expert"] or "expert" not in name:
            getattr(writer, f"add_{theirs}")(sizes[name])
    add_tokenizer(gguf, writer, part["tokenizer"], cfg["vocab_size"])
    for name, w in part["model"].items():
        if name.endswith("weight_scale") or (name == "head.weight" and cfg["tie_embeddings"]):
            continue
        scale = None
        if hf.is_ternary(part, name):
            w, scale = hf.codes_of(part, name)
        if heads := HEADS.get(name.split(".")[-2]):
            w = interleaved(w, cfg[heads])
        wanted = type_name if name.endswith("_proj.weight") else "f32"
        if name in ("embed.weight", "head.weight"):
            w = w[: cfg["vocab_size"]]
            wanted = embed
        array, dtype = encoded(gguf, w, wanted, scale)
        theirs = hf.their_name(name, NAMES, "blk")
        if w.dim() == 3:  # all experts of a layer are one tensor
            theirs += "_exps"
        writer.add_tensor(f"{theirs}.weight", array, raw_dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()  # what is open cannot be deleted on Windows


def add_tokenizer(gguf, writer, spec, vocab_size):
    """Add the tokenizer of a spec with content, and the token that begins each text, as in training."""
    Kind = gguf.TokenType
    if spec["kind"] == "tiktoken":
        vocab, merges = tokenizer_files.bpe_of(spec)
        rows = {i: (text, 0.0, Kind.NORMAL) for text, i in vocab.items()}
        rows |= {i: (text, 0.0, Kind.CONTROL) for text, i in spec["special"].items()}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif spec["kind"] == "char":  # as pieces of one character: a space is written as U+2581 there
        names = [char.replace(" ", "\u2581").replace("\0", chat.CHAR_END) for char in spec["chars"]]
        rows = {i: (name, 0.0, Kind.NORMAL) for i, name in enumerate(names)}
        rows |= {i: (names[i], 0.0, Kind.CONTROL) for i in (spec["eot"], bos_of(spec))}
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(False)
    else:
        pieces = tokenizer_files.pieces(spec)
        rows = {i: (piece, score, Kind[kind.upper()]) for i, (piece, score, kind) in enumerate(pieces)}
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(True)
    rows = [rows.get(i, (f"<unused_{i}>", 0.0, Kind.UNUSED)) for i in range(vocab_size)]
    writer.add_token_list([text for text, *_ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for *_, kind in rows])
    writer.add_bos_token_id(bos_of(spec))
    writer.add_eos_token_id(spec["eot"])
    writer.add_add_bos_token(True)
    if "chat" in spec:
        writer.add_chat_template(chat.jinja(spec))
