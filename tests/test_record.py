"""The record of a run: each line is there once and whole, whatever was killed, damaged or full."""

import math
import os
import sys
from types import SimpleNamespace

import pytest
from checkpoints import no_room

from nanobit import record
from nanobit.record import BITNET, EVENTS, SAMPLES, SCALARS
from nanobit.run_dir import RunDir


def steps(run_dir, name=SCALARS):
    return [row["step"] for row in record.read(run_dir, name)]


def text_of(run_dir, name):
    with open(os.path.join(run_dir, name), encoding="utf-8") as file:
        return file.read()


# writing


def test_an_evaluation_is_a_loss_and_its_perplexity():
    """Perplexity is e^loss in the record and in the log; one of a very large loss is still a float."""
    written, logged = [], []
    run = SimpleNamespace(
        cfg=SimpleNamespace(max_steps=9), write=lambda name, **row: written.append(row), log=logged.append
    )
    for loss in (2.0, 1e6):
        RunDir.log_evaluation(run, 3, loss, 1.25)
    assert written[0] == dict(step=3, val_loss=2.0, val_perplexity=pytest.approx(7.389056))
    assert logged[0] == "eval 3/9  val_loss 2.0000  perplexity 7.389  1.2 s"
    assert written[1]["val_perplexity"] == pytest.approx(math.exp(700))


def test_the_record_is_flushed(run_dir, monkeypatch):
    """record.flush puts each file of the record on the disk."""
    calls = []
    fsync = os.fsync
    for name in record.FILES:
        record.append_text(run_dir, "{}", name)
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), fsync(handle)))
    record.flush(run_dir)
    assert len(calls) == len(record.FILES)


def test_a_file_that_cannot_be_flushed_costs_a_warning(run_dir, monkeypatch, capsys):
    """A file system that refuses to flush a log costs one warning, and no checkpoint."""

    def refuse(handle):
        raise OSError(22, "Invalid argument")

    record.append(run_dir, SCALARS, step=1, loss=0.5)
    monkeypatch.setattr(record.files, "warned", set())
    monkeypatch.setattr(os, "fsync", refuse)
    record.flush(run_dir), record.flush(run_dir)
    assert capsys.readouterr().err.count("cannot be flushed to the disk (Invalid argument)") == 1


@pytest.mark.parametrize(
    "name, fields, stored",
    [
        (SCALARS, dict(loss=float("nan"), grad_norm=float("inf")), dict(loss=None, grad_norm=None)),
        (
            BITNET,
            dict(total={"act_absmax": float("inf")}, layers=[float("nan")]),
            dict(total={"act_absmax": None}, layers=[None]),
        ),
    ],
)
def test_json_lines_have_no_nan(run_dir, name, fields, stored):
    """NaN and infinity, which other readers of JSON refuse, are written as null."""
    record.append(run_dir, name, step=1, **fields)
    assert record.read(run_dir, name) == [dict(step=1) | stored]


def test_a_full_disk_costs_a_line_not_the_run(run_dir, monkeypatch, capsys):
    """A line that cannot be written is lost with a warning, and the next one is written."""
    record.append(run_dir, SCALARS, step=1, loss=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_room)
        record.append(run_dir, SCALARS, step=2, loss=0.5)
    record.append(run_dir, SCALARS, step=3, loss=0.5)
    assert "No space left" in capsys.readouterr().err
    assert steps(run_dir) == [1, 3]


