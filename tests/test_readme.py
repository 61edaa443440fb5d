"""README.md: its commands run, and what it says of the code holds."""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT, run
from parts import llama_folder

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().split("\n")
]
MODEL = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--ffn_dim=32", "--no-compile"]
HUB = ["--repo={hub}", "--vocab_size=330", "--workers=1"]
SMALL = {  # what makes a command small enough for a test, without changing what it does
    "prepare/arithmetic.py": ["--train_problems=500", "--val_problems=20"],
    "prepare/tictactoe.py": ["--games=2000", "--val_fraction=0.1"],
    "prepare/tinystories.py": HUB,
    "prepare/fineweb_edu.py": [*HUB, "--config=", "--tokenizer=sentencepiece", "--val_fraction=0.2"],
    "prepare/text.py": ["--files={hub}/*.jsonl", "--vocab_size=330", "--workers=1", "--val_fraction=0.2"],
    "prepare/lambada.py": ["--files={hub}/*.jsonl"],
    "prepare/blimp.py": ["--files={hub}/*.jsonl"],
    "train.py": [
        "--max_steps=3",
        "--eval_tokens=640",
        "--sample_tokens=2",
        "--batch_size=2",
        "--save_every=1",
    ]
    + ["--total_batch_size=0", "--compile=False", "--out_dir={runs}", "--data_dir={data}"],
    "bench.py": ["--pairs=1", "--warmup=1", *MODEL, "--seq_len=16", "--total_batch_size=0"],
    "evaluate.py": ["--data_dir={data}", "--eval_tokens=640", "--games=3"],
    "sample.py": ["--max_new_tokens=5"],
    "monitor.py": [],
    "export.py": [],
}
RUNS = {  # what the README's commands take for granted: a run of each, on data of its own
    "demo": ("train_simple", "arithmetic"),
    "train_arithmetic": ("train_arithmetic", "arithmetic --ops=+-x --digits=3 --name=arithmetic3"),
    "train_tictactoe": ("train_tictactoe", "tictactoe"),
    "train_tinystories": ("train_tinystories", "tinystories"),
    "train_text": ("train_text", "text"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """data of every kind, and the runs that the README speaks of, each three steps of a tiny model"""
    found = {name: str(tmp_path_factory.mktemp(name)) for name in ("runs", "data", "hub")}
    rows = [f"a story of a dog, a cat and the bird number {i}" for i in range(300)]
    pair = dict(
        sentence_good="a dog sat", sentence_bad="a dog sit", UID="agreement", linguistics_term="verbs"
    )
    for split in ("train", "validation"):
        with open(os.path.join(found["hub"], f"{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": row} | pair) + "\n" for row in rows)

    def small(script, *args):
        run(script, *args, *(flag.format(**found) for flag in SMALL[script]), f"--data_dir={found['data']}")

    few = "tinystories --name=few_stories"
    for command in ("lambada", "blimp", "fineweb_edu", few, *(command for _, command in RUNS.values())):
        script, *args = command.split()
        small(f"prepare/{script}.py", *args)
    for name, (config, _) in RUNS.items():
        small("train.py", f"config/{config}.py", f"--run_id={name}", *MODEL)
    return found


def python_commands():
    """every `python ...` of the README, in blocks and in the text"""
    inline = re.findall(r"`(python [^`]+)`", README)
    return sorted({line for line in COMMANDS + inline if line.startswith("python ") and "--help" not in line})


def run_command(command, folders, tmp_path):
    """run a `python ...` of a page on the small runs, writing to tmp_path"""
    script, *args = shlex.split(command)[1:]
    more = [flag.format(**folders) for flag in SMALL[script]]
    if script.startswith("prepare/"):
        more.append(f"--data_dir={tmp_path}")
    if script == "train.py":
        has_shape = "--n_layer" in command or "--init_from=llama" in command
        more += ["--no-compile"] if has_shape else MODEL
        more += [] if "--run_id" in command or "--resume" in command else ["--run_id=again"]
        in_runs = "--resume" in command or "_llama" in command
        more.append(f"--out_dir={folders['runs'] if in_runs else tmp_path}")
    if "--dataset=books" in command:
        more.append(f"--data_dir={tmp_path}")
    if script == "monitor.py" and not args:
        more.append(f"--out_dir={folders['runs']}")
    args = [arg.replace("runs/", folders["runs"] + "/") for arg in args]
    args = [re.sub(r"=(\w+\.png)", rf"={tmp_path}/\1", arg) for arg in args]
    args = [re.sub(r"^--(out|ckpt|init_from)=(?!/)", rf"--\1={tmp_path}/", arg) for arg in args]
    args = [f"--tokenizer={tmp_path}/llama" if arg == "--tokenizer=llama" else arg for arg in args]
    return run(script, *args, *more)[0]


@pytest.mark.parametrize("command", python_commands())
def test_command_runs(command, folders, tmp_path):
    """bug guarded: a README whose commands have stopped working"""
    run_command(command, folders, tmp_path)


def test_the_page_on_exports(folders, tmp_path, monkeypatch, capsys):
    """bugs guarded: a page whose commands and programs have stopped working; a text that is another there"""
    for name in ("transformers", "cyllama"):
        pytest.importorskip(name, reason="the readers of exports: requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    llama_folder(tmp_path / "llama")  # in the place of one that is downloaded
    with open(os.path.join(ROOT, "docs/export.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```(bash|python)\n(.*?)```", file.read(), re.S)
    said = []
    for kind, block in blocks:
        if kind == "python":
            with torch._dynamo.config.patch(disable=True):  # parts of transformers' code are compiled
                exec(block, {})
            said.append(capsys.readouterr().out.strip())
            continue
        for command in block.strip().split("\n"):
            if command.startswith("python "):
                said.append(run_command(command, folders, tmp_path))
    texts = [text for text in said if text.startswith("Once upon a time")]
    assert len(said) == 16 and len(texts[1]) > 16 and texts[0].startswith(texts[1].rstrip()), said


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
