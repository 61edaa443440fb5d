"""Other machines, emulated: Windows (tests/windows.py), MPS, cards and CPUs without bfloat16; no .venv."""

import glob
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, RUN, flags, lines, run, settings, start
from windows import PATCH

import model
from nanobit import cli, machine, metrics, terminal, tokenizer
from nanobit.monitor import status
from nanobit.tasks import game, tictactoe

MODEL = RUN | dict(dataset="text", max_steps=4, save_every=2, keep_last=1, eval_every=2, sample_every=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {data_dir, out_dir, run, folder}: a text prepared, and a run of four steps on it, both on an
    emulated Windows; the folder has a space in its name."""
    folder = tmp_path_factory.mktemp("a folder")
    where = dict(data_dir=str(folder / "data"), out_dir=str(folder / "runs"))
    (folder / "text.txt").write_text("".join(f"{n} birds and a dog\n" for n in range(300)), encoding="utf-8")
    how = dict(files=folder / "text.txt", tokenizer="char", workers=1, data_dir=where["data_dir"])
    run("prepare/text.py", *flags(**how), patch=PATCH)
    run("train.py", *flags(**where, run_id="r", **MODEL), patch=PATCH)
    return where | dict(folder=str(folder), run=os.path.join(where["out_dir"], "r"))


def test_windows_trains_and_resumes(folders):
    """A run trains and resumes on Windows, which lacks some modules and signals and does not rename open
    files."""
    where = {key: folders[key] for key in ("data_dir", "out_dir")}
    how = MODEL | dict(run_id="r", resume="auto", max_steps=6)
    out, _ = run("train.py", *flags(**where, **how), patch=PATCH)
    result = json.loads(out.strip().split("\n")[-1])
    assert result["step"] == 6
    assert result["val_loss"] > 0
    assert result["peak_memory_gb"] is None
    assert [row["step"] for row in lines(folders["run"], "metrics/scalars.jsonl") if "loss" in row] == [
        *range(1, 7)
    ]


@pytest.mark.parametrize(
    "command, says",
    [
        ("sample.py --ckpt={run} --prompt=1 --max_new_tokens=3", "1"),
        ("evaluate.py --ckpt={run} --data_dir={data_dir} --eval_tokens=64 --packed=False", "val_loss"),
        ("monitor.py {run}", "state"),
        ("export.py --ckpt={run} --format=hf --out={folder}/hf", ""),
        ("bench.py --help", "--plan"),
    ],
)
def test_windows_runs(folders, command, says):
    """Every command runs on Windows."""
    script, *args = command.split()
    out, _ = run(script, *(arg.format(**folders) for arg in args), patch=PATCH)
    assert says in out


TYPED = """
import io
class Typed(io.StringIO):
    def isatty(self): return True
    def reconfigure(self, **options): pass
sys.stdin = Typed("1 bird\\n\\n")
"""


def test_windows_chats_on_a_terminal(folders):
    """The chat works on Windows, whose select knows only sockets."""
    chat = [f"--ckpt={folders['run']}", "--chat", "--max_new_tokens=2"]
    out, _ = run("sample.py", *chat, patch=PATCH + TYPED)
    assert out.count("\n") >= 2, "an answer to each of the two messages"


def test_windows_removes_what_has_only_begun(folders):
    """What has only begun is removed on Windows, too: the folder of a run that is refused, a GGUF file for
    which the disk has no room."""
    where = {key: folders[key] for key in ("data_dir", "out_dir")}
    run("train.py", *flags(**where, **MODEL, run_id="d", resume=folders["run"], seed=1), code=2, patch=PATCH)
    assert not os.path.exists(os.path.join(folders["out_dir"], "d"))
    full = PATCH + "\nimport gguf\ndef write(self): raise OSError(28, 'No space left on device')\n"
    full += "gguf.GGUFWriter.write_tensors_to_file = write"
    path = os.path.join(folders["folder"], "full.gguf")
    export = [f"--ckpt={folders['run']}", "--format=gguf", f"--out={path}", "--type=f16"]
    _, err = run("export.py", *export, code=1, patch=full)
    assert "cannot be written" in err
    assert not glob.glob(path + "*")
    run("export.py", *export, patch=PATCH)
    run("export.py", *export, "--force", patch=PATCH)  # replaces it


@pytest.mark.parametrize(
    "error, code, says",
    [("OSError(28, 'No space left on device')", 1, "No space left"), ("KeyboardInterrupt", 130, "stopped")],
)
def test_windows_discards_a_preparation_that_has_only_begun(folders, error, code, says):
    """A full disk, or Ctrl-C, in the first seconds leaves no file of the data set and no traceback."""
    patch = f"{PATCH}\nfrom nanobit.prepare import token_files\n"
    patch += f"def write(self, ids): self.file.write(bytes(9)); raise {error}\n"
    patch += "token_files.Split.write = write"
    how = dict(files=os.path.join(folders["folder"], "text.txt"), tokenizer="char", workers=1, name="begun")
    _, err = run("prepare/text.py", *flags(**how, data_dir=folders["data_dir"]), code=code, patch=patch)
    assert says in err
    assert not os.path.exists(os.path.join(folders["data_dir"], "begun"))


@pytest.mark.parametrize("patch", [PATCH, ""], ids=["Windows", "others"])
@pytest.mark.parametrize("command", ["train.py --help", "monitor.py {run}"])
def test_a_program_ends_with_its_reader(folders, command, patch):
    """After `| head` has ended, a command ends without a word."""
    script, *args = command.split()
    path = os.path.join(ROOT, script)
    program = f"import sys, runpy\nsys.argv = {[script, *(arg.format(**folders) for arg in args)]!r}\n"
    program += f"sys.path.insert(0, {ROOT!r})\n{patch}\nrunpy.run_path({path!r}, run_name='__main__')"
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (child.returncode, child.stderr) == (1, b"")


def test_windows_is_not_asked_for_a_process(monkeypatch):
    """On Windows, os.kill(pid, 0) is not used: it would send Ctrl-C to the run."""
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail("a signal was sent"))
    monkeypatch.setattr(os, "name", "nt")
    assert status.is_alive(dict(pid=os.getpid())) is None


def test_windows_does_not_train_beside_a_preparation(monkeypatch, capsys):
    """tokenize_on_fly is refused on Windows, where a preparation cannot rename a file that is being read."""
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(SystemExit):
        settings(tokenize_on_fly=True)
    err = capsys.readouterr().err
    assert "error: tokenize_on_fly does not work on Windows" in err
    assert err.count("\n") == 1


def test_a_command_is_quoted_for_its_shell(monkeypatch):
    """A command is quoted for the shell of its system."""
    args = ["python", "train.py", "--data_dir=my data"]
    assert terminal.command_line(args) == "python train.py '--data_dir=my data'"
    monkeypatch.setattr(os, "name", "nt")
    assert terminal.command_line(args) == 'python train.py "--data_dir=my data"'


class OnHost(torch.Tensor):
    """What Tensor.cpu returns below, and what follows from it."""


def test_float64_is_on_the_cpu_only(monkeypatch):
    """Float64 is used on the CPU only, since MPS cannot convert to it."""

    def double(tensor, real=torch.Tensor.double):
        assert isinstance(tensor, OnHost), "Cannot convert a MPS Tensor to float64"
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.detach().as_subclass(OnHost))
    monkeypatch.setattr(torch.Tensor, "double", double)
    net = model.Transformer(settings(vocab_size=len(game.CHARS)))
    idx = torch.zeros(1, 8, dtype=torch.long)
    assert metrics.health(net, None, idx)[0]["total"]["zero"] > 0
    assert metrics.mean_loss(net, [(idx, idx)]) > 0
    chars = tokenizer.CharTokenizer(dict(chars=game.CHARS))
    assert tictactoe.next_logprobs(net, chars, 0, ["X1"])[0].isfinite().all()


def pick_dtype(monkeypatch, wanted, device_type, has_bf16, capability=(8, 0)):
    """Return machine.pick_dtype on a CPU or a CUDA card with or without units for bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "Tesla T4")
    return machine.pick_dtype(wanted, torch.device(device_type))


