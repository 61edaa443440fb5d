"""The plain model of a page in float64, which the scripts of the page must match, and how they are asked."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import config
from model import Transformer
from nanobit.export.web import html_file, node

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
