"""
Where a run computes: the device, the dtype of its matrix products, compilation, determinism, memory, known
speeds.

What is asked for and cannot be had is either an error (a device) or replaced with one printed line (dtype,
compile).
"""

import contextlib
import os
import platform
import re
import shutil
import sys
import time

# deterministic cuBLAS needs this before the first CUDA call; it is no setting
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch.utils._triton import has_triton

from config import DTYPES
from nanobit.cli import LOCAL_RANK, WORLD, fail

# dense bf16 matrix FLOP/s of a card, from its data sheet, by the whole of its name: a card that is not here,
# or a slice or a laptop's version of one that is, has no MFU rather than a wrong one
PEAK_FLOPS = {
    r"NVIDIA B200": 2250e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100( 80GB HBM3| SXM5)?": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"(NVIDIA )?A100-(SXM4|PCIE|PCIe)-(40|80)GB": 312e12,
    r"NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
}


def pick(wanted):
    """the torch.device of a setting, current from now on: auto takes cuda, then mps, then cpu. Exits with 2
    where it is not there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", wanted):
        fail(f"device = {wanted!r} is unknown; choose one of auto, cpu, cuda, cuda:1, mps")
    if wanted == "auto":
        has_mps = torch.backends.mps.is_available()
        wanted = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda":  # with its number, which some calls insist on
        if WORLD > 1 and device.index is not None:
            fail(f"device = {wanted!r}: under torchrun each process has a card of its own; use cuda or auto")
        device = torch.device("cuda", LOCAL_RANK if WORLD > 1 else device.index or 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        how = f"--nproc_per_node={found}" if WORLD > 1 and found else "auto or cpu"
        fail(f"device = {wanted!r} is not there: torch sees {found} CUDA devices; use {how}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # to the current one go kernels and graphs of our own
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail(f"device = {wanted!r} is not there: this torch has no MPS; use auto or cpu")
    return device


def pick_dtype(wanted, device):
    """Return the torch dtype that matrix products compute in. auto is bfloat16 if the device has units for
    it, else float32: a CPU without them emulates bfloat16 several times slower. A card with float16 units
    alone is reported."""
    if wanted not in DTYPES:
        fail(f"dtype = {wanted!r} is unknown; choose one of {', '.join(DTYPES)}")
    if wanted in ("auto", "bfloat16") and has_bf16(device):
        return torch.bfloat16
    if wanted == "bfloat16":
        print(f"dtype: {describe(device)} has no bfloat16 units; computing in float32", file=sys.stderr)
    if wanted == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 7:
        how = "--dtype=float16 should be faster, for models without experts and without fsdp"
        print(f"dtype: {describe(device)} has no bfloat16 units, so float32; {how}", file=sys.stderr)
    if wanted == "float16" and device.type == "mps":
        fail("dtype = 'float16' needs a gradient scaler, which is for cuda and cpu; use bfloat16 or float32")
    return torch.float16 if wanted == "float16" else torch.float32


def has_bf16(device):
    """whether the device multiplies bfloat16 matrices faster than float32"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "mps" or torch.cpu._is_avx512_bf16_supported()