@pytest.mark.parametrize("kind", ["cpu", "cuda:0"])
def test_auto_is_bfloat16_if_the_device_has_units_for_it(monkeypatch, capsys, kind):
    """auto is bfloat16 only if the device has units for it, since emulation is several times slower than
    float32."""
    assert pick_dtype(monkeypatch, "auto", kind, True) == torch.bfloat16
    assert machine.matrix_dtype(torch.device(kind)) == torch.bfloat16
    assert pick_dtype(monkeypatch, "auto", kind, False) == torch.float32
    assert machine.matrix_dtype(torch.device(kind)) == torch.float32
    assert not capsys.readouterr().err
    assert pick_dtype(monkeypatch, "bfloat16", kind, False) == torch.float32
    assert "no bfloat16 units" in capsys.readouterr().err


def test_a_card_with_float16_units_alone_is_reported(monkeypatch, capsys):
    """A card that has units for float16 but not for bfloat16 is reported, with the faster choice."""
    assert pick_dtype(monkeypatch, "auto", "cuda:0", False, (7, 5)) == torch.float32
    assert "Tesla T4 has no bfloat16 units" in (err := capsys.readouterr().err)
    assert "--dtype=float16" in err
    pick_dtype(monkeypatch, "float32", "cuda:0", False, (7, 5))
    assert not capsys.readouterr().err


