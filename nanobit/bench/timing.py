"""Time training steps, and what a run does from time to time, for bench.py."""

import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import quant
from model import Transformer
from nanobit import cards, data, kernels, machine, optim, saving
from nanobit.bench import planner
from nanobit.cuda_graph import MicroSteps
from nanobit.experts import bit_layers, router_loss
from nanobit.generate import generate
from nanobit.kept_codes import keep_codes
from nanobit.metrics import mean_loss


def random_tokens(cfg, folder):
    """Write a data set of random tokens for a hundred micro-steps; return its Windows."""
    n = 1 + 100 * cfg.batch_size * cfg.seq_len
    meta = dict(complete=True, dtype="uint32", vocab_size=cfg.vocab_size, tokens={"train": n})
    meta["shards"] = {"train_00000.bin": {"tokens": n}}
    os.mkdir(os.path.join(folder, "random"))
    ids = np.random.default_rng(cfg.seed).integers(cfg.vocab_size, size=n, dtype=np.uint32)
    ids.tofile(os.path.join(folder, "random", "train_00000.bin"))
    return data.Windows(SimpleNamespace(**vars(cfg) | dict(data_dir=folder, dataset="random")), meta, "train")


def build(cfg, ternary, device):
    """Return the model of an experiment or of its twin, with random weights."""
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        return Transformer(SimpleNamespace(**vars(cfg) | dict(ternary=ternary)))


def now(device):
    """Return the time in seconds when the device has done all that it was given."""
    machine.synchronize(device)
    return time.perf_counter()


def do_nothing(part):
    """Ignore the end of a part of a step."""


@dataclass
class Contestant:
    """A model with all that a training step needs; making one runs the steps that warm it up."""

    cfg: SimpleNamespace
    name: str
    model: torch.nn.Module
    loss: object  # loss(x, y) is what is differentiated
    optimizers: list
    windows: data.Windows
    device: torch.device
    dtype: torch.dtype
    is_compiled: bool
    is_replayed: bool
    steps_together: int = 1  # timed as one
    n_batches: int = 0
    ms: list = field(default_factory=list)  # of whole steps
    parts_ms: dict = field(default_factory=lambda: defaultdict(list))  # of steps timed part by part

    def __post_init__(self):
        accumulation = self.cfg.accumulation
        self.micro_steps = MicroSteps(
            self.micro_step, self.model.parameters(), accumulation, self.is_replayed
        )
        if self.is_compiled:
            print(f"{self.name}: compiling, which takes a minute or so", file=sys.stderr, flush=True)
        began = now(self.device)
        keep_codes(self.model, self.is_compiled, self.dtype)
        self.step()
        self.first_seconds = now(self.device) - began
        print(f"{self.name}: {self.first_seconds:.1f} s for the first step", flush=True)
        for _ in range(self.cfg.warmup - 1):
            began = now(self.device)
            self.step()
        if self.device.type == "cuda":  # in training the host is ahead of the device
            self.steps_together = max(1, int(0.3 / (now(self.device) - began)))

    def micro_step(self, *batch, mark=do_nothing):
        """Compute the gradients of a batch; return its loss."""
        with machine.autocast(self.device, self.dtype):
            loss = self.loss(*batch)
        mark("forward")
        (loss / self.cfg.accumulation).backward()
        mark("backward")
        return loss.detach()

    def step(self, mark=do_nothing):
        """Do an optimizer step of cfg.accumulation micro-steps. mark(part) is called after each part."""
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.cfg.accumulation):
            first = self.n_batches * self.cfg.batch_size
            batch = self.windows.batch(first, self.cfg.batch_size, self.device)
            self.n_batches += 1
            mark("data")
            if mark is do_nothing:
                loss_sum += self.micro_steps(micro, *batch)
                continue
            if self.is_replayed:  # a graph has dense inputs, and other strides would compile the model again
                batch = [tensor.clone() for tensor in batch]
            loss_sum += self.micro_step(*batch, mark=mark)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        optim.update(self.model, self.optimizers, scaler, self.cfg.grad_clip, loss_sum)
        mark("optimizer")
        keep_codes(self.model, self.is_compiled, self.dtype)
        mark("codes")

    def time_steps(self):
        """Time a step, the mean of steps_together."""
        began = now(self.device)
        for _ in range(self.steps_together):
            self.step()
        self.ms.append(1e3 * (now(self.device) - began) / self.steps_together)

    def time_parts(self):
        """Time the parts of a step, each alone, without graphs."""
        marks = [now(self.device)]
        spent = Counter()

        def mark(part):
            marks.append(now(self.device))
            spent[part] += 1e3 * (marks[-1] - marks[-2])

        self.step(mark)
        for part, ms in spent.items():
            self.parts_ms[part].append(ms)


