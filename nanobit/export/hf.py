"""Models in the form of Hugging Face: a folder that transformers loads, and one that comes back from there.

A ternary model is written as LlamaForCausalLM with quant_method "bitnet": each matrix as uint8 with four
codes to a byte (packed.pack), and its scale 1 / mean|W| as weight_scale; transformers multiplies and divides
in our order, so that its fp32 logits are ours to the last bit. A float model is a plain Llama, a mixture of
experts a Mixtral; one with ternary experts is written dequantized, as no format holds their codes."""

import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import torch

import config
import quant
from model import Transformer
from nanobit import parts
from nanobit.cli import RANK, fail, library
from nanobit.export import llama, tokenizer_files
from nanobit.files import read_json, sha256, write_json
from nanobit.infer import packed
from nanobit.tokenizer import bos_of, read_sentencepiece, with_content

NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
NAMES |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}  # of each block
NAMES |= {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
NAMES |= {f"ffn.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
NAMES |= {"ffn.router": "block_sparse_moe.gate"}
EXPERT = {"ffn.gate_proj": "w1", "ffn.up_proj": "w3", "ffn.down_proj": "w2"}
DEQUANTIZED = "ternary experts, dequantized: a Mixtral rounds no input to int8"
FILES = """README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
tokenizer.model tokenizer.tiktoken""".split()
WITHIN = dict(n_expert=[0], vocab_size=range(1, 2**24 + 1), vocab_multiple=range(1, 2**24 + 1))  # of a reader
PLAIN = dict(attention_bias=False, mlp_bias=False, rope_scaling=None, rope_type="default", hidden_act="silu")
# paths and accounts, which are private
PRIVATE = "out_dir data_dir resume init_from prepare wandb_entity wandb_project wandb_name".split()


def their_name(name, names=NAMES, blocks="model.layers"):
    """Return the name without .weight of one of our tensors, except experts; blocks: what theirs are."""
    path = name.removesuffix(".weight")
    if path in names:
        return names[path]
    _, i, rest = path.split(".", 2)
    return f"{blocks}.{i}.{names[rest]}"


def our_name(name):
    """Return our name of one of their tensors, or None."""
    path, _, what = name.rpartition(".")  # weight or weight_scale
    block = re.match(r"(model\.layers\.\d+\.)?", path)[0]
    ours = {theirs: ours for ours, theirs in NAMES.items()}.get(path.removeprefix(block))
    if ours is None:
        return None
    return f"{block.replace('model.layers', 'blocks')}{ours}.{what}"


def is_ternary(part, name):
    """Return whether a tensor of a model has codes."""
    return part["config"]["ternary"] and name.endswith("_proj.weight")


def codes_of(part, name):
    """Return (codes, scale) of a ternary matrix: what is packed in an exported folder is unpacked."""
    w = part["model"][name]
    if w.dtype == torch.uint8:
        return packed.unpack(w), part["model"][f"{name}_scale"]
    return quant.ternarize(w)


def tensors(part, latent=False):
    """Return {their name: tensor} of a checkpoint's part: ternary matrices packed, with their scale, or the
    float master weights and rows of padding (latent). Exits with 2 if a width cannot be packed."""
    cfg = part["config"]
    written = {}
    for name, w in part["model"].items():
        if name == "head.weight" and cfg["tie_embeddings"]:
            continue
        if name in ("embed.weight", "head.weight") and not latent:
            w = w[: cfg["vocab_size"]]
        has_codes = is_ternary(part, name) and not latent
        if has_codes and cfg["n_expert"]:
            w = quant.dequantized(w)
            has_codes = False
        if w.dim() == 3:  # (E, out, in): one tensor for each expert
            i, rest = name.removesuffix(".weight").split(".", 2)[1:]
            path = f"model.layers.{i}.block_sparse_moe.experts.{{}}.{EXPERT[rest]}.weight"
            written |= {path.format(e): expert.contiguous() for e, expert in enumerate(w)}
        elif not has_codes:
            written[f"{their_name(name)}.weight"] = w.clone()
        elif len(w) % 4:
            fault = f"{name} has {len(w)} rows, which is not a multiple of 4: they cannot be packed"
            fail(f"{fault}; --latent and --format=gguf --type=f16 take any width")
        else:
            codes, scale = quant.ternarize(w)
            written[f"{their_name(name)}.weight"] = packed.pack(codes)
            written[f"{their_name(name)}.weight_scale"] = scale.reshape(1)
    return written


def model_config(part, latent=False):
    """Return the content of config.json."""
    cfg = part["config"]
    spec = part["tokenizer"]
    theirs = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
    theirs |= dict(attention_bias=False, mlp_bias=False, head_dim=cfg["n_embd"] // cfg["n_head"])
    theirs |= dict(bos_token_id=bos_of(spec), eos_token_id=spec["eot"], dtype="float32")
    theirs |= {name: cfg[setting] for name, setting in llama.SETTINGS.items()}
    if latent:
        theirs["vocab_size"] = len(part["model"]["embed.weight"])
    if cfg["n_expert"]:
        theirs |= dict(architectures=["MixtralForCausalLM"], model_type="mixtral")
        theirs |= dict(num_local_experts=cfg["n_expert"], num_experts_per_tok=cfg["n_expert_active"])
        theirs |= dict(router_aux_loss_coef=cfg["router_balance"], sliding_window=None)
    elif cfg["ternary"] and not latent:
        theirs["quantization_config"] = {"quant_method": "bitnet"}
    # what a Llama has no place for, but init_from and sample.py need
    tokenizer = {key: value for key, value in spec.items() if key != "content"}
    if spec["kind"] in tokenizer_files.CONTENT:
        tokenizer["file"] = tokenizer_files.CONTENT[spec["kind"]]
    public = {key: value for key, value in cfg.items() if key not in PRIVATE}
    own = dict(step=part["step"], config=public, tokenizer=tokenizer, curve=part.get("curve", []))
    return theirs | dict(nanobit=own)


def check(part):
    """Exit with 2 if no stock model computes what this one does."""
    cfg = part["config"]
    if cfg["n_expert"] and cfg["n_expert_active"] == 1:
        fail("n_expert_active = 1: a Mixtral multiplies a single expert by no probability; train with 2")
    if part["tokenizer"]["kind"] == "sentencepiece":
        tokenizer_files.pieces(part["tokenizer"])


def write(part, out, latent=False):
    """Write the files of a model, and of its tokenizer, in the folder `out`, which is made."""
    path = os.path.join(out, "model.safetensors")
    check(part)
    save_file = library("safetensors.torch", "safetensors").save_file
    written = tensors(part, latent)
    os.makedirs(out)
    try:
        save_file(written, path, metadata={"format": "pt", "pad": ""})
        # transformers maps the file, in which embedding and head come first. Their address in memory
        # decides in which order a product for one token adds: as ours do, at a multiple of 64 bytes
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if start % 64:
            save_file(written, path, metadata={"format": "pt", "pad": "." * (-start % 64)})
    except library("safetensors").SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from None
    theirs = model_config(part, latent)
    theirs["nanobit"]["sha256"] = sha256(path)
    write_json(os.path.join(out, "config.json"), theirs)
    shutil.copymode(os.path.join(out, "config.json"), path)  # the library makes it private
    marks = {key: theirs[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(os.path.join(out, "generation_config.json"), marks)
    tokenizer_files.write(part["tokenizer"], out, part["config"]["seq_len"])


def is_ours(path):
    """Return whether a folder holds an export of this project, as it was written, and nothing else."""
    try:
        if os.path.islink(path) or set(os.listdir(path)) - set(FILES):
            return False
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            own = json.load(file)["nanobit"]
        return own["sha256"] == sha256(os.path.join(path, "model.safetensors"))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_own(own, settings):
    """Raise ValueError if what export.py noted in a config.json is damaged, or contradicts the rest of it."""
    default = config.assignments(config.DEFAULT)
    for key, value in own.get("config", {}).items():
        is_within = key not in WITHIN or value in WITHIN[key]
        if type(value) is not type(default.get(key, value)) or not is_within:
            raise ValueError(f"nanobit: {key} = {value!r}")
        # with latent, vocab_size counts the rows of padding
        if key in settings and key != "vocab_size" and value != settings[key]:
            raise ValueError(f"nanobit: {key} = {value!r}, beside it {settings[key]!r}")
    if own:
        int(own["sha256"], 16)
        spec = own["tokenizer"]
        file = spec["chars"] if spec["kind"] == "char" else spec["file"]
        ids = range(own["config"]["vocab_size"])
        are_ids = all(type(i) is int and i in ids for i in (spec["eot"], bos_of(spec)))
        if not (are_ids and spec["sha256"] and spec["kind"]) or type(file) is not str:
            raise ValueError(f"nanobit: tokenizer {spec}")
        for step, loss in own.get("curve", []):
            if (type(step), type(loss)) != (int, float) or not math.isfinite(loss):
                raise ValueError(f"nanobit: curve with the point {step!r}, {loss!r}")


def read_config(folder, to_train):
    """Return (settings, what export.py noted, whether the matrices are packed) of a folder's config.json."""
    settings, theirs = llama.read(folder)
    own = theirs.get("nanobit") or {}
    try:
        check_own(own, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fail(f"{folder}/config.json cannot be read ({type(error).__name__}: {error}); export it again")
    faults = []
    head_dim = theirs.get("head_dim") or settings["n_embd"] // settings["n_head"]
    if head_dim * settings["n_head"] != settings["n_embd"]:
        faults.append(f"head_dim = {head_dim}: ours is hidden_size / num_attention_heads")
    packing = theirs.get("quantization_config")
    if packing and to_train:
        faults.append("its weights are packed, and cannot be trained on: export with --latent")
    elif packing and packing != {"quant_method": "bitnet"}:
        faults.append(f"quantization_config = {packing}: only weights that export.py has packed can be read")
    if not to_train and not own and (packing or not os.path.exists(os.path.join(folder, "tokenizer.model"))):
        usable = "of other folders only float Llamas with a tokenizer.model can be used"
        faults.append(f"it is not an export of export.py, its tokenizer cannot be read: {usable}")
    for key, value in PLAIN.items():
        if (theirs.get(key) or value) != value:
            faults.append(f"{key} = {theirs[key]!r}: in our blocks it is {value!r}")
    if faults:
        fail(*(f"{folder}: {text}" for text in faults))
    # without a note it is a float model of another origin
    settings |= dict(n_expert=0, vocab_multiple=1, ternary=False) | own.get("config", {})
    return settings, own, bool(packing)


def read_weights(folder, own, to_train):
    """Return {our name: tensor} of a folder, of which export.py noted `own`: float32, or uint8 if packed."""
    load_file = library("safetensors.torch", "safetensors").load_file
    weights = {}
    for path in llama.weight_files(folder):
        try:
            is_whole = not own or sha256(path) == own["sha256"]
            content = load_file(path)
        except Exception as error:  # the library has its own errors
            fail(f"{path} is damaged ({type(error).__name__}: {error}); copy or export it again")
        fault = f"{path} is not the file that was exported (sha256): trained further, or damaged"
        if not is_whole and not to_train:
            fail(f"{fault}; copy or export it again (train.py --init_from= takes one trained further)")
        if not is_whole:
            print(f"init_from: {fault}")
        for key, w in content.items():
            if name := our_name(key):
                weights[name] = w if w.dtype == torch.uint8 else w.float()
            elif "rotary_emb" not in key:
                fail(f"{path} holds {key}, which our blocks have no place for")
    return weights


def check_shapes(folder, settings, weights, is_packed):
    """Exit with 2 if a tensor is missing, not expected, or of another shape or dtype than by the settings."""
    with torch.device("meta"):
        needed = Transformer(SimpleNamespace(**config.assignments(config.DEFAULT) | settings)).state_dict()
        for name in [name for name in needed if is_packed and is_ternary(dict(config=settings), name)]:
            needed[name] = torch.empty(len(needed[name]) // 4, needed[name].shape[1])
            needed[f"{name}_scale"] = torch.empty(1)
    for name, w in weights.items():
        if (w.dtype == torch.uint8) != (f"{name}_scale" in needed):
            fail(f"{folder}: {name} is {w.dtype}, which config.json does not ask for; export again")
    parts.check_shapes(folder, weights, needed, "copy or export it again")


def report_template(folder):
    """Print that a template of conversations is ignored, if the folder has one where transformers looks."""
    has_file = os.path.exists(os.path.join(folder, "chat_template.jinja"))
    if has_file or "chat_template" in read_json(os.path.join(folder, "tokenizer_config.json")):
        print(f"{folder}: its chat_template is ignored; here conversations have one format", file=sys.stderr)


def read(folder, to_train=False):
    """Return the part of a checkpoint.pt that a folder stands for; packed matrices stay uint8, beside their
    weight_scale. to_train: a float Llama of any origin, whose tokenizer is what is known of it, or None.
    Exits with 2 if it is not a Llama, damaged or incomplete."""
    settings, own, is_packed = read_config(folder, to_train)
    weights = read_weights(folder, own, to_train)
    # rows of padding were not written, and a product with fewer rows adds in another order
    for name in weights.keys() & {"embed.weight", "head.weight"}:
        rows = -len(weights[name]) % settings["vocab_multiple"]
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, rows))
    if settings.get("tie_embeddings") and "embed.weight" in weights:
        weights["head.weight"] = weights["embed.weight"]
    check_shapes(folder, settings, weights, is_packed)
    spec = own.get("tokenizer")
    path = os.path.join(folder, "tokenizer.model")
    if own and not to_train:
        spec = with_content(spec, folder)
    elif not own and os.path.exists(path):  # beside a Llama of another origin
        spec = with_content(dict(kind="sentencepiece", file="tokenizer.model", sha256=sha256(path)), folder)
        spec |= read_sentencepiece(spec["content"], path)[1]
    if RANK == 0 and "chat" not in (spec or {}):
        report_template(folder)
    curve = own.get("curve", [])
    return dict(config=settings, model=weights, tokenizer=spec, step=own.get("step", 0), curve=curve)
