"""nanobit/machine.py on a CUDA card that is declared: what Triton needs, the dtype of a run, its memory."""

import os
import platform
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from nanobit import machine

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "programs, cc, has_header, says",
    [
        (["gcc"], None, True, ""),
        (["clang"], None, True, ""),
        (["cc"], None, True, "needs a C compiler (gcc or clang)"),
        (["gcc"], "icx", True, "needs a C compiler (icx)"),
        (["icx"], "icx", True, ""),
        (["gcc"], None, False, "/python9/Python.h on CUDA, for Triton; install python3-dev"),
    ],
)
def test_triton_needs_a_compiler_and_the_header_of_python(
    monkeypatch, tmp_path, programs, cc, has_header, says
):
    """What Triton needs on CUDA is looked for: a traceback at the first step would be the alternative."""
    monkeypatch.setattr(machine, "has_triton", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: f"{tmp_path}/python9")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc:
        monkeypatch.setenv("CC", cc)
    for program in programs:
        (tmp_path / program).write_text("#!/bin/sh\n")
        os.chmod(tmp_path / program, 0o755)
    if has_header:
        (tmp_path / "python9").mkdir()
        (tmp_path / "python9" / "Python.h").touch()
    reason = machine.no_compiler(CUDA)
    assert says in reason
    assert bool(says) == bool(reason)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
@pytest.mark.parametrize("changes", [dict(n_expert=4), dict(fsdp=True), dict(dtype="float32"), {}])
def test_a_run_uses_the_float16_units_of_a_card(card, capsys, capability, changes):
    """auto is float16 in training on Volta and Turing, except if its gradient scaler would not work."""
    card("Tesla T4", capability)
    cfg = SimpleNamespace(**dict(dtype="auto", n_expert=0, fsdp=False) | changes)
    assert machine.training_dtype(cfg, CUDA) == (torch.float32 if changes else torch.float16)
    assert ("--dtype=float16 should be faster" in capsys.readouterr().err) == (
        "dtype" not in changes and bool(changes)
    )
    card()
    assert (
        machine.training_dtype(SimpleNamespace(dtype="auto", n_expert=0, fsdp=False), CUDA) == torch.bfloat16
    )


@pytest.mark.parametrize(
    "error, explained",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (MemoryError("Unable to allocate 195. GiB for an array"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_every_lack_of_memory_is_explained(card, monkeypatch, capsys, error, explained):
    """A lack of memory is one line with the remedy, whichever library raises it."""
    card()
    monkeypatch.setattr(sys, "excepthook", None)  # restored afterwards
    cfg = SimpleNamespace(batch_size=8, total_batch_size=1024, dropout=0.0, n_expert=0, cuda_graph=True)
    machine.explain_out_of_memory(cfg, CUDA)
    sys.excepthook(type(error), error, None)
    err = capsys.readouterr().err
    assert (
        "\nerror: out of memory on NVIDIA GeForce RTX 3060 with batch_size = 8; halve it" in err
    ) == explained
    assert (type(error).__name__ in err) != explained
    assert ("--cuda_graph=False takes less" in err) == explained


def test_a_processor_has_a_model_and_vector_units():
    """The record of a run names the CPU beyond its architecture, and the threads of torch."""
    facts = machine.processor()
    assert facts["cpu"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    assert len(facts["cpu"].split(",")[0]) > 0
    assert facts["threads"] == torch.get_num_threads()
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        assert facts["cpu"].split(", ")[0] in names[0]


ALWAYS = {"triton.multi_kernel": 3, "online_softmax": False}


@pytest.mark.parametrize(
    "batch_size, options",
    [(31, ALWAYS), (32, ALWAYS | {"realize_reads_threshold": 8})],
)
def test_models_are_compiled_for_cuda_with_options_that_torch_knows(monkeypatch, batch_size, options):
    """torch.compile gets the options that were measured: one of them for 8,192 tokens or more."""
    cfg = SimpleNamespace(compile=True, batch_size=batch_size, seq_len=256)
    torch.compile(lambda x: x, options=options)  # RuntimeError if it does not know one
    calls = []
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    monkeypatch.setattr(machine, "compile_fault", lambda device, options: "")
    monkeypatch.setattr(torch, "compile", lambda model, **keywords: calls.append(keywords))
    machine.compiled(None, cfg, CUDA)
    machine.compiled(None, cfg, torch.device("cpu"))
    assert [call["options"] for call in calls] == [options, {}]


def test_an_option_that_torch_does_not_know_ends_compiling(capsys, monkeypatch):
    """A version of torch without one of the options trains eagerly, with a line, not with a traceback."""
    monkeypatch.setattr(machine, "no_compiler", lambda device: "")
    monkeypatch.setattr(machine, "compiler_options", lambda cfg, device: {"triton.multi_kernels": 3})
    assert machine.compiled(torch.sin, SimpleNamespace(compile=True), torch.device("cpu")) == (
        torch.sin,
        False,
    )
    assert "compile: off, RuntimeError: Unexpected optimization option" in capsys.readouterr().err


def test_freed_memory_is_kept():
    """On a CPU with glibc, a tensor that is freed is used by the next one without new pages."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    resource = pytest.importorskip("resource")
    machine.pick("cpu")
    torch.ones(2**24)  # 64 MiB, more than malloc keeps by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24 - 2**12)  # a little less, since malloc wants room to align it
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 16,384 pages


@pytest.mark.parametrize("most, sizes", [(2**40, [2**30]), (2**25, [2**30, 2**25])])
def test_an_older_glibc_keeps_what_it_can(monkeypatch, most, sizes):
    """glibc before 2.35 refuses to keep blocks of more than 32 MiB: then those are kept. The end of the heap
    never returns to the system; musl is left alone."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return value <= most

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.31"))
    machine.keep_freed_memory()
    assert calls == [*((-3, size) for size in sizes), (-1, -1)]
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    machine.keep_freed_memory()
    assert len(calls) == len(sizes) + 1
