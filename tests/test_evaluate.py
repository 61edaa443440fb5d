"""evaluate.py: which data and models it scores, and which it refuses."""

import json
import math
import os

import pytest
from conftest import run, train, write_data
from test_examples import PAIR, write_lines
from test_tasks import CHAR, Bigram

from nanobit.prepare import token_files
from nanobit.tasks import arithmetic
from nanobit.tasks import text as tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return data_dir, out_dir of a tiny run."""
    folder = tmp_path_factory.mktemp("trained")
    data_dir, out_dir = write_data(folder / "data"), str(folder / "runs")
    train(data_dir, out_dir, "r", max_steps=4, eval_every=0, sample_every=0, prepare="python prepare/x.py")
    return data_dir, out_dir


def evaluate(trained, *args, code=0):
    """Return (the JSON line, stdout, stderr) of evaluate.py on the tiny run."""
    out, err = run("evaluate.py", f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}", *args, code=code)
    return code == 0 and json.loads(out.strip().split("\n")[-1]), out, err


def change_meta(data_dir, name, **changes):
    path = os.path.join(data_dir, name, "meta.json")
    with open(path, encoding="utf-8") as file:
        meta = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(meta | changes, file)


def test_evaluate_reads_any_split_and_data_set(trained):
    """The split and data set of the flags are read; a task is scored on its val split only."""
    result = evaluate(trained, "--split=train")[0]
    assert result["tokens"] == 31 * 16
    assert result["split"] == "train"
    assert "accuracy" not in result
    write_data(trained[0], "other", n_val=400)
    change_meta(trained[0], "other", task="tictactoe")  # a score belongs to what is held out
    assert "accuracy" not in evaluate(trained, "--dataset=other", "--split=train")[0]


def test_bits_per_byte_count_the_bytes_of_the_text(trained):
    """bits_per_byte uses the bytes of the split, which are not its tokens."""
    write_data(trained[0], "bytes", n_val=400)
    change_meta(trained[0], "bytes", bytes=dict(train=500, val=1600))
    other = evaluate(trained, "--dataset=bytes", "--eval_tokens=64")[0]
    assert other["dataset"] == "bytes"
    assert other["split"] == "val"
    assert other["tokens"] == 64
    assert other["bits_per_byte"] == pytest.approx(other["val_loss"] / math.log(2) / 4)


def test_evaluate_refuses_another_tokenizer(trained):
    """A data set of another vocabulary, or with another token at the beginning of texts, is refused."""
    write_data(trained[0], "foreign", vocab_size=3)
    change_meta(trained[0], "foreign", tokenizer=token_files.char_tokenizer("\nab"))
    assert "has another tokenizer" in evaluate(trained, "--dataset=foreign", code=2)[2]
    write_data(trained[0], "begins", n_val=400)
    change_meta(trained[0], "begins", bos=5)  # the same ids, but each text after another one
    err = evaluate(trained, "--dataset=begins", code=2)[2]
    assert "its texts begin with token 5, the model's with 0" in err


def test_evaluate_scores_a_rounded_head(trained):
    """With --head=int8 the loss of the rounded head stands beside the exact one."""
    exact = evaluate(trained)[0]["val_loss"]
    rounded = evaluate(trained, "--head=int8")[0]
    assert rounded["head"] == "int8"
    assert rounded["exact_val_loss"] == exact
    assert 0 < abs(rounded["val_loss"] - exact) < 0.01


def test_flags_of_evaluate_reach_the_model(trained):
    """--packed and --dtype arrive at the model."""
    spy = """
import torch; from nanobit import metrics
real = metrics.mean_loss
def mean_loss(of, batches):
    packed = any(type(layer).__name__ == "PackedLinear" for layer in of.modules())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else "float32"
    print("packed", packed, dtype)
    return real(of, batches)
