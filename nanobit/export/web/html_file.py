"""Write a model as one HTML page that runs it: its weights, its tokenizer and the scripts of this folder.

The page holds JSON in the elements `about` (what it shows), `model` (sizes, and where each tensor begins) and
`tokenizer`, base64 of the tensors in `weights`, and in `worker` the scripts that compute. A content security
policy lets nothing else run, and nothing be loaded."""

import base64
import hashlib
import html
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import quant
from model import Transformer
from nanobit import record
from nanobit.cli import fail
from nanobit.export import hf
from nanobit.export.web import tokenizer_data
from nanobit.export.web.node import HERE
from nanobit.tasks import game
from nanobit.terminal import printable
from nanobit.tokenizer import bos_of

LIMIT = 150_000_000  # bytes of a page
WORKER = ("tokenizer.js", "model.js", "worker.js")
PAGE = ("game.js", "figures.js", "page.js")
SIZES = """vocab_size seq_len n_layer n_head n_kv_head n_embd ffn_dim norm_eps rope_theta
tie_embeddings""".split()  # in the element `model`
KINDS = {game.CHARS: "tictactoe", "\n+-x=0123456789": "arithmetic"}  # of the models of two data sets
ELEMENT = re.compile(r'<script type="[a-z/]+" id="([a-z]+)">(.*?)</script>', re.S)


def packed(codes):
    """Return uint8 (in / 4, out) of codes (out, in): a byte holds code + 1 of four neighbours in a row,
    lowest bits first, as TernaryMatrix in model.js reads them. Missing columns are zeros."""
    codes = F.pad(codes, (0, -codes.shape[1] % 4))
    u = (codes + 1).to(torch.uint8).view(len(codes), -1, 4)
    return (u[..., 0] | u[..., 1] << 2 | u[..., 2] << 4 | u[..., 3] << 6).t().contiguous()


