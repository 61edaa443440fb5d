"""Make the model of a checkpoint ready for use."""

from types import SimpleNamespace

import torch

from model import Transformer
from nanobit.cli import fail
from nanobit.infer.packed import PackedLinear, pack_layers


def restore(part, device, packed=False):
    """Return the model of `part`, a loaded checkpoint.pt, on the device and ready for use. packed: its
    ternary layers hold integer weights, as those of hf.read always do."""
    with torch.device("meta"):
        model = Transformer(SimpleNamespace(**part["config"]))
    # copied: the order in which some products add depends on where a tensor begins in memory
    weights = {name: w.to(device, copy=True) for name, w in part["model"].items()}
    for name in [name for name, w in weights.items() if w.dtype == torch.uint8]:
        if not packed:
            fail("packed = False: of an exported model only the integers are left; leave out that flag")
        w = weights.pop(name)
        layer = PackedLinear(w, weights.pop(f"{name}_scale"), 4 * len(w))
        model.set_submodule(name.removesuffix(".weight"), layer)
    model.load_state_dict(weights, assign=True)
    if model.cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    with torch.device(device):
        model.init_positions()
    model.eval()
    if packed:
        pack_layers(model)
    return model