metrics.mean_loss = mean_loss
"""
    flags = [f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}"]
    assert "packed True float32" in run("evaluate.py", *flags, patch=spy)[0]
    out, _ = run("evaluate.py", *flags, "--packed=False", "--dtype=float16", patch=spy)
    assert "packed False torch.float16" in out


def test_evaluate_refuses_what_is_not_there(trained):
    """A missing data set is answered with its own preparation, a wrong number with its range."""
    for flag, says in (
        ("--dataset=lambada", "make it: python prepare/lambada.py --data_dir="),
        ("--games=0", "games = 0 must be at least 1"),
    ):
        err = evaluate(trained, flag, code=2)[2]
        assert err.splitlines()[-1].startswith("error: "), err
        assert says in err, err


def test_a_loss_that_is_not_finite_fails(trained):
    """evaluate.py never reports a loss of null with exit code 0."""
    flags = [f"--ckpt={trained[1]}/r", f"--data_dir={trained[0]}"]
    patch = "from nanobit import metrics; metrics.mean_loss = lambda *_: float('nan')"
    out, err = run("evaluate.py", *flags, patch=patch, code=1)
    assert "error: val_loss is nan: what this model computes is too large for float32" in err
    assert "val_loss" not in out


def test_evaluate_scores_text(trained, tmp_path):
    """A task of text is scored from its task.jsonl, and has the split val only."""
    where, long = f"--data_dir={trained[0]}", dict(text="a context far too long for it")
    write_lines(tmp_path / "words.jsonl", dict(text="some words here"), long)
    write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR | dict(sentence_good="the end"))
    run("prepare/lambada.py", f"--files={tmp_path}/words.jsonl", where, "--name=words")
    run("prepare/blimp.py", f"--files={tmp_path}/pairs.jsonl", where, "--name=pairs")
    words, out, err = evaluate(trained, "--dataset=words", "--batch_size=1")
    assert words["n"] == 2
    assert words["contexts_cut"] == 1
    assert words["step"] == 4
    assert err == "using run r, step 4\n"
    assert words["tokens"] == len(" here it")
    assert 20 < math.exp(words["val_loss"]) < 40
    assert "2 examples" in out
    assert "1 passages lost their beginning" in out
    pairs = evaluate(trained, "--dataset=pairs")[0]
    assert pairs["n"] == 2
    assert pairs["accuracy_by_phenomenon"] == dict(agreement=pairs["accuracy"])
    assert "has the split val only" in evaluate(trained, "--dataset=pairs", "--split=train", code=2)[2]


def test_half_a_task_is_not_scored(tmp_path, capsys):
    """A damaged or incomplete task is refused; an unknown character names its example."""
    write_lines(tmp_path / "words.jsonl", dict(text="some words"))
    run("prepare/lambada.py", f"--files={tmp_path}/words.jsonl", f"--data_dir={tmp_path}")
    folder, path = str(tmp_path / "lambada"), tmp_path / "lambada/task.jsonl"
    assert tasks.read(folder) == ("lambada", [dict(text="some words")])
    for damage, says in (
        (lambda: change_meta(tmp_path, "lambada", task="chess"), "task 'chess' is unknown"),
        (lambda: os.truncate(path, 5), "task.jsonl is damaged"),
        (lambda: os.truncate(path, 0), "has 0 examples, meta.json says 1"),
        (lambda: (tmp_path / "lambada/meta.json").write_text("{"), "meta.json is damaged"),
        (lambda: os.remove(tmp_path / "lambada/meta.json"), "is not complete (no meta.json)"),
    ):
        damage()
        with pytest.raises(SystemExit) as stop:
            tasks.read(folder)
        assert says in capsys.readouterr().err
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        tasks.lambada(Bigram({}, CHAR.ids), CHAR, 0, [dict(text="a b"), dict(text="a B")], 1)
    assert "example 2 ('a B'): the tokenizer has no character 'B'" in capsys.readouterr().err


def test_a_damaged_example_is_one_line(tmp_path, capsys):
    """Each kind of damage to a task gives one printable line before anything is scored."""
    for name, rows in (("lambada", [dict(text="a b")]), ("blimp", [PAIR])):
        for line in ("[1]", '{"text": 3, "UID": ""}', "{}", "[" * 100_000, "\xff", '"\x1b[2J"'):
            folder = tmp_path / name
            write_lines(folder / "task.jsonl", *rows)
            with open(folder / "task.jsonl", "ab") as file:
                file.write(line.encode("latin-1") + b"\n")
            (folder / "meta.json").write_text(json.dumps(dict(task=name, examples=2)))
            with pytest.raises(SystemExit) as stop:
                tasks.read(str(folder))
            error = capsys.readouterr().err
            assert stop.value.code == 2
            assert "task.jsonl is damaged" in error
            assert error[:-1].isprintable()
    for meta in ("[]", '{"task": 3, "examples": 2}', '{"task": "blimp", "examples": "2"}', "[" * 100_000):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(SystemExit):
            tasks.read(str(folder))
        assert "meta.json is damaged" in capsys.readouterr().err


def test_damaged_problems_are_one_line(tmp_path, capsys):
    """problems.txt is refused, with one line, if its size, format or an answer is wrong."""
    path, content = tmp_path / "problems.txt", b"12+7=19\n3-10=-7\n12x12=144\n"
    path.write_bytes(content)
    assert arithmetic.read(str(tmp_path), len(content)) == [
        ("12+7=", "19"),
        ("3-10=", "-7"),
        ("12x12=", "144"),
    ]
    for damaged, says in (
        (content.replace(b"19", b"18"), "line 1 is '12+7=18'"),
        (content.replace(b"3-", b"\xff-"), "line 2 is"),
        (content.replace(b"-10", b" 10"), "line 2 is"),
        (content.replace(b"=19\n", b"=19 "), "line 1 is"),
        (content[:8], "has 8 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit) as stop:
            arithmetic.read(str(tmp_path), len(content))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert says in error, error
        assert error.count("\n") == 1, error


def test_evaluate_verifies_the_data(trained):
    """--verify_data finds a byte that changed while the size and time of the file stayed."""
    write_data(trained[0], "rotten")
    evaluate(trained, "--dataset=rotten")
    path = os.path.join(trained[0], "rotten", "val_00000.bin")
    stat = os.stat(path)
    with open(path, "r+b") as file:
        low = file.read(1)[0]
        file.seek(0)
        file.write(bytes([0 if low else 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _, _, err = evaluate(trained, "--dataset=rotten", "--verify_data", code=2)
    assert "val_00000.bin has changed" in err


def test_an_unknown_task_is_refused(trained):
    """A task that this version cannot score is an error, not a missing score."""
    write_data(trained[0], "strange")
    change_meta(trained[0], "strange", task="arithmetik")
    assert "task 'arithmetik' is unknown" in evaluate(trained, "--dataset=strange", code=2)[2]
