"""
Make the model of a checkpoint ready for use.
"""

from types import SimpleNamespace

import torch
from torch import nn

from model import Transformer
from nanobit.cli import fail
from nanobit.generate import KVCache
from nanobit.infer.packed import PackedLinear, pack_blocks, pack_layers, replace


def lighten_head(model):
    """keep the head in bfloat16, for writing token by token: half the memory to read, which for a packed
    model is most of it. Logits then differ by rounding to 8 bits."""
    model.head.weight = nn.Parameter(model.head.weight.detach().bfloat16(), requires_grad=False)


def restore(part, device, packed=False):
    """the model of a checkpoint.pt (its loaded dict), on the device and ready for use; packed: its ternary
    layers hold integer weights, which compute the same and cannot be trained. Those that the part holds
    packed (hf.read) stay so."""
    with torch.device("meta"):
        model = Transformer(SimpleNamespace(**part["config"]))
    # copied: where a tensor begins in memory decides in which order some products add
    weights = {name: w.to(device, copy=True) for name, w in part["model"].items()}
    for name in [name for name, w in weights.items() if w.dtype == torch.uint8]:
        if not packed:
            fail("packed = False: of an exported model only the integers are left; leave that out")
        w, s = weights.pop(name), weights.pop(f"{name}_scale")
        replace(model, name.removesuffix(".weight"), PackedLinear(w, s, 4 * len(w)))
    model.load_state_dict(weights, assign=True)
    if model.cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    with torch.device(device):
        model.init_positions()
    return pack(model.eval()) if packed else model.eval()


def pack(model):
    """Give the ternary layers of a model in eval mode integer weights, and a fast path to single tokens, as
    far as both compute what model.py and quant.py do. Returns the model."""
    pack_layers(model)
    pack_blocks(model, single_tokens)
    return model


@torch.no_grad()
def single_tokens(model):
    """Return a function that computes logits (1, 4, V) of four tokens, read one by one after a prompt of 16,
    both fixed; of fewer if the context is smaller."""
    n = min(20, model.cfg.seq_len)
    ids = (7 * torch.arange(n)[None] + 1) % model.cfg.vocab_size
    tokens = ids[:, -4:].split(1, 1)
    cache = KVCache(n)
    if n > 4:
        model(ids[:, :-4], cache=cache)
    length = cache.length

    @torch.no_grad()
    def logits():
        cache.length = length  # what is stored behind the prompt is written again
        return torch.cat([model(token, cache=cache) for token in tokens], 1)

    return logits