def matrix_dtype(device):
    """what an iteration on whole matrices computes in, whatever the model does"""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def name(dtype):
    """'float32', 'bfloat16' or 'float16'"""
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """the context of a forward whose products are of this dtype"""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def explain_out_of_memory(cfg, device):
    """one line with the remedy where the device runs out of memory, wherever that happens, and exit code 1"""

    def hook(kind, error, trace):
        if not issubclass(kind, torch.OutOfMemoryError):
            return sys.__excepthook__(kind, error, trace)
        smaller = next((n for n in range(cfg.batch_size // 2, 0, -1) if cfg.batch_size % n == 0), 0)
        how = f"--batch_size={smaller} --total_batch_size={cfg.total_batch_size}"
        if not cfg.dropout and not cfg.n_expert:
            how += " gives the same result"
        how = f"halve it: {how}" if smaller else "shorten seq_len or make the model smaller"
        where = f"out of memory on {describe(device)} with batch_size = {cfg.batch_size}"
        print(f"\nerror: {where}; {how}", file=sys.stderr)

    sys.excepthook = hook


def make_deterministic():
    """the same bits from the same run on the same machine: compiled embedding gradients use atomics
    otherwise, and the compiler times on the device which of two forms of a product it takes"""
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = (
        "1"  # read where torch._inductor is imported, which comes later
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # guards a bug that we do not have, at a cost
    torch.backends.cudnn.benchmark = False


def no_compiler(device):
    """why torch.compile cannot be had on a device, or ''"""
    if device.type == "mps":
        return "torch.compile does not cover MPS yet"
    if device.type == "cuda" and not has_triton():
        return "torch.compile needs Triton on CUDA, and a card that it knows"
    if device.type == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "torch.compile needs a C compiler (cc) on CUDA, for Triton"
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler (g++) on CPU"
    return ""


def compile_fault(device):
    """Return why a small function cannot be compiled for a device, in one line, or '': a compiler may exist
    and fail (no headers, a broken installation), or the folder of compiled code may not be writable."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(16, device=device))
    except Exception as error:  # of torch, of the compiler, of the file system: any of them, and eager works
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return ""


def check_cuda_graph(device, n_expert):
    """exit with 2 where the pass of a token cannot be a CUDA graph"""
    if device.type != "cuda" or n_expert:
        why = "experts wait for the device" if device.type == "cuda" else f"the device is {device.type}"
        fail(f"cuda_graph: is for models without experts on cuda, and {why}; leave it out")


def compiled(model, wanted, device):
    """(model or its compiled form, whether it is compiled); prints why where it was wanted and cannot be
    had"""
    if not wanted:
        return model, False
    if reason := no_compiler(device) or compile_fault(device):
        print(f"compile: off, {reason}", file=sys.stderr)
        return model, False
    return torch.compile(model, dynamic=False), True


def describe(device):
    """the device in words"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_flops(device, dtype):
    """known peak FLOP/s of the device in this dtype, or None"""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    card = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if re.fullmatch(name, card)), None)


def synchronize(device):
    """wait for the device, so that a clock read next is true"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gb(device):
    """Return the most memory held so far, in 1e9 bytes: allocated on the device, or resident in the process
    on CPU; None on Windows, which has no such number in Python."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    try:  # getrusage would count what the process that started this one held then
        with open("/proc/self/status", encoding="utf-8") as file:
            return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) * 1024 / 1e9
    except (OSError, TypeError):  # not Linux
        pass
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def gb(number):
    """Return a size in 1e9 bytes in words; None is unknown."""
    return "unknown" if number is None else f"{number:.2f} GB"


def utilization(device):
    """the share of time a CUDA device was busy of late, 0 to 1, or None where that cannot be read"""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # needs the optional nvidia-ml-py, whose errors are its own: a slice of a card has none
        return None


class Speedometer:
    """time per step between log lines, without evaluations and saves, and without the first step of the
    process, which compiles and warms up"""

    def __init__(self, device):
        self.device, self.began, self.warm = device, time.perf_counter(), False
        self.steps, self.busy = 0, 0.0  # since the last log line
        self.go_on()

    def go_on(self):
        self.clock = time.perf_counter()

    def pause(self):
        """wait for the device and stop the clock; go_on() starts it again"""
        synchronize(self.device)
        self.busy += time.perf_counter() - self.clock

    def count(self):
        """one more step is done, or under way on the device"""
        self.steps += 1
        if not self.warm:
            self.pause()
            self.steps, self.busy, self.warm = 0, 0.0, True
            self.go_on()

    def read(self, tokens_per_step, flops_per_token, dtype):
        """the speed since the last reading, for a log line; stops the clock. None where nothing was timed."""
        self.pause()
        step_ms = 1e3 * self.busy / self.steps if self.steps else None
        tokens_per_sec = 1e3 * tokens_per_step / step_ms if step_ms else None
        peak = (peak_flops(self.device, dtype) or 0) * WORLD
        self.steps, self.busy = 0, 0.0
        return dict(
            tokens_per_sec=tokens_per_sec,
            step_ms=step_ms,
            mfu=tokens_per_sec * flops_per_token / peak if peak and tokens_per_sec else None,
            memory_gb=peak_memory_gb(self.device),
            gpu_util=utilization(self.device),
        )

    def seconds(self):
        """since the process began to train"""
        return time.perf_counter() - self.began