def unpacked(content, shape):
    """Return the codes (out, in) of what packed() has made of them, a uint8 array."""
    u = content.reshape(-1, shape[0]).T
    codes = np.stack([u >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(shape[0], -1)
    return codes[:, : shape[1]].astype(np.int8) - 1


def tensors(part, embed):
    """Yield (name, {"type", "shape"} and the scale of a ternary matrix, bytes) of each tensor of a page, in
    the order of model.py: exported folders have another one."""
    cfg = part["config"]
    with torch.device("meta"):
        names = list(Transformer(SimpleNamespace(**cfg)).state_dict())
    if cfg["tie_embeddings"]:
        names.remove("head.weight")
    for name in names:
        w = part["model"][name]
        if hf.is_ternary(part, name):
            codes, scale = hf.codes_of(part, name)
            facts = dict(type="ternary", shape=list(codes.shape), scale=scale.item())
            yield name, facts, packed(codes).numpy().tobytes()
            continue
        w = w.float()
        type_name = {1: "f32", 2: "f16"}[w.dim()]
        if name in ("embed.weight", "head.weight"):
            w = w[: cfg["vocab_size"]]  # without the rows of padding
            type_name = embed
        facts = dict(type=type_name, shape=list(w.shape))
        if type_name == "int8":
            rows, scales = quant.quantize_activations(w)
            content = rows.to(torch.int8).numpy().tobytes()
            content += bytes(-len(content) % 4) + scales.numpy().tobytes()
        else:
            w = w.to(dict(f16=torch.float16, f32=torch.float32)[type_name])
            if not w.isfinite().all():
                fail(f"{name} has a weight beyond 65,504, the largest of float16: a page cannot hold it")
            content = w.numpy().tobytes()
        yield name, facts, content


def values(path):
    """Return {name: float64 tensor} of what a page holds, ternary matrices as codes / scale."""
    parts = elements(path)
    content = np.frombuffer(base64.b64decode(parts["weights"]), np.uint8)
    weights = {}
    for name, tensor in json.loads(parts["model"])["tensors"].items():
        shape = tensor["shape"]
        type_name = tensor["type"]
        start = tensor["offset"]
        size = int(np.prod(shape))
        if type_name == "ternary":
            codes = unpacked(content[start : start + -(-shape[1] // 4) * shape[0]], shape)
            array = codes / tensor["scale"]
        elif type_name == "int8":
            rows = content[start : start + size].view(np.int8).reshape(shape)
            start += size + -size % 4
            scales = content[start : start + 4 * shape[0]].view("<f4")
            array = rows / scales[:, None].astype(np.float64)
        else:
            dtype = np.dtype({"f16": "<f2", "f32": "<f4"}[type_name])
            array = content[start : start + size * dtype.itemsize].view(dtype).reshape(shape)
        weights[name] = torch.from_numpy(array.astype(np.float64))
    return weights


def elements(path):
    """Return {id: text} of the elements of a page that hold data."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return dict(ELEMENT.findall(file.read()))


def is_ours(path):
    """Return whether a path is a page that write() has written."""
    try:
        model = json.loads(elements(path)["model"])
        return {"tensors", *SIZES} <= model.keys()
    except (OSError, ValueError, LookupError, AttributeError):
        return False


def check(part):
    """Exit with 2 if a page cannot run a model. page_tokenizer does if it cannot split text as the model."""
    if part["config"]["n_expert"]:
        fail(f"n_expert = {part['config']['n_expert']}: a page runs no mixture of experts; --format=hf")


def in_script(value):
    """Return a value as JSON that stays in its element: without <, and with ASCII only."""
    return record.to_json(value).replace("<", "\\u003c")


def read(name):
    """Return the text of a file of this folder."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def source(text):
    """Return what a content security policy calls the script or style of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def about(part, tensors, size, name, score):
    """Return what the page shows of a model; tensors: those of the element `model`, size: their bytes."""
    cfg = part["config"]
    spec = part["tokenizer"]
    counts = {name: int(np.prod(tensor["shape"])) for name, tensor in tensors.items()}
    curve = part.get("curve", [])
    losses = dict(curve)
    return dict(
        name=name,
        kind="chat" if "chat" in spec else KINDS.get(spec.get("chars"), "text"),
        ternary=cfg["ternary"],
        parameters=sum(counts.values()),
        ternary_parameters=sum(counts[name] for name in tensors if tensors[name]["type"] == "ternary"),
        bytes=size,
        step=part["step"],
        val_loss=losses.get(part["step"]),
        score=score,
        curve=curve,
        dataset=cfg["dataset"],
        prompts=cfg["sample_prompts"],
        layers=[[name, tensor["shape"], tensor["type"]] for name, tensor in tensors.items()],
    )


def joined(texts):
    """Return the page with these texts in their places, and the scripts and the style of this folder."""
    script = '"use strict";\n' + "\n".join(map(read, PAGE))
    style = read("style.css")
    worker = '"use strict";\n' + "\n".join(map(read, WORKER))
    policy = f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; worker-src blob:"
    policy += "; base-uri 'none'; form-action 'none'"
    texts = texts | dict(csp=policy, style=style, worker=worker, page=script)
    # all in one pass, since a name may look like one of the places
    return re.sub(r"\{\{([a-z]+)\}\}", lambda place: texts[place[1]], read("page.html"))


def write(part, path, embed="int8", name="", score=()):
    """Write one HTML page at `path`; embed: the type of embedding and head. name and score, {name: number}:
    those of the model's card, if it has one."""
    check(part)
    cfg = part["config"]
    spec = part["tokenizer"]
    blob = bytearray()
    stored = {}
    for tensor, facts, content in tensors(part, embed):
        stored[tensor] = facts | dict(offset=len(blob))
        blob += content + bytes(-len(content) % 8)
    name = printable(name or cfg["run_id"])
    model = {key: cfg[key] for key in SIZES}
    page = joined(
        dict(
            title=html.escape(name).encode("ascii", "xmlcharrefreplace").decode(),
            about=in_script(about(part, stored, len(blob), name, dict(score))),
            model=in_script(model | dict(bos=bos_of(spec), eot=spec["eot"], tensors=stored)),
            tokenizer=in_script(tokenizer_data.page_tokenizer(spec)),
            weights=base64.b64encode(blob).decode(),
        )
    )
    if len(page) > LIMIT:
        size = f"{len(page) / 1e6:,.0f} MB, and browsers are slow beyond {LIMIT / 1e6:,.0f}"
        fail(f"the page would have {size}; --format=hf or gguf takes any size")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(page)
