"""The shape of a Llama by its config.json, in our settings; without torch, for the loader of settings."""

import json
import os

from nanobit.cli import fail

# config.json of a Llama and the settings that it stands for
SETTINGS = dict(hidden_size="n_embd", intermediate_size="ffn_dim", num_hidden_layers="n_layer")
SETTINGS |= dict(num_attention_heads="n_head", num_key_value_heads="n_kv_head", vocab_size="vocab_size")
SETTINGS |= dict(max_position_embeddings="seq_len", rms_norm_eps="norm_eps", rope_theta="rope_theta")
SETTINGS |= dict(tie_word_embeddings="tie_embeddings")
# what a file means that leaves one out: the defaults of transformers' LlamaConfig
LEFT_OUT = dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False, max_position_embeddings=2048)
MOST = 2**24  # of any size: what is built to compare it with the tensors stays possible
NUMBER = ((int, float), 1e-300, 1e300, "a number above 0")
WANTED = dict(rms_norm_eps=NUMBER, rope_theta=NUMBER, tie_word_embeddings=((bool,), 0, 1, "true or false"))


def weight_files(folder):
    """Return the paths of the safetensors files of a folder. Exits with 2 if there are none."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        fail(f"{folder} holds no .safetensors file with weights; copy or export it again")
    return [os.path.join(folder, name) for name in names]


def shapes(folder):
    """Return {name: shape} of the tensors, by the headers of the files. Exits with 2 if one is damaged."""
    tensors = {}
    for path in weight_files(folder):
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, 10**8)))  # the most that the format allows
            tensors |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            fail(f"{path} is damaged ({type(error).__name__}: {error}); copy or export it again")
    return tensors


def faults(theirs):
    """Yield what is wrong with single values of a config.json."""
    for name in SETTINGS:
        types, least, most, words = WANTED.get(name, ((int,), 1, MOST, f"a whole number from 1 to {MOST:,}"))
        if not (type(theirs[name]) in types and least <= theirs[name] <= most):
            yield f"{name} = {theirs[name]!r} is not {words}"


def contradictions(theirs, tensors):
    """Yield the sizes of a config.json that are not those of the tensors, before anything is built by it."""
    n_blocks = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    if n_blocks != theirs["num_hidden_layers"]:
        yield f"num_hidden_layers = {theirs['num_hidden_layers']:,}, but its files hold {n_blocks} blocks"
    for name, axis, key in (
        ("model.embed_tokens.weight", 0, "vocab_size"),
        ("model.embed_tokens.weight", 1, "hidden_size"),
        ("model.layers.0.mlp.down_proj.weight", 1, "intermediate_size"),
    ):
        if name in tensors and (len(tensors[name]) != 2 or tensors[name][axis] != theirs[key]):
            yield f"{key} = {theirs[key]:,}, but {name} has the shape {tensors[name]}"
    if theirs["num_attention_heads"] % theirs["num_key_value_heads"]:
        yield "num_attention_heads is not a multiple of num_key_value_heads"
    if theirs["hidden_size"] // theirs["num_attention_heads"] % 2:
        yield "hidden_size / num_attention_heads is odd"


def read(folder):
    """Return (settings, the whole config.json) of a Llama's folder. Exits with 2 if it is another model, or
    its tensors have other sizes."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            theirs = json.load(file)
        if theirs["model_type"] != "llama":
            fail(f"{folder}: model_type = {theirs['model_type']!r}: only 'llama' can be read")
        theirs = LEFT_OUT | (theirs.get("rope_parameters") or {}) | theirs  # newer files: rope_theta in it
        if theirs.get("num_key_value_heads") is None:
            theirs["num_key_value_heads"] = theirs["num_attention_heads"]
        settings = {ours: theirs[name] for name, ours in SETTINGS.items()}
        if wrong := list(faults(theirs)):
            raise ValueError("; ".join(wrong))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(f"{folder}/config.json cannot be read ({type(error).__name__}: {error}); give a Llama's folder")
    if wrong := list(contradictions(theirs, shapes(folder))):
        fail(*(f"{folder}/config.json: {text}; copy or export it again" for text in wrong))
    for key in ("norm_eps", "rope_theta"):
        settings[key] = float(settings[key])
    return settings, theirs


def shape(folder):
    """Return ({setting: value} of the shape of a run that begins with a folder, the largest seq_len)."""
    settings, theirs = read(folder)
    own = theirs.get("nanobit")
    if type(own) is dict and type(own.get("config")) is dict:
        own = own["config"]  # an export of ours notes which rows of the vocabulary are padding
        settings |= {key: own[key] for key in ("vocab_size", "vocab_multiple") if type(own.get(key)) is int}
    return settings, settings.pop("seq_len")
