"""README.md: its commands run, and what it says of the code holds."""

import os
import re
import shlex

import pytest
from conftest import ROOT, run

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().split("\n")
]
SMALL = {  # what makes a command small enough for a test, without changing what it does
    "prepare/arithmetic.py": ["--train_problems=500", "--val_problems=20"],
    "train.py": [
        "--max_steps=3",
        "--eval_tokens=640",
        "--sample_tokens=2",
        "--out_dir={runs}",
        "--data_dir={data}",
    ],
    "bench.py": [
        "--pairs=1",
        "--warmup=1",
        "--n_layer=1",
        "--compile=False",
        "--seq_len=16",
        "--total_batch_size=0",
    ],
    "evaluate.py": ["--data_dir={data}"],
    "sample.py": [],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """data and a run named demo, as `make demo` leaves them"""
    found = dict(runs=str(tmp_path_factory.mktemp("runs")), data=str(tmp_path_factory.mktemp("data")))
    run("prepare/arithmetic.py", *SMALL["prepare/arithmetic.py"], f"--data_dir={found['data']}")
    run(
        "train.py",
        "config/train_simple.py",
        "--run_id=demo",
        *(flag.format(**found) for flag in SMALL["train.py"]),
    )
    return found


def python_commands():
    """every `python ...` of the README, in blocks and in the text"""
    inline = re.findall(r"`(python [^`]+)`", README)
    return sorted({line for line in COMMANDS + inline if line.startswith("python ") and "--help" not in line})


@pytest.mark.parametrize("command", python_commands())
def test_command_runs(command, folders):
    """bug guarded: a README whose commands have stopped working"""
    script, *args = shlex.split(command)[1:]
    if script == "prepare/arithmetic.py":
        args.append(f"--data_dir={folders['data']}/again")
    args = [arg.replace("runs/", folders["runs"] + "/") for arg in args]
    run(script, *args, *(flag.format(**folders) for flag in SMALL[script]))


def test_make_targets_exist():
    """bug guarded: a command of the README that make does not know"""
    with open(os.path.join(ROOT, "Makefile"), encoding="utf-8") as file:
        makefile = file.read()
    targets = set(re.findall(r"make (\w+)", "\n".join(COMMANDS) + README)) - {"sure"}
    assert {"demo", "test", "setup"} <= targets
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in ("demo", "test", "setup"))


def test_named_files_exist():
    """bug guarded: a README that names absent files"""
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", README):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for name in re.findall(r"`(train_\w+)`", README):
        assert os.path.exists(os.path.join(ROOT, "config", f"{name}.py")), name