class HalfFull:
    """A file on a disk that has room for nine more characters."""

    real = open

    def __init__(self, *args, **kwargs):
        self.file = HalfFull.real(*args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def tell(self):
        return self.file.tell()

    def write(self, text):
        self.file.write(text[:9])
        self.file.flush()
        no_room()


def test_half_a_line_does_not_stay(run_dir, monkeypatch):
    """Of a line for which the disk has no room nothing stays, onto which the next would be written."""
    record.append(run_dir, SCALARS, step=1, loss=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", HalfFull)
        record.append(run_dir, SCALARS, step=2, loss=0.5)
    record.append(run_dir, SCALARS, step=3, loss=0.5)
    assert steps(run_dir) == [1, 3]


def test_a_file_that_cannot_be_opened_is_not_emptied(run_dir, monkeypatch):
    """A line that is lost since the disk is gone for a moment takes no other line with it."""

    def gone(path, *args, **kwargs):
        raise OSError(116, "Stale file handle", path)

    record.append(run_dir, SCALARS, step=1, loss=0.5)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", gone)
        patch.setattr(os.path, "exists", lambda path: False)
        record.append(run_dir, SCALARS, step=2, loss=0.5)
    assert record.read(run_dir, SCALARS) == [{"step": 1, "loss": 0.5}]


# reading

DAMAGED = (
    '{"stfp": 3, "loss": 1}',
    '{"step": null, "loss": 1}',
    '{"step": "3", "loss": 1}',
    '{"step": -3, "loss": 1}',
    '{"step": 3, "lpss": 1}',
    '{"step": 3, "loss": 1, "l\ufffd": 0.1}',
    '{"step": 3, "loss": ' + "1" * 5000 + "}",
    '{"step": 3, "loss": ' + "[" * 100000,
    "[3]",
    "\0" * 40,
)


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_left_out(run_dir, line):
    """Readers do not see a damaged line; a resume drops it, and reports it once."""
    record.append(run_dir, SCALARS, step=1, loss=0.5)
    record.append_text(run_dir, line, SCALARS)
    record.append(run_dir, SCALARS, step=4, loss=0.5)
    assert steps(run_dir) == [1, 4]
    assert record.rewind(run_dir, 4, {}) == [f"{SCALARS}: 1 lines before step 4 are missing or damaged"]
    assert record.rewind(run_dir, 4, {}) == []


def test_a_number_of_another_type_is_unknown(run_dir):
    """A reader that sorts, adds or hashes gets None for what is not a number that it can add."""
    big = "1" + "0" * 400
    line = f'{{"step": 1, "loss": {big}, "lr": "x", "time": 1e999, "mfu": NaN}}'
    record.append_text(run_dir, line, SCALARS)
    assert record.read(run_dir, SCALARS) == [dict(step=1, loss=None, lr=None, time=None, mfu=None)]


def test_a_total_of_another_type_is_unknown(run_dir):
    """A reader gets None for a value of `total` that is not a number."""
    record.append(run_dir, BITNET, step=1, total={"zero": 0.5, "plus": [1]})
    assert record.read(run_dir, BITNET)[0]["total"] == {"zero": 0.5, "plus": None}


def test_a_text_of_another_type_is_unknown(run_dir):
    """A reader gets None for what is not a text."""
    record.event(run_dir, "anomaly", step=1, what=[1])
    assert record.read(run_dir, EVENTS)[0]["what"] is None


# resuming


@pytest.fixture
def rewound(run_dir):
    """Return the folder of a run of three steps, killed while it wrote two lines, that resumes from step
    2."""
    for step in (1, 2, 3):
        record.append(run_dir, SCALARS, step=step, loss=0.5)
        record.append(run_dir, BITNET, step=step, total={})
        record.append_text(run_dir, f"step {step}/9 ...")
        if step > 1:
            record.append(run_dir, SCALARS, step=step, val_loss=1.0)
            record.append(run_dir, SAMPLES, step=step, mode="greedy", prompt="a", generated_text="b")
            record.append_text(run_dir, f"eval {step}/9 ...")
        record.event(run_dir, "save", step=step)
    for name in (SCALARS, EVENTS):
        with open(os.path.join(run_dir, name), "a", encoding="utf-8") as file:
            file.write('{"step": 4, "lo')
    record.rewind(run_dir, 2)
    return run_dir


def test_rewind_keeps_the_training_lines_up_to_the_step(rewound):
    """Training lines beyond step k, and evaluations from k on, are dropped: they are made again."""
    rows = record.read(rewound, SCALARS)
    assert [(row["step"], "loss" in row) for row in rows] == [(1, True), (2, True)]
    assert steps(rewound, BITNET) == [1, 2]


def test_rewind_drops_the_samples_from_the_step_on(rewound):
    """Samples from step k on are made again."""
    assert record.read(rewound, SAMPLES) == []


def test_rewind_keeps_the_events(rewound):
    """Whole events stay, a half-written one does not."""
    assert len(record.read(rewound, EVENTS)) == 3


def test_rewind_drops_the_same_lines_of_the_log(rewound):
    """train.log keeps what the other files keep."""
    assert text_of(rewound, "train.log") == "step 1/9 ...\nstep 2/9 ...\n"


@pytest.fixture
def six_steps(run_dir):
    """Return (folder, number of lines in each file at step 3) of a run of six steps that was started
    twice."""
    for _ in range(2):
        record.rewind(run_dir, None)
        for step in range(1, 7):
            if step == 4:  # what a checkpoint of step 3 holds
                counts = dict(record.counts)
            record.append(run_dir, SCALARS, step=step, loss=0.5)
            record.append_text(run_dir, f"step {step}/9 ...")
            record.event(run_dir, "save", step=step)
    return run_dir, counts


@pytest.mark.parametrize(
    "damage, n_lost",
    [
        (lambda lines: lines, 0),
        (lambda lines: lines[1:], 1),
        (lambda lines: [], 3),
        (lambda lines: [lines[0], "\0\0" + lines[1], *lines[2:]], 1),
        (lambda lines: [*lines[:4], "{}"], 0),
    ],
)
def test_lost_lines_are_counted(six_steps, damage, n_lost):
    """Lines of earlier steps that are missing or damaged are reported; those that are made again are not
    counted."""
    run_dir, counts = six_steps
    lines = damage(text_of(run_dir, SCALARS).split("\n")[:-1])
    with open(os.path.join(run_dir, SCALARS), "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    says = []
    if n_lost:
        says = [f"{SCALARS}: {n_lost} of 3 lines before step 3 are missing or damaged"]
    assert record.rewind(run_dir, 3, counts) == says


def test_a_lost_log_is_counted(six_steps):
    """A train.log that is gone is reported with its number of lines."""
    run_dir, counts = six_steps
    os.remove(os.path.join(run_dir, "train.log"))
    lost = record.rewind(run_dir, 3, counts)
    assert lost == ["train.log: 3 of 3 lines before step 3 are missing or damaged"]


def test_only_the_own_temporaries_of_a_run_are_removed(run_dir):
    """Half-written files of killed processes are removed, a user's file with such a name is not."""
    own = ["best.json.tmp-12", "config.json.tmp-7", f"{SCALARS}.tmp", f"{SAMPLES}.tmp-1"]
    foreign = ["notes.tmp", "best.json.tmp-x", "mine.json.tmp-1"]
    for name in own + foreign:
        with open(os.path.join(run_dir, name), "w", encoding="utf-8") as file:
            file.write("{")
    record.rewind(run_dir, 3)
    assert [name for name in own + foreign if os.path.exists(os.path.join(run_dir, name))] == foreign


# printing


def test_the_result_is_json_except_on_a_terminal(capsys, monkeypatch):
    """stdout ends with one JSON line; on a terminal a summary is shown instead, unless --json is given."""
    record.print_result({"step": 3, "loss": float("nan")}, False, "three steps")
    assert capsys.readouterr().out == '{"step": 3, "loss": null}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    record.print_result({"step": 3}, False, "three steps")
    assert capsys.readouterr().out == "three steps\n"
    record.print_result({"step": 3}, True, "three steps")
    assert capsys.readouterr().out == '{"step": 3}\n'
