"""What the tests share: a small data set of their own, a small model, and train.py run as a child process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# the suite's models are so small that a second thread only waits, and the children want the other core
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of compilers imports torch for some seconds
if hasattr(signal, "SIGHUP"):  # nohup ignores it, and the children would inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("ranks", "web_browser")  # they assert, and test files import them

import faults  # noqa: E402
import torch  # noqa: E402
from fork import Script  # noqa: E402
from histories import noisy, write_run  # noqa: E402

import config  # noqa: E402
from nanobit import checkpoint, kernels, saving  # noqa: E402
from nanobit.infer import packed  # noqa: E402
from nanobit.prepare import token_files  # noqa: E402
from nanobit.run_dir import RunDir, step_dir  # noqa: E402

SCALARS, EVENTS = "metrics/scalars.jsonl", "metrics/events.jsonl"
CHARS = "\nabcdefghijklmnopqrstuvwxyz "
TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, seq_len=16, batch_size=4, warmup_steps=3)
RUN = TINY | dict(
    n_layer=1,  # the loop does not depend on the number of layers, its time does
    max_steps=24,
    log_every=1,
    eval_every=6,
    eval_tokens=64,
    sample_every=12,
    sample_tokens=2,
    save_every=5,
    compile=False,
    device="cpu",
    dtype="float32",
)


def write_data(folder, name="tiny", n_train=500, n_val=200, vocab_size=28, top=None):
    """Write a data set of random ids below `top`; return data_dir. 500 tokens hold 31 windows of 16: an epoch
    in 8 steps."""
    rng = np.random.default_rng(0)
    target = token_files.open_data_set(str(folder), name, "random ids")
    shards, sizes = {}, {}
    for split, n in (("train", n_train), ("val", n_val)):
        ids = rng.integers(0, top or vocab_size, n)
        shards |= token_files.write_split(target, split, ids, vocab_size)
        sizes[split] = n
    chars = CHARS + "".join(chr(0x10000 + i) for i in range(vocab_size - len(CHARS)))
    made = dict(tokenizer=token_files.char_tokenizer(chars), eot=0, vocab_size=vocab_size)
    token_files.write_meta(target, **made, tokens=sizes, bytes=sizes, shards=shards, source="random ids")
    return str(folder)


@pytest.fixture
def data_dir(tmp_path):
    return write_data(tmp_path / "data")


def settings(**changes):
    """Return the checked cfg of a tiny run."""
    values = dict(vocab_size=len(CHARS), dataset="tiny") | RUN | TINY | changes
    return config.load([f"--{key}={value}" for key, value in values.items()])


def errors_of(capsys, *argv):
    """Return the error lines of a command line that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        config.load(list(argv))
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().split("\n")
    assert all(line.startswith("error: ") for line in errors)
    return errors


def flags(**changes):
    return [f"--{key}={value}" for key, value in changes.items()]


def start(script, *args, cwd=ROOT, patch=""):
    """Start a script of the project as a child process; patch is Python that runs before it, inside that
    process."""
    path = os.path.join(ROOT, script)
    code = f"import sys, runpy; sys.argv = {[script, *args]!r}\n"
    code += f"sys.path[:0] = {[os.path.dirname(path), ROOT]!r}\n{patch}\n"
    code += f"runpy.run_path({path!r}, run_name='__main__')"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def run(script, *args, code=0, cwd=ROOT, patch=""):
    """Return (stdout, stderr) of a script that ends with this exit code, within five minutes."""
    if script.startswith("prepare/"):  # they do not import torch, and their pools end with an interpreter
        child = start(script, *args, cwd=cwd, patch=patch)
        out, err = child.communicate(timeout=300)
        ended = child.returncode
    else:
        ended, out, err = Script(os.path.join(ROOT, script), args, cwd, patch).wait(300)
    assert ended == code, f"exit code {ended}, expected {code}\n{out[-2000:]}\n{err[-4000:]}"
    assert "Traceback" not in err or code < 0, err
    return out, err


def run_flags(data_dir, out_dir, run_id, /, **changes):
    """Return the flags of train.py for a tiny run."""
    return flags(**dict(data_dir=data_dir, out_dir=out_dir, dataset="tiny", run_id=run_id) | RUN | changes)


def train(data_dir, out_dir, run_id, code=0, patch="", **changes):
    """Train a tiny run; return (stdout, stderr)."""
    return run("train.py", *run_flags(data_dir, out_dir, run_id, **changes), code=code, patch=patch)


def start_train(data_dir, out_dir, run_id, patch="", **changes):
    """Start a tiny run as a process."""
    args = run_flags(data_dir, out_dir, run_id, **changes)
    return Script(os.path.join(ROOT, "train.py"), args, ROOT, patch)


