"""The codes of a model's ternary layers, made once after each update instead of in every forward."""

import functools

import torch

from quant import scale_of_mean, ternarize


def keep_codes(model, compiled=False, dtype=None):
    """Make the codes (int8) and the scale of each ternary layer now, for all forwards until the next call.

    Otherwise each forward makes them: in every micro-step of an update, in every batch of an evaluation. The
    layers of FSDP do that still, since only there their matrices are whole. compiled: by torch.compile.
    dtype: if it has 16 bits, the codes are kept in it too on CUDA, for the products of the backward."""
    layers = [layer for layer in model.modules() if hasattr(layer, "kept_codes")]
    layers = [layer for layer in layers if not hasattr(layer.weight, "placements")]
    weights = [layer.weight.detach() for layer in layers]
    on_cuda = all(w.is_cuda for w in weights)
    for layer, w in zip(layers, weights):
        if layer.kept_codes is None:
            layer.kept_codes = torch.empty_like(w, dtype=torch.int8)
            layer.kept_scale = w.new_empty(*w.shape[:-2], 1, 1, dtype=torch.float32)
        if on_cuda and layer.kept_floats is None and dtype in (torch.bfloat16, torch.float16):
            layer.kept_floats = torch.empty_like(w, dtype=dtype)
    kept = [(layer.kept_codes, layer.kept_scale, layer.kept_floats) for layer in layers]
    write = compiled_writer() if compiled else write_codes
    if on_cuda and layers:  # in one call, which takes the host some 0.1 ms
        write_scales(weights, [scale for _, scale, _ in kept])
        write(weights, kept, True)
    else:  # one by one: equal shapes share compiled code
        for w, own in zip(weights, kept):
            write([w], [own], False)
    for layer in layers:
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


def write_scales(weights, kept_scales):
    """Write quant.weight_scale of each W (..., out, in) into a tensor (..., 1, 1), by few kernels for all."""
    matrices = [matrix for w in weights for matrix in w.view(-1, *w.shape[-2:])]
    means = torch._foreach_norm(matrices, 1, dtype=torch.float64)  # the sums of |W|
    torch._foreach_div_(means, [matrix.numel() for matrix in matrices])
    scales = scale_of_mean(torch.stack(means).view(-1, 1, 1).float())
    torch._foreach_copy_([scale for kept in kept_scales for scale in kept.view(-1, 1, 1)], list(scales))


def write_codes(weights, kept, has_scales):
    """Write the codes of each W into a tensor of int8 and one of floats (or None), and its scale into one
    more, unless that has it already."""
    for w, (kept_codes, kept_scale, kept_floats) in zip(weights, kept):
        codes, scale = ternarize(w, kept_scale if has_scales else None)
        kept_codes.copy_(codes)
        if kept_floats is not None:
            kept_floats.copy_(codes)
        if not has_scales:
            kept_scale.copy_(scale)


@functools.cache
def compiled_writer():
    """Return write_codes by torch.compile, which takes milliseconds to ask for. On CUDA one kernel writes
    the codes of several matrices (combo_kernels)."""
    return torch.compile(write_codes, dynamic=False, options={"combo_kernels": True})
