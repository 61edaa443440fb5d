"""The codes of a model's ternary layers, made once after each update instead of in every forward."""

import functools

import torch

from quant import scale_of_mean, ternarize


def keep_codes(model, compiled=False):
    """Make the codes (int8) and the scale of each ternary layer now, for all forwards until the next call.

    Otherwise each forward makes them: in every micro-step of an update, in every batch of an evaluation. The
    layers of FSDP do that still, since only there their matrices are whole. compiled: by torch.compile."""
    layers = [layer for layer in model.modules() if hasattr(layer, "kept_codes")]
    layers = [layer for layer in layers if not hasattr(layer.weight, "placements")]
    weights = [layer.weight.detach() for layer in layers]
    for layer, w in zip(layers, weights):
        if layer.kept_codes is None:
            layer.kept_codes = torch.empty_like(w, dtype=torch.int8)
            layer.kept_scale = torch.empty_like(w[..., :1, :1], dtype=torch.float32)
    # experts, in three dimensions, have a scale each
    has_scale = bool(layers) and all(w.is_cuda and w.dim() == 2 for w in weights)
    if has_scale:
        torch._foreach_copy_([layer.kept_scale for layer in layers], scales(weights))
    write = compiled_writer() if compiled else write_codes
    for layer, w in zip(layers, weights):
        write(w, layer.kept_codes, layer.kept_scale, has_scale)
        layer.kept_version = version_of(layer.weight)


def check_codes(model):
    """Raise RuntimeError if the weight of a layer has changed since keep_codes, see version_of."""
    for name, layer in model.named_modules():
        is_kept = getattr(layer, "kept_codes", None) is not None
        if is_kept and layer.kept_version != version_of(layer.weight):
            raise RuntimeError(f"{name}: its weight has changed since keep_codes(model); call it again")


def version_of(w):
    """Return another value after W was replaced or changed in place, but for changes of W.data. torch does
    not count those by fused AdamW, optim.update does."""
    return id(w), w.is_inference() or w._version


def scales(weights):
    """Return quant.weight_scale(w), (1, 1), of each matrix in a list, on CUDA by a few kernels for all."""
    means = torch._foreach_norm(weights, 1, dtype=torch.float64)  # the sums of |W|
    torch._foreach_div_(means, [w.numel() for w in weights])
    return scale_of_mean(torch.stack(means).view(-1, 1, 1).float()).unbind()


def write_codes(w, kept_codes, kept_scale, has_scale):
    """Write the codes of W into a tensor of int8, and its scale into another, unless that has it already."""
    codes, scale = ternarize(w, kept_scale if has_scale else None)
    kept_codes.copy_(codes)
    if not has_scale:
        kept_scale.copy_(scale)


@functools.cache
def compiled_writer():
    """Return write_codes by torch.compile, which takes milliseconds to ask for."""
    return torch.compile(write_codes, dynamic=False)
