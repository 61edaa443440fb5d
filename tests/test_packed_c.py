"""nanobit/infer/packed.c: the compilers that make it, and the same bits on all units of a CPU."""

import os

import pytest
import torch
from torch import nn

from nanobit.infer import packed
from nanobit.infer.head import Int8Head
from quant import BitLinear


def test_a_missing_compiler_is_reported(monkeypatch, capfd):
    """Without a C compiler, one line on stderr reports that everything is slower."""
    monkeypatch.setattr(packed.shutil, "which", lambda name: None)
    packed.library.cache_clear()
    assert packed.library() is None
    packed.library.cache_clear()
    err = capfd.readouterr().err
    assert "no C compiler" in err
    assert "slower" in err


def test_a_compiler_that_works_is_silent(capfd):
    """With a C compiler, packed.c is compiled without a line on stderr."""
    if not any(map(packed.shutil.which, packed.COMPILERS)):
        pytest.skip("needs a C compiler")
    packed.library.cache_clear()
    assert packed.library()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("makes", ["junk", "nothing", "an error", "only without -fopenmp"])
def test_compilers_that_fail(makes, tmp_path, monkeypatch, capfd):
    """A compiler that is broken, or whose library cannot be loaded, is one line, and int8 is used."""
    body = {
        "junk": "while [ $# -gt 0 ]; do [ $1 = -o ] && echo junk >$2; shift; done",
        "nothing": "exit 0",
        "an error": "printf '\\377 no\\n' >&2; exit 1",
        "only without -fopenmp": 'case "$*" in *fopenmp*) exit 1;; esac; exec gcc "$@"',
    }[makes]
    if "gcc" in body and not packed.shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(packed, "COMPILERS", ["cc"])
    packed.library.cache_clear()
    assert bool(packed.library()) == makes.startswith("only")
    assert ("slower" in capfd.readouterr().err) != makes.startswith("only")
    packed.library.cache_clear()


UNITS = {"avx2": ["-mavx2"], "avx_vnni": ["-mavxvnni"], "avx512_vnni": ["-mavx512vnni", "-mavx512bw"]}


def units_here():
    """Return the keys of UNITS that this CPU has and the compiler knows, as Linux names them."""
    try:
        words = set(open("/proc/cpuinfo").read().split())
    except OSError:
        return []
    return [name for name in UNITS if name in words]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """packed.c in portable C and for each of units_here."""
    if not packed.library():
        pytest.skip("needs a C compiler")
    compiler = next(filter(None, map(packed.shutil.which, packed.COMPILERS)))
    all_flags = [[], *(UNITS[name] for name in units_here())]
    return [packed.build(compiler, flags, tmp_path_factory.mktemp("units")) for flags in all_flags]


@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("n_in", [31, 32, 1023, 1056, 3072])
def test_all_units_of_this_cpu_give_the_same_bits(libraries, n_rows, n_in, monkeypatch):
    """packed.c in portable C, with AVX2 and with VNNI computes the same, also with the largest sums. 72
    outputs are a whole block of rows of bytes and a part of one, 5 rows of x several tokens and one."""
    torch.manual_seed(0)
    bit, weight = BitLinear(n_in, 72), torch.randn(12, n_in)
    nn.init.constant_(bit.weight[:4], 1.0)
    x = torch.cat([torch.ones(1, n_in), torch.randn(n_rows - 1, n_in)])
    weight[0] = -1
    results = []
    for library in libraries:
        monkeypatch.setattr(packed, "library", lambda library=library: library)
        with torch.no_grad():
            results.append((packed.packed_linear(bit.weight)(x), Int8Head(weight)(x)))
    for layer, head in results:
        assert torch.equal(layer, results[0][0])
        assert torch.equal(head, results[0][1])
