"""
Where a run computes: the device, the dtype of its matrix products, compilation, determinism, memory.

A setting that cannot work here is an error (a device), or is replaced with one printed line (dtype, compile).
"""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
import sysconfig

# deterministic cuBLAS needs this before the first CUDA call; it is not a setting
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch.utils._triton import has_triton

from nanobit import cards, kernels
from nanobit.cli import LOCAL_RANK, WORLD, fail


def pick(wanted):
    """Return the torch.device of a setting, current from now on: auto takes cuda, then mps, then cpu, and
    prints a line if it leaves a card unused. Exits with 2 if a device does not exist or cannot be used."""
    has_mps = torch.backends.mps.is_available()
    if wanted == "mps" and not has_mps:
        fail(f"device = {wanted!r} does not exist: this torch has no MPS; use auto or cpu")
    if wanted == "auto":
        without_cuda = "mps" if has_mps else "cpu"
        fault = cards.fault(LOCAL_RANK)
        if fault:
            print(f"warning: computing on {without_cuda}: {fault}", file=sys.stderr)
        wanted = "cuda" if torch.cuda.is_available() and not fault else without_cuda
    device = torch.device(wanted)
    if device.type != "cuda":
        keep_freed_memory()
        return device
    number = device.index or 0
    if WORLD > 1:
        if device.index is not None:
            fail(f"device = {wanted!r}: under torchrun each process has its own card; use cuda or auto")
        number = LOCAL_RANK
    if fault := cards.fault(number):
        fail(f"device = {wanted!r} cannot be used: {fault}")
    n_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= n_cards:
        remedy = f"--nproc_per_node={n_cards}" if WORLD > 1 and n_cards else "auto or cpu"
        fail(f"device = 'cuda:{number}' does not exist: torch sees {n_cards} CUDA devices; use {remedy}")
    device = torch.device("cuda", number)  # some calls insist on the number
    torch.cuda.set_device(device)  # our own kernels and graphs go to the current one
    kernels.HAS_CUDA_INT8 = kernels.multiplies_int8(device)  # here, since compiled code cannot try
    if not kernels.HAS_CUDA_INT8:
        print(f"{describe(device)} has no int8 products; ternary layers multiply in float32", file=sys.stderr)
    elif torch.cuda.get_device_capability(device) >= kernels.FUSED_FROM and not no_compiler(device):
        kernels.fused_matmul, reason = kernels.working_fused(device)
        if reason:
            print(f"Triton's int8 product is not used, but that of cuBLAS: {reason}", file=sys.stderr)
    if not kernels.fused_matmul:  # compiled code divides by the scales, which it should do as eager code does
        os.environ.setdefault("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING", "1")  # before inductor is loaded
    return device


def keep_freed_memory():
    """Let glibc keep what a training step frees for the next one. It would return large blocks to the system,
    which clears each page again: 6 to 11 % of a step of the 95M model on a CPU. The peak stays the same."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # before glibc 2.35
        libc.mallopt(trim_threshold, -1)  # never


def pick_dtype(wanted, device):
    """Return the torch dtype of matrix products. auto is bfloat16 if the device has units for it, else
    float32: a CPU without them emulates bfloat16 several times slower."""
    if wanted in ("auto", "bfloat16") and has_bf16(device):
        return torch.bfloat16
    if wanted == "bfloat16":
        print(f"dtype: {describe(device)} has no bfloat16 units; computing in float32", file=sys.stderr)
    if wanted == "auto" and is_float16_card(device):
        hint = "--dtype=float16 should be faster, for models without experts and without fsdp"
        print(f"dtype: {describe(device)} has no bfloat16 units, so float32; {hint}", file=sys.stderr)
    if wanted == "float16" and device.type == "mps":
        fail("dtype = 'float16' needs a gradient scaler, which is for cuda and cpu; use bfloat16 or float32")
    return torch.float16 if wanted == "float16" else torch.float32


def training_dtype(cfg, device):
    """Return the dtype of a run: as pick_dtype, but auto is float16 on a card with units for it alone. It
    needs a gradient scaler, which works without experts and fsdp."""
    if cfg.dtype == "auto" and is_float16_card(device) and not (cfg.n_expert or cfg.fsdp):
        return torch.float16
    return pick_dtype(cfg.dtype, device)


def is_float16_card(device):
    """Return whether a card has units for float16 and none for bfloat16: Volta and Turing."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 7


