"""What is measured: the mean loss of a model, the health of its ternary layers and routers, and the speed."""

import contextlib
import itertools
import time

import torch

from nanobit import cards, distributed, machine
from nanobit.cli import WORLD
from nanobit.experts import ROUTER, bit_layers
from nanobit.kept_codes import check_codes
from quant import ternarize


@torch.no_grad()
def mean_loss(model, batches, stop=lambda: False):
    """Return the mean cross entropy in nats per target that counts, over batches of Windows.fixed, summed in
    float64. The ranks share the work, and each returns the same. Return None if stop() was true after a
    batch."""
    check_codes(model)
    was_training = model.training
    model.eval()
    batches = iter(batches)
    losses, sizes = [], []
    stopped = False
    while not stopped and (group := list(itertools.islice(batches, distributed.WORLD))):
        sizes += [(targets >= 0).sum() for _, targets, *_ in group]
        # a sharded model computes on all ranks or on none: a rank without a batch repeats another's
        own = group[distributed.RANK % len(group)]
        losses.append(model(*own)[0])
        stopped = stop()
    model.train(was_training)
    if stopped:
        return None
    sizes = torch.stack(sizes).cpu().double()
    table = torch.zeros_like(sizes)
    own_losses = table[distributed.RANK :: distributed.WORLD]
    own_losses[:] = torch.stack(losses).cpu().double()[: len(own_losses)]
    return (distributed.total(table) @ sizes / sizes.sum()).item()


def router_health(router):
    """Return {"total": row, "layers": [row per block]} of routers (L, 3 + E), averaged over batches. A row
    has ROUTER, load_max (busiest expert over the mean) and dead (without a token); of a block also load."""

    def row(values, loads):
        numbers = [*values.tolist(), (loads.max() * loads.shape[-1]).item()]
        return named((*ROUTER, "load_max"), numbers) | {"dead": int((loads == 0).sum())}

    router = router.float().cpu()
    values, loads = router.tensor_split([len(ROUTER)], 1)
    layers = [row(*block) for block in zip(values, loads)]
    for layer, block_loads in zip(layers, loads.tolist()):
        layer["load"] = [float(f"{load:.4g}") for load in block_loads]
    return {"total": row(values.mean(0), loads), "layers": layers}


def named(names, numbers):
    """Return {name: number to 6 digits}."""
    return {name: float(f"{number:.6g}") for name, number in zip(names, numbers)}


@torch.no_grad()
def codes(model):
    """Return {name: int8 codes} of every ternary layer."""
    weights = {name: distributed.whole(layer.weight) for name, layer in bit_layers(model).items()}
    return {name: ternarize(w)[0].to(torch.int8) for name, w in weights.items()}


@torch.no_grad()
def activation_absmax(model, idx):
    """Return {name: max|x|}, 0-dim tensors, of the inputs of ternary layers in an extra forward of idx."""
    check_codes(model)
    names = {layer: name for name, layer in bit_layers(model).items()}
    absmax = dict.fromkeys(names.values(), torch.zeros((), device=idx.device))

    def keep_absmax(layer, inputs):
        absmax[names[layer]] = inputs[0].abs().max().float()

    hooks = [layer.register_forward_pre_hook(keep_absmax) for layer in names]
    was_training = model.training
    model.eval()
    model(idx)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return absmax


HEALTH = ("zero", "plus", "minus", "scale", "near_threshold", "flip_rate", "act_absmax")


@torch.no_grad()
def health(model, before, idx):
    """Return (record, codes): the ternary health of the model now, and codes(model).

    before: the codes of the last record or None (flip_rate is then None); idx (B, T): tokens for the
    activations. record: {"total": row, "layers": {name: row}}, a row of
        zero, plus, minus   fractions of the codes (Gaussian weights begin at 0.31 zeros)
        scale               mean|W|, what a code of 1 stands for: 1 / s of quant.py; of experts the mean
        near_threshold      fraction of |W| / mean|W| within 0.05 of 0.5, the border between 0 and 1
        flip_rate           fraction of codes that changed since `before`
        act_absmax          largest |x| that went into the layer
    In the total, fractions are averaged over weights, scale over layers; act_absmax is the largest."""
    absmax = activation_absmax(model, idx)
    now = {}
    rows, sizes = [], []
    for name, layer in bit_layers(model).items():
        w = distributed.whole(layer.weight)
        codes, scale = ternarize(w)
        now[name] = codes.to(torch.int8)
        near = ((w.float().abs() * scale - 0.5).abs() < 0.05).float().mean()
        flips = (now[name] != before[name]).float().mean() if before else torch.zeros_like(near)
        fractions = [(codes == value).float().mean() for value in (0, 1, -1)]
        rows.append(torch.stack([*fractions, (1 / scale).mean(), near, flips, absmax[name]]))
        sizes.append(codes.numel())
    table = torch.stack(rows).cpu().double()  # (layers, len(HEALTH)); MPS has no float64
    total = (table * torch.tensor(sizes, dtype=torch.float64)[:, None]).sum(0) / sum(sizes)
    total[HEALTH.index("scale")] = table[:, HEALTH.index("scale")].mean()
    total[-1] = table[:, -1].max()  # act_absmax
    records = [named(HEALTH, row.tolist()) for row in (total, *table)]
    if not before:
        records = [record | {"flip_rate": None} for record in records]
    return {"total": records[0], "layers": dict(zip(now, records[1:]))}, now


def utilization(device):
    """Return the share of time that a CUDA device was busy, 0 to 1, or None if that cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # needs the optional nvidia-ml-py, whose errors are its own: a slice of a card has none
        return None


class Speedometer:
    """The time of a step between log lines, without evaluations and saves, and without the first step of the
    process, which compiles and warms up."""

    def __init__(self, device):
        self.device = device
        self.began = time.perf_counter()
        self.is_warm = False
        self.reset()
        self.start()

    def reset(self):
        """Forget the steps since the last log line, and their seconds."""
        self.steps = 0
        self.busy = 0.0

    def start(self):
        """Start the clock."""
        self.clock = time.perf_counter()

    def pause(self):
        """Wait for the device and stop the clock; start() starts it again."""
        machine.synchronize(self.device)
        self.busy += time.perf_counter() - self.clock

    @contextlib.contextmanager
    def paused(self):
        """Return a context whose time does not count."""
        self.pause()
        yield
        self.start()

    def count(self):
        """Count a step that is done, or under way on the device."""
        self.steps += 1
        if not self.is_warm:
            self.pause()
            self.is_warm = True
            self.reset()
            self.start()

    def read(self, tokens_per_step, flops_per_token, dtype):
        """Return the speed since the last reading, for a log line, and stop the clock. A value is None if
        nothing was timed."""
        self.pause()
        step_ms = tokens_per_sec = mfu = None
        if self.steps:
            step_ms = 1e3 * self.busy / self.steps
            tokens_per_sec = 1e3 * tokens_per_step / step_ms
            peak = cards.peak_flops(self.device, dtype)
            if peak:
                mfu = tokens_per_sec * flops_per_token / (peak * WORLD)
        self.reset()
        return dict(
            tokens_per_sec=tokens_per_sec,
            step_ms=step_ms,
            mfu=mfu,
            memory_gb=machine.peak_memory_gb(self.device),
            gpu_util=utilization(self.device),
        )

    def seconds(self):
        """Return the seconds since the process began to train."""
        return time.perf_counter() - self.began