def ours(cfg, ternary, windows, device, dtype):
    """Return the Contestant of an experiment or of its twin."""
    model = build(cfg, ternary, device)
    compiled, is_compiled = machine.compiled(model, cfg, device)
    optimizers = optim.make_optimizers(cfg, model, machine.matrix_dtype(device))

    def loss(x, y):
        value, router = compiled(x, y)
        return value + router_loss(cfg, router)

    name = "ternary" if ternary else "float"
    is_replayed = machine.replays_micro_steps(cfg, device, dtype, model.flops_per_token())
    return Contestant(cfg, name, model, loss, optimizers, windows, device, dtype, is_compiled, is_replayed)


def matmul_flops(device, dtype):
    """Return the FLOP/s of a large square matrix product, the median of nine."""
    n = {"cuda": 8192}.get(device.type, 1024)
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(12):
        began = now(device)
        a @ a
        seconds.append(now(device) - began)
    return 2 * n**3 / median(seconds[3:])


def device_use(contestant, step_ms):
    """Print and return how often a step starts work on a CUDA device, and the share of its time in which the
    device is busy; {} on other devices, None if the profiler of the driver is not permitted."""
    if contestant.device.type != "cuda":
        return {}
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        contestant.step()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    work_us = [event.time_range.elapsed_us() for event in on_device if not event.is_user_annotation]
    if not work_us:
        print("launches: unknown, the profiler saw none")
        return dict(launches=None, device_busy=None)
    busy = sum(work_us) / 1e3 / step_ms  # of a step without the profiler, which slows the host
    use = f"{len(work_us):,} kernels and copies a step, device busy {busy:.0%}"
    print(f"{use}: if below 90 %, a larger batch_size pays")
    return dict(launches=len(work_us), device_busy=busy)


def print_products(model, device, dtype, rows):
    """Print the time of one forward's int8 products of so many rows, by Triton with the scales in its
    epilogue (kernels.fused_matmul) and by cuBLAS, in turn."""
    ms = Counter()
    chosen = kernels.fused_matmul
    for layer in bit_layers(model).values():
        codes, scale = quant.int8_codes(layer.weight)
        x = torch.randn(rows, layer.weight.shape[-1], device=device)
        operands = (*quant.quantize_activations(x), codes, scale, dtype)
        for name, product in {"Triton": chosen, "cuBLAS": None}.items():
            kernels.fused_matmul = product
            kernels.scaled_matmul(*operands)
            began = now(device)
            for _ in range(10):
                kernels.scaled_matmul(*operands)
            ms[name] += 100 * (now(device) - began)
    kernels.fused_matmul = chosen
    times = ", ".join(f"{value:.2f} ms by {name}" for name, value in ms.items())
    print(f"int8 products of a forward, eager: {times}; kernels.FUSED_FROM chooses")


def in_turn(everyone, rounds, what):
    """Yield (round, one of everyone), in alternating order, so that a drift in speed slows all of them."""
    for i in tqdm(range(rounds), desc=what, disable=not sys.stderr.isatty(), leave=False):
        for one in everyone[:: (-1) ** i]:
            yield i, one