def has_bf16(device):
    """Return whether the device multiplies bfloat16 matrices faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "mps" or torch.cpu._is_avx512_bf16_supported()


def matrix_dtype(device):
    """Return the dtype of an iteration on whole matrices, whatever the model computes in."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def name(dtype):
    """Return 'float32', 'bfloat16' or 'float16'."""
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """Return the context of a forward whose products are of this dtype."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def explain_out_of_memory(cfg, device):
    """From now on, print one line with the remedy if the device runs out of memory, wherever that happens."""

    def hook(error_type, error, trace):
        # of torch, Triton, cuBLAS, the CPU, and of NumPy
        pattern = "out of memory|_ALLOC_FAILED|you tried to allocate|Unable to allocate"
        if not (issubclass(error_type, (RuntimeError, MemoryError)) and re.search(pattern, str(error))):
            return sys.__excepthook__(error_type, error, trace)
        divisors = [n for n in range(1, cfg.batch_size // 2 + 1) if cfg.batch_size % n == 0]
        remedy = "shorten seq_len or make the model smaller"
        if divisors:
            remedy = f"halve it: --batch_size={divisors[-1]} --total_batch_size={cfg.total_batch_size}"
            if not cfg.dropout and not cfg.n_expert:
                remedy += " gives the same result"
        if can_replay(cfg, device, cfg.n_expert):
            remedy += "; --cuda_graph=False takes less, too"
        fault = f"out of memory on {describe(device)} with batch_size = {cfg.batch_size}"
        print(f"\nerror: {fault}; {remedy}", file=sys.stderr)

    sys.excepthook = hook


def make_deterministic():
    """Make the same run give the same bits on the same machine. Otherwise compiled embedding gradients use
    atomics, and the compiler chooses between forms of a product by timing them."""
    # torch._inductor reads it when it is imported, which comes later
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # guards a bug that we do not have, at a cost
    torch.backends.cudnn.benchmark = False


def no_compiler(device):
    """Return why torch.compile, or Triton alone, cannot work on a device, or ''."""
    if device.type == "mps":
        return "torch.compile does not cover MPS yet"
    if device.type == "cuda" and not has_triton():
        return "torch.compile needs Triton on CUDA, and a card that it knows"
    if device.type == "cuda":  # Triton compiles a small C file at its first use (triton/runtime/build.py)
        compilers = ["gcc", "clang"]
        if "CC" in os.environ:
            compilers = [os.environ["CC"]]
        if not any(map(shutil.which, compilers)):
            return f"torch.compile needs a C compiler ({' or '.join(compilers)}) on CUDA, for Triton"
        scheme = {"posix": "posix_prefix"}.get(os.name, os.name)  # that of Debian names another folder
        header = os.path.join(sysconfig.get_path("include", scheme), "Python.h")
        if not os.path.exists(header):
            return f"torch.compile needs {header} on CUDA, for Triton; install python3-dev"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile needs a C++ compiler (g++) on CPU"
    return ""


def compile_fault(device, options):
    """Return why a small function cannot be compiled for a device, in one line, or '': a compiler may exist
    and fail, the folder of compiled code may not be writable, torch may not know an option any more."""
    try:
        torch.compile(lambda x: x * 2 + 1, options=options)(torch.ones(16, device=device))
    except Exception as error:  # of torch, the compiler or the file system: eager code works
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return ""


def can_replay(cfg, device, n_expert):
    """Return whether the kernels of this model can be started as CUDA graphs: experts wait for the device."""
    return cfg.cuda_graph and device.type == "cuda" and not n_expert


def replays_micro_steps(cfg, device, dtype, flops_per_token):
    """Return whether CUDA graphs pay in training: on one card, if a micro-step is so short that the device
    would wait for the host. In longer ones, the memory that graphs hold is better used for a larger batch."""
    if WORLD > 1 or not can_replay(cfg, device, cfg.n_expert):
        return False
    peak = cards.peak_flops(device, dtype) or 1e14
    return cfg.batch_size * cfg.seq_len * flops_per_token < 0.01 * peak  # 10 ms; really some 30


def compiled(model, cfg, device):
    """Return (the model or its compiled form, whether it is compiled), and print why if that cannot work."""
    if not cfg.compile:
        return model, False
    options = compiler_options(cfg, device)
    if reason := no_compiler(device) or compile_fault(device, options):
        print(f"compile: off, {reason}", file=sys.stderr)
        return model, False
    return torch.compile(model, dynamic=False, options=options), True


def compiler_options(cfg, device):
    """Return options of torch.compile that pay on CUDA (docs/log.md)."""
    if device.type != "cuda":
        return {}
    options = {
        # rows of up to 16,384 numbers are read once, by kernels with a whole row in registers; else up to
        # 1,024. torch's comment gives the meanings of 2 and 3 the other way round
        "triton.multi_kernel": 3,
        "online_softmax": False,  # two passes over a row of logits: one is bound by its exponentials
    }
    if cfg.batch_size * cfg.seq_len >= 2**13:  # with fewer tokens it costs 1 % of a step
        options["realize_reads_threshold"] = 8  # a sum of 5 to 8 tensors is computed again, not stored
    return options


def describe(device):
    """Return the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def processor():
    """Return what the last bits of a CPU's results depend on: cpu (model and vector units) and threads."""
    names = []
    # only Linux has this file; platform.processor() runs a command, and knows less
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    model = next(iter(names), "") or platform.processor() or platform.machine()
    return dict(cpu=f"{model}, {torch.backends.cpu.get_cpu_capability()}", threads=torch.get_num_threads())


def synchronize(device):
    """Wait for the device, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gb(device):
    """Return the most memory held so far, in 1e9 bytes: of the device, or of the process on CPU; None on
    Windows, which has no such number in Python."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9  # CUDA graphs use what is reserved
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
