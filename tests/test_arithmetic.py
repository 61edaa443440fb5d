"""prepare/arithmetic.py: which problems it makes, and which it holds out."""

import json
import os

import numpy as np
import pytest
from documents import prepare

from nanobit.tokenizer import make_tokenizer
from prepare import arithmetic


def read_lines(folder, split):
    meta = json.load(open(os.path.join(folder, "meta.json"), encoding="utf-8"))
    ids = np.concatenate(
        [np.fromfile(os.path.join(folder, n), "<u2") for n in meta["shards"] if n.startswith(split)]
    )
    assert meta["tokens"][split] == ids.size
    return make_tokenizer(meta["tokenizer"]).decode(ids.tolist()).split("\n")


THREE_DIGITS = ["--ops=+-x", "--digits=3", "--train_problems=30000"]


@pytest.fixture(scope="module", params=[["--train_problems=50000"], THREE_DIGITS])
def sums(request, tmp_path_factory):
    """Return (the folder of problems, {split: problems}, whether they are sums of two digits, as by
    default)."""
    folder = tmp_path_factory.mktemp("data")
    prepare(f"--data_dir={folder}", "--name=sums", *request.param, script="arithmetic")
    lines = {split: set(read_lines(folder / "sums", split)) - {""} for split in ("train", "val")}
    return folder / "sums", lines, len(request.param) == 1


def test_problems_are_right(sums):
    for text in sums[1]["train"] | sums[1]["val"]:
        question, _, answer = text.partition("=")
        assert str(eval(question.replace("x", "*"))) == answer


def test_held_out_problems_never_appear_in_training(sums):
    """A problem that is scored was trained on neither in this order nor with its operands exchanged."""
    _, lines, _ = sums
    questions = {text.partition("=")[0] for text in lines["train"]}
    for text in lines["val"]:
        question = text.partition("=")[0]
        op = next(char for char in question if not char.isdigit())
        a, _, b = question.partition(op)
        assert not {question, f"{b}{op}{a}"} & questions


def test_problems_txt_holds_the_held_out_problems(sums):
    folder, lines, is_default = sums
    assert lines["val"] == set((folder / "problems.txt").read_text(encoding="utf-8").split("\n")) - {""}
    if is_default:
        assert len([text for text in lines["val"] if len(text.split("=")[0]) == 5]) >= 1000
        assert len(lines["val"]) < 0.15 * 10_000


@pytest.mark.parametrize("a, b", [(3, 14), (27, 8)])
def test_both_orders_of_a_sum_are_held_out_together(a, b):
    assert arithmetic.is_held_out(b, "+", a) == arithmetic.is_held_out(a, "+", b)


def arithmetic_problems(folder, *flags, **options):
    return prepare(f"--data_dir={folder}", *flags, script="arithmetic", **options)


def test_preparation_is_repeatable(tmp_path):
    """Two calls with the same flags write the same data set."""
    for name in ("a", "b"):
        arithmetic_problems(tmp_path, f"--name={name}", "--train_problems=100", "--val_problems=9")
    shards = [json.loads((tmp_path / name / "meta.json").read_text())["shards"] for name in ("a", "b")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("flag", ["--ops=/", "--digits=0", "--train_problems=0", "--op=+"])
def test_flags_of_arithmetic_are_checked(tmp_path, flag):
    _, err = arithmetic_problems(tmp_path, flag, code=2)
    assert err.startswith("error: ")


def test_a_refusal_leaves_the_data_set(tmp_path):
    """Neither a refusal nor another data set under its name removes a data set."""
    flags = ["--name=a", "--train_problems=100", "--val_problems=9"]
    arithmetic_problems(tmp_path, *flags)
    _, err = arithmetic_problems(tmp_path, *flags, "--digits=1", code=2)
    assert "too few problems" in err
    _, err = arithmetic_problems(tmp_path, *flags, "--train_problems=99", code=2)
    assert "holds another data set" in err
    assert (tmp_path / "a" / "meta.json").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    _, err = arithmetic_problems(tmp_path / "file", "--train_problems=100", "--val_problems=9", code=2)
    assert "cannot write" in err