def start_ranks(n, patch="", **values):
    """Start n ranks of train.py as processes: as torchrun does, in half the time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = dict(TORCHELASTIC_RUN_ID="x", WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    each = [env | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(n)]
    return [Script(os.path.join(ROOT, "train.py"), flags(**values), ROOT, patch, **env) for env in each]


def result_of(out):
    """Return the result of a run, the last line that it prints."""
    return json.loads(out.strip().split("\n")[-1])


def lines(run_dir, name):
    """Return the lines of a JSONL file of a run, each of which must be whole."""
    with open(os.path.join(run_dir, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def final(run_dir, step=24):
    """Return the weights and the optimizer state at the end of a run."""
    folder = step_dir(run_dir, step)
    return checkpoint.load(folder)["model"], checkpoint.load(folder, checkpoint.TRAINER)["optimizer"]


def rows(run_dir):
    """Return what a run logged, without what depends on the clock."""
    clocked = {"time", "tokens_per_sec", "step_ms", "memory_gb", "mfu", "gpu_util"}
    return [{k: v for k, v in row.items() if k not in clocked} for row in lines(run_dir, SCALARS)]


@pytest.fixture
def out_dir(tmp_path):
    return str(tmp_path / "runs")


def kill_at(data_dir, out_dir, step, how=signal.SIGKILL, run_id="broken", **changes):
    """Train until the log has this step, then send the signal; return the exit code and stderr."""
    child = start_train(data_dir, out_dir, run_id, faults.slow_updates(0.05), **changes)
    path, deadline = os.path.join(out_dir, run_id, SCALARS), time.time() + 100
    while not (os.path.exists(path) and f'"step": {step}, "epoch"' in open(path, encoding="utf-8").read()):
        assert not child.ended() and time.time() < deadline, child.wait(0)
        time.sleep(0.01)
    child.kill(how)
    ended, _, err = child.wait(60)
    return ended, err


@pytest.fixture
def run_dir(tmp_path):
    """Return an empty folder of a run."""
    run = RunDir(str(tmp_path))
    run.open()
    run.lock.release()
    return run.path


@pytest.fixture
def ckpt(tmp_path):
    """Return --ckpt= of a random model of the 28 characters."""
    from scripted_models import save  # which imports this file

    return save(tmp_path / "run", token_files.char_tokenizer(CHARS))


@pytest.fixture
def unreadable(run_dir, monkeypatch):
    """Save checkpoints of steps 5 and 10 in run_dir, of which those of step 10 cannot be read now."""
    from checkpoints import save  # which imports this file

    save(run_dir, 5), save(run_dir, 10)
    real = open

    def failing(path, *args, **kwargs):
        if "step_000010" in str(path) and str(path).endswith(".pt"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)


@pytest.fixture
def card(monkeypatch):
    """Return a function that declares a CUDA card, as torch describes it."""
    monkeypatch.setattr(kernels, "HAS_CUDA_INT8", True)  # pick() sets both
    monkeypatch.setattr(kernels, "fused_matmul", None)
    monkeypatch.setenv("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING", "")  # so that what pick sets is removed
    monkeypatch.delenv("TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING")

    def declare(name="NVIDIA GeForce RTX 3060", capability=(8, 6), has_int8=True):
        monkeypatch.setattr(kernels, "multiplies_int8", lambda device: has_int8)
        monkeypatch.setattr(kernels, "working_fused", lambda device: ("the fused kernel", ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_120", "compute_120"])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: capability >= (8, 0))

    return declare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return (a folder with the same documents as .jsonl, .parquet (also as a local hub data set) and .txt,
    the documents)."""
    import pyarrow
    import pyarrow.parquet
    from documents import texts  # which imports this file

    folder, documents = tmp_path_factory.mktemp("corpus"), texts()
    with open(folder / "docs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text, "n": i}) + "\n" for i, text in enumerate(documents))
    (folder / "docs.txt").write_bytes("".join(documents).encode())
    for i in range(3):
        (folder / f"part{i}.txt").write_bytes("".join(documents[100 * i : 100 * i + 100]).encode())
    (folder / "separated.txt").write_bytes("<|end|>".join(documents).encode())
    table = pyarrow.table({"text": documents, "id": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, folder / "docs.parquet", row_group_size=70)
    os.makedirs(folder / "hub" / "data")
    for split, part in (("train-00000-of-00002", table[:150]), ("train-00001-of-00002", table[150:])):
        pyarrow.parquet.write_table(part, folder / "hub" / "data" / f"{split}.parquet", row_group_size=40)
    pyarrow.parquet.write_table(table[:20], folder / "hub" / "data" / "validation-00000-of-00001.parquet")
    return folder, documents


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return (data_dir, out_dir) with run "a", finished at step 10, which began with resume = 'auto'."""
    folder = tmp_path_factory.mktemp("finished")
    where = write_data(folder / "data"), str(folder / "runs")
    train(*where, "a", max_steps=10, resume="auto", sample_every=0)
    return where


@pytest.fixture
def copied(finished, out_dir):
    """Return (data_dir, out_dir) with a copy of run "a", to be changed."""
    shutil.copytree(f"{finished[1]}/a", f"{out_dir}/a")
    return finished[0], out_dir


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Return a folder with a ternary run `r`, 72 wide so that a matrix is larger than the picture's corner,
    and its float twin `f`."""
    folder = tmp_path_factory.mktemp("twins")
    data_dir = write_data(folder / "data")
    train(data_dir, f"{folder}/runs", "r", n_layer=2, n_embd=72, learning_rate=0.02)
    write_run(folder / "runs" / "f", losses=noisy(0.01, n=24), evals=[(0, 2.5)], run_id="f", ternary=False)
    part = checkpoint.load(step_dir(f"{folder}/runs/r", 5))
    part["config"]["ternary"] = False
    saving.save(f"{folder}/runs/f", 5, part, {"format": 1})
    return f"{folder}/runs"


@pytest.fixture(params=["C", "int8"])
def form(request, monkeypatch):
    """Return the form of computing packed weights: with the C functions, compiled once for all tests, or
    without a compiler."""
    if request.param == "int8":
        monkeypatch.setattr(packed, "library", lambda: None)
    elif not packed.library():
        pytest.skip("needs a C compiler")
    return request.param


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory):
    """Return {kind of tokenizer: the folder of a model with it}, for prepare/chat.py."""
    import talks

    folder = tmp_path_factory.mktemp("models")
    return {kind: talks.model(folder, kind) for kind in talks.KINDS}


@pytest.fixture(scope="session")
def talk_rows(tmp_path_factory):
    """Return the path of a file of conversations."""
    import talks

    rows = [dict(messages=messages) for messages in talks.talks()]
    return talks.write_rows(tmp_path_factory.mktemp("talks") / "rows.jsonl", rows)