def compared(ours, theirs):
    """Return (ratio of the medians, quartiles of the ratios pair by pair) of two lists measured in turn."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    quartiles = (ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4])
    return median(ours) / median(theirs), quartiles


def training(cfg, device, dtype, twin=True, peer=None):
    """Time and print steps of the experiment, its twin and the Contestant that peer(cfg, windows, device,
    dtype) returns. Return (what the JSON line needs, {name: ms of a step}, {name: ratio to their steps})."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is open
        windows = random_tokens(cfg, folder)
        first = ours(cfg, cfg.ternary, windows, device, dtype)
        peak_memory_gb = machine.peak_memory_gb(device)  # before the others take their share
        everyone = [first]
        if twin:
            everyone.append(ours(cfg, not cfg.ternary, windows, device, dtype))
        if peer:
            everyone.append(peer(cfg, windows, device, dtype))
        for _, contestant in in_turn(everyone, cfg.pairs, "steps"):
            contestant.time_steps()
        for _ in range(max(1, cfg.pairs // 3)):
            first.time_parts()
    print(f"{cfg.total_batch_size:,} tokens a step = {cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}")
    step_ms = {one.name: median(one.ms) for one in everyone}
    for one in everyone:
        spread = f"({min(one.ms):.1f} to {max(one.ms):.1f})"
        speed = 1e3 * cfg.total_batch_size / step_ms[one.name]
        print(f"{one.name:8} {step_ms[one.name]:9.1f} ms a step {spread}, {speed:9,.0f} tokens/s")
    ratios = {}
    for other in everyone[1:]:
        ratios[other.name], (low, high) = compared(first.ms, other.ms)
        ratio = f"{ratios[other.name]:.3f} by the medians of {len(first.ms)} pairs"
        print(f"{first.name} / {other.name}: {ratio}; pair by pair {low:.3f} to {high:.3f} (quartiles)")
    parts_ms = {name: median(ms) for name, ms in first.parts_ms.items()}
    shares = ", ".join(f"{name} {ms / sum(parts_ms.values()):.1%}" for name, ms in parts_ms.items())
    without = ", without graphs" if first.is_replayed else ""
    print(f"time of a step{without}: {shares}")
    use = device_use(first, step_ms[first.name])
    if kernels.fused_matmul and cfg.ternary and not cfg.n_expert:
        print_products(first.model, device, dtype, cfg.batch_size * cfg.seq_len)
    tokens_per_sec = 1e3 * cfg.total_batch_size / step_ms[first.name]
    flops = tokens_per_sec * first.model.flops_per_token()
    reached = matmul_flops(device, dtype)
    peak = cards.peak_flops(device, dtype)
    mfu = peak and flops / peak
    known = f"{mfu:.1%} of the known peak of {peak / 1e12:.0f}, " if peak else ""
    print(f"MFU: {known}{flops / reached:.1%} of the {reached / 1e12:.3g} TFLOP/s of a large product here")
    planned = planner.memory_gb(first.model.cfg, first.model.counts(), cfg.batch_size, dtype.itemsize)
    print(f"peak memory {machine.gb(peak_memory_gb)} (CPU: of the process), planned {machine.gb(planned)}")
    facts = dict(step_ms=step_ms[first.name], float_step_ms=step_ms.get("float"), parts_ms=parts_ms)
    facts |= dict(tokens_per_sec=tokens_per_sec, mfu=mfu, mfu_measured=flops / reached)
    facts |= use | dict(
        peak_memory_gb=peak_memory_gb, compile_seconds=first.first_seconds, compile=first.is_compiled
    )
    return facts, step_ms, ratios


def once_seconds(cfg, device, dtype):
    """Return the seconds of an evaluation, a round of samples (a part of both is timed) and a checkpoint."""
    model = build(cfg, cfg.ternary, device).eval()
    keep_codes(model)
    x = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len), device=device)
    with machine.autocast(device, dtype):
        for _ in range(2):  # the first warms up
            began = time.perf_counter()
            mean_loss(model, [(x, x)])
            per_batch = time.perf_counter() - began
        began = time.perf_counter()
        list(generate(model, x[:1, :4], 8, temperature=0.0))
        per_token = (now(device) - began) / 8
    evaluation = per_batch * planner.evaluated_tokens(cfg) / x.numel()
    samples = per_token * 3 * len(cfg.sample_prompts) * cfg.sample_tokens
    out_dir = cfg.out_dir if os.path.isdir(cfg.out_dir) else None
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        weights = model.state_dict()
        moments = [{name: w.clone() for name, w in weights.items()} for _ in range(2)]
        began = time.perf_counter()
        saving.save(folder, 0, dict(model=weights), dict(optimizer=moments))
        save = time.perf_counter() - began
    return evaluation, samples, save
