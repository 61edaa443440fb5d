"""
Time an experiment's training step beside its float twin's, in one run. Needs no prepared data.

    python bench.py config/train_baseline_95m.py --batch_size=4 --total_batch_size=1024
    python bench.py config/train_simple.py --pairs=50

Steps of the two alternate, so that a machine whose speed drifts slows both. A step is forward, backward,
clipping and the optimizer, as in train.py, on random tokens; the first steps, which compile, are not counted.
The last line of stdout is one JSON object: params, params_active, params_ternary, step_ms, float_step_ms,
tokens_per_sec, mfu (or null), peak_memory_gb, device, dtype, compile.
"""

import math
import signal
import statistics
import sys
import time
from types import SimpleNamespace

import config

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it

FLAGS = {
    "pairs": (15, "timed steps of each model"),
    "warmup": (3, "steps of each before that, not counted"),
}
cfg = config.load(sys.argv[1:], __doc__, FLAGS)
if not cfg.vocab_size:
    config.fail("vocab_size = 0 means the data set's, and bench.py reads none; set --vocab_size=")
if cfg.pairs < 1 or cfg.warmup < 1:
    config.fail(f"pairs = {cfg.pairs} and warmup = {cfg.warmup} must be at least 1")

import torch
from tqdm import tqdm

import device as machine
import optim
import record
from model import Transformer, router_loss

device = machine.pick(cfg.device)
dtype = machine.pick_dtype(cfg.dtype, device)
machine.explain_out_of_memory(cfg, device)
if cfg.deterministic:
    machine.make_deterministic()


class Contestant:
    """a model of the experiment, ternary or float, with all that a training step needs"""

    def __init__(self, ternary):
        torch.manual_seed(cfg.seed)
        with torch.device(device):
            self.model = Transformer(SimpleNamespace(**vars(cfg) | dict(ternary=ternary)))
        self.compiled, self.is_compiled = machine.compiled(self.model, cfg.compile, device)
        self.optimizers = optim.make_optimizers(cfg, self.model, machine.matrix_dtype(device))
        self.ms = []
        began = time.perf_counter()
        for _ in range(cfg.warmup):
            self.step()
        seconds = time.perf_counter() - began
        print(
            f"{'ternary' if ternary else 'float'}: first {cfg.warmup} steps, with compiling, {seconds:.1f} s"
        )
        self.ms.clear()

    def step(self):
        """one optimizer step of cfg.accumulation micro-steps; its wall time goes to self.ms"""
        rows = torch.randint(
            cfg.vocab_size, (cfg.accumulation, cfg.batch_size, cfg.seq_len + 1), device=device
        )
        machine.synchronize(device)
        began = time.perf_counter()
        for row in rows:
            with machine.autocast(device, dtype):
                loss, router = self.compiled(row[:, :-1], row[:, 1:])
            ((loss + router_loss(cfg, router)) / cfg.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        machine.synchronize(device)
        self.ms.append(1e3 * (time.perf_counter() - began))


ternary = Contestant(True)
peak_memory_gb = machine.peak_memory_gb(device)  # before the twin takes its share
twin = Contestant(False)
for i in tqdm(range(cfg.pairs), desc="pairs", disable=not sys.stderr.isatty(), leave=False):
    for contestant in (ternary, twin) if i % 2 == 0 else (twin, ternary):
        contestant.step()

counts = ternary.model.counts()
step_ms, float_step_ms = statistics.median(ternary.ms), statistics.median(twin.ms)
tokens_per_sec = 1e3 * cfg.total_batch_size / step_ms
peak = machine.peak_flops(device, dtype)
mfu = tokens_per_sec * ternary.model.flops_per_token() / peak if peak else None
print(f"{counts['total']:,} parameters, {counts['ternary']:,} ternary")
print(f"{machine.describe(device)}, {machine.name(dtype)}, compile {'on' if ternary.is_compiled else 'off'}")
print(f"{cfg.total_batch_size:,} tokens a step = {cfg.accumulation} x {cfg.batch_size} x {cfg.seq_len}")
for name, ms in (("ternary", ternary.ms), ("float", twin.ms)):
    speed = 1e3 * cfg.total_batch_size / statistics.median(ms)
    spread = f"({min(ms):.1f} to {max(ms):.1f})"
    print(f"{name:8} {statistics.median(ms):9.1f} ms a step {spread}, {speed:9,.0f} tokens/s")
ratios = sorted(a / b for a, b in zip(ternary.ms, twin.ms))
print(
    f"ternary / float: {step_ms / float_step_ms:.3f} by the medians of {cfg.pairs} pairs; "
    f"pair by pair {ratios[len(ratios) // 4]:.3f} to {ratios[len(ratios) * 3 // 4]:.3f} (quartiles)"
)
if mfu:
    print(f"MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s")
print(
    record.to_json(
        dict(
            params=counts["total"],
            params_active=counts["active"],
            params_ternary=counts["ternary"],
            step_ms=step_ms,
            float_step_ms=float_step_ms,
            tokens_per_sec=tokens_per_sec,
            mfu=mfu,
            peak_memory_gb=peak_memory_gb,
            device=machine.describe(device),
            dtype=machine.name(dtype),
            compile=ternary.is_compiled,
        )
    )
)
