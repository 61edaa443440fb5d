"""What is measured of a model: its mean loss, and the health of its ternary layers and routers."""

import torch

from nanobit import distributed
from nanobit.experts import ROUTER
from quant import bit_layers, ternarize


def router_health(router):
    """{"total": row, "layers": [row of each block]} of routers (L, 3 + E), averaged over batches: a row has
    balance, z, entropy, load_max (of the busiest expert over the mean) and dead (experts without a token),
    that of a block the load of each expert too, as a share of the tokens"""

    def row(values, loads):
        most, dead = loads.max() * loads.shape[-1], (loads == 0).sum()
        named = zip((*ROUTER, "load_max"), (*values.tolist(), most.item()))
        return {name: float(f"{value:.6g}") for name, value in named} | {"dead": int(dead)}

    router = router.float().cpu()
    values, loads = router[:, : len(ROUTER)], router[:, len(ROUTER) :]
    shares = [{"load": [float(f"{share:.4g}") for share in load]} for load in loads.tolist()]
    layers = [row(*each) | share for *each, share in zip(values, loads, shares)]
    return {"total": row(values.mean(0), loads), "layers": layers}


@torch.no_grad()
def mean_loss(model, batches, stop=lambda: False):
    """mean cross entropy in nats per token over batches of (inputs, targets), the same on every rank, which
    share the work; summed in float64. None where stop() turned true on the way."""
    was_training, losses, sizes, mine = model.training, [], [], None
    model.eval()
    for i, batch in enumerate(batches):
        sizes.append(batch[1].numel())
        if (
            i % distributed.WORLD == distributed.RANK or mine is None
        ):  # a sharded model computes on all ranks or none
            mine = batch
        if i % distributed.WORLD == distributed.WORLD - 1:
            losses.append(model(*mine)[0])
            mine = None
            if stop():
                break
    if mine is not None:
        losses.append(model(*mine)[0])
    model.train(was_training)
    if stop():
        return None
    table = torch.zeros(len(sizes), dtype=torch.float64)
    mine = table[distributed.RANK :: distributed.WORLD]
    mine[:] = torch.stack(losses).cpu().double()[: len(mine)]
    sizes = torch.tensor(sizes, dtype=torch.float64)
    return (distributed.total(table) @ sizes / sizes.sum()).item()


@torch.no_grad()
def codes(model):
    """{name: int8 codes} of every ternary layer"""
    layers = bit_layers(model).items()
    return {name: ternarize(distributed.whole(layer.weight))[0].to(torch.int8) for name, layer in layers}


@torch.no_grad()
def activation_absmax(model, idx):
    """{name: max|x|} of the input of every ternary layer in one extra forward of idx (B, T); 0-dim device
    tensors"""
    layers = bit_layers(model)
    was_training = model.training
    model.eval()
    for layer in layers.values():
        layer.absmax = torch.zeros((), device=idx.device)
    model(idx)
    result = {name: layer.absmax for name, layer in layers.items()}
    for layer in layers.values():
        layer.absmax = None
    model.train(was_training)
    return result


HEALTH = ("zero", "plus", "minus", "scale", "near_threshold", "flip_rate", "act_absmax")


@torch.no_grad()
def health(model, before, idx):
    """(record, codes): the ternary health of the model now.

    before: the codes of the last record or None (flip_rate is then None); idx (B, T): tokens for the
    activations. record: {"total": row, "layers": {name: row}}, a row of
        zero, plus, minus   fractions of the codes (Gaussian weights begin at 0.31 zeros)
        scale               mean|W|, what a code of 1 stands for; of experts the mean of theirs
        near_threshold      fraction of |W| / mean|W| within 0.05 of 0.5, the border between 0 and 1
        flip_rate           fraction of codes that changed since `before`
        act_absmax          largest |x| that went into the layer
    Fractions are averaged over weights in the total, scale and act_absmax are the mean and the maximum over
    layers. One transfer from the device for all numbers.
    """
    absmax = activation_absmax(model, idx)
    now, rows, sizes = {}, [], []
    for name, layer in bit_layers(model).items():
        w = distributed.whole(layer.weight)
        t, s = ternarize(w)
        now[name] = t.to(torch.int8)
        near = ((w.float().abs() * s - 0.5).abs() < 0.05).float().mean()
        flips = (now[name] != before[name]).float().mean() if before else torch.zeros_like(near)
        fractions = [(t == value).float().mean() for value in (0, 1, -1)]
        rows.append(torch.stack([*fractions, (1 / s).mean(), near, flips, absmax[name]]))
        sizes.append(t.numel())
    table = torch.stack(rows).cpu().double()  # (layers, len(HEALTH)); MPS has no float64
    total = (table * torch.tensor(sizes, dtype=torch.float64)[:, None]).sum(0) / sum(sizes)
    total[HEALTH.index("scale")] = table[:, HEALTH.index("scale")].mean()
    total[HEALTH.index("act_absmax")] = table[:, HEALTH.index("act_absmax")].max()

    def row(values):
        record = dict(zip(HEALTH, (float(f"{v:.6g}") for v in values.tolist())))
        return record if before else record | {"flip_rate": None}

    return {"total": row(total), "layers": {name: row(r) for name, r in zip(now, table)}}, now
