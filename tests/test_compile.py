"""torch.compile that cannot work costs one line, and the run trains eagerly."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, train

BROKEN = """
import os
os.environ["PATH"] = {folder!r} + os.pathsep + os.environ["PATH"]
os.environ["TORCHINDUCTOR_CACHE_DIR"] = {cache!r}
"""


@pytest.mark.parametrize("what", ["compiler", "cache"])
def test_a_compiler_that_fails_is_one_line(tmp_path, data_dir, out_dir, what):
    """A compiler that fails, and a folder of compiled code that cannot be written, are reported in one line,
    and the run ends complete."""
    cache = tmp_path / "cache"
    if what == "compiler":
        for name in ("g++", "clang++"):
            (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
            os.chmod(tmp_path / name, 0o755)
    else:
        cache.write_text("a file in the place of the folder")
    patch = BROKEN.format(folder=str(tmp_path), cache=str(cache))
    changes = dict(compile=True, max_steps=1, eval_every=0, sample_every=0)
    _, err = train(data_dir, out_dir, "r", patch=patch, **changes)
    assert err.count("compile: off, ") == 1
    assert "Traceback" not in err


def test_the_compiler_reads_what_pick_asks_of_it():
    """The compiler's settings, which are made of the environment when they are loaded, are not loaded before
    machine.pick asks for exact divisions there."""
    program = "import os, model; from nanobit import machine, optim, start; "
    program += "os.environ['TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING'] = '1'; "
    program += "import torch._inductor.config as inductor; assert inductor.eager_numerics.division_rounding"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
