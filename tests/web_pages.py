"""The plain model of a page in float64, which the scripts of the page must match, and how they are asked.

    PYTHONPATH=. python tests/web_pages.py models/stories prompts.txt    how near a page comes to Python

measures the largest difference of logits, and counts the equal greedy texts of 16 tokens, over the lines of a
file: against the plain model in float64, and against float32 with the same embeddings."""

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import config
from model import Transformer
from nanobit import weights
from nanobit.export import verify
from nanobit.export.web import html_file, node
from nanobit.generate import generate
from nanobit.infer.restore import restore
from nanobit.tokenizer import bos_of, encode_prompt, make_tokenizer

needs_node = pytest.mark.skipif(not node.is_installed(), reason="needs Node.js: its scripts run there")
BOUND = 1e-6  # of the difference of logits, as nothing but the order of sums differs
# with it, model.py and quant.py, which compute in fp32 whatever they are given, compute in float64
in_float64 = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def rope_tables(cfg):
    """Return what model.rope_tables does, in float64."""
    D = cfg.n_embd // cfg.n_head
    inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(cfg.seq_len, dtype=torch.float64), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def model_of(path):
    """Return the Transformer of a page in float64, with the embeddings, codes and scales that it holds."""
    settings = json.loads(html_file.elements(path)["model"])
    values = html_file.values(path)
    scales = {name: tensor["scale"] for name, tensor in settings["tensors"].items() if "scale" in tensor}
    default = config.assignments(config.DEFAULT)
    cfg = SimpleNamespace(**default | settings | dict(ternary=bool(scales), vocab_multiple=1))
    model = Transformer(cfg).double().eval()
    if cfg.tie_embeddings:
        values["head.weight"] = values["embed.weight"]
    model.load_state_dict(values)
    for name, scale in scales.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.kept_codes = values[name].sign().to(torch.int8)
        layer.kept_scale = torch.tensor([[scale]], dtype=torch.float64)
    model.cos, model.sin = rope_tables(cfg)
    return model


def js(expression, names=("verify.js",), **data):
    """Return what an expression gives in Node after scripts of a page."""
    return node.call(list(names), expression, **data)


def logits_of(path, rows):
    """Return the logits (B, T, V) that a page computes for ids (B, T)."""
    return torch.tensor(js("logitsOf(path, rows)", path=str(path), rows=rows), dtype=torch.float64)


def page_of(folder, part, *args, **options):
    """Write a page; return its path."""
    path = str(folder / "page.html")
    html_file.write(part, path, *args, **options)
    return path


@torch.no_grad()
def main(ckpt, prompts):
    """Print how near the page of a model comes to Python, over the lines of a file."""
    part, _ = weights.trained(ckpt)
    spec = part["tokenizer"]
    with open(prompts, encoding="utf-8") as file:
        texts = file.read().splitlines()
    rows = [encode_prompt(make_tokenizer(spec), bos_of(spec), text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.html")
        html_file.write(part, path)
        plain = model_of(path)
        held = {name: w.float() for name, w in html_file.values(path).items()}
        is_packed = part["config"]["ternary"]
        in_float32 = restore(verify.as_held(part, held), torch.device("cpu"), is_packed)
        logits = js("logitsOf(path, rows)", path=path, rows=rows)
        greedy = js("rows.map((ids) => greedy(path, ids, 16))", path=path, rows=rows)
    compare("float32", in_float32, rows, logits, greedy)
    with in_float64:
        compare("float64", plain, rows, logits, greedy)


def compare(name, model, rows, logits, greedy):
    """Print the largest difference of logits, and the number of equal texts, of a page and a model."""
    largest = n_equal = 0
    for ids, theirs, made in zip(rows, logits, greedy):
        idx = torch.tensor([ids])
        largest = max(largest, (model(idx)[0] - torch.tensor(theirs, dtype=torch.float64)).abs().max().item())
        n_equal += made == [token.item() for token in generate(model, idx, 16, temperature=0.0)]
    print(f"{name}: logits differ by {largest:.1e} at most; {n_equal} of {len(rows)} greedy texts are equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