COMMANDS = {  # what each needs to get to its imports
    "train.py": ["config/train_simple.py"],
    "sample.py": ["--ckpt=x", "--prompt=x"],
    "evaluate.py": ["--ckpt=x"],
    "export.py": ["--ckpt=x", "--format=hf", "--out=x"],
    "bench.py": ["config/train_simple.py"],
    "monitor.py": ["--help"],
    **{f"prepare/{name}.py": [] for name in ("arithmetic", "text", "lambada", "blimp", "tinystories")},
}


def test_a_missing_requirement_is_explained_by_every_command():
    """Every command explains a missing requirement with one line."""
    patch = "for name in ('torch', 'numpy', 'tqdm'): sys.modules[name] = None"
    children = {script: start(script, *args, patch=patch) for script, args in COMMANDS.items()}
    for script, child in children.items():
        out, err = child.communicate(timeout=60)
        if script == "monitor.py":
            assert child.returncode == 0, "it needs none of them"
            assert "--watch" in out, "it needs none of them"
        else:
            assert child.returncode == 2, (script, err)
            assert err.count("\n") == 1, (script, err)
            assert err.startswith(f"error: {sys.executable} has no module "), (script, err)


def test_the_remedy_is_the_environment_if_there_is_one(monkeypatch, tmp_path, capsys):
    """If .venv exists, the remedy is to activate it."""
    monkeypatch.setattr(cli, "ROOT", str(tmp_path))
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    for remedy in ("make setup", f"source {tmp_path}/.venv/bin/activate"):
        with pytest.raises(SystemExit):
            cli.explain_missing(type(error), error, None)
        assert remedy in capsys.readouterr().err
        (tmp_path / ".venv").mkdir(exist_ok=True)


FAKE = """#!/bin/sh
echo "$@" >>calls
case "$1" in
  -c) {usable} ;;
  --version) echo Python 3.10.12 ;;
esac
[ "$2 $3" != "venv --clear" ] || {{ mkdir -p .venv/bin && cp "$0" .venv/bin/python; }}
"""


def make_setup(folder, usable):
    """Run `make setup` with a Python that is usable or not: (exit code, stderr, what the Pythons were
    asked)."""
    (folder / "calls").write_text("", encoding="utf-8")
    fake(folder / "other_python", usable)
    command = ["make", "-f", os.path.join(ROOT, "Makefile"), "setup", f"PYTHON={folder}/other_python"]
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return child.returncode, child.stderr, (folder / "calls").read_text(encoding="utf-8")


def fake(path, usable):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(usable=f"exit {int(not usable)}"), encoding="utf-8")
    path.chmod(0o755)


def test_make_setup_checks_the_python(tmp_path):
    """make setup refuses an old Python, replaces a .venv made by one, and keeps one that works."""
    (tmp_path / "requirements.txt").write_text("", encoding="utf-8")
    fake(tmp_path / ".venv" / "bin" / "python", usable=False)
    code, err, calls = make_setup(tmp_path, usable=False)
    assert code == 2
    assert "is Python 3.10.12; Python 3.11 to 3.13 is needed" in err
    assert "venv" not in calls
    code, err, calls = make_setup(tmp_path, usable=True)
    assert code == 0
    assert "-m venv --clear .venv" in calls
    assert "pip install" in calls
    code, err, calls = make_setup(tmp_path, usable=False)  # a .venv that works needs no other Python
    assert code == 0
    assert "venv" not in calls
    assert "pip install" not in calls
