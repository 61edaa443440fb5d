"""What train.py writes and prints: the files of a run, its last line on stdout, and the bar of a terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import termios
import time

import faults
import pytest
from conftest import EVENTS, SCALARS, lines, result_of, start_train, train, write_data

from nanobit import checkpoint
from nanobit.run_dir import step_dir


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return (folder, stdout, stderr) of a run of six steps of two blocks."""
    folder = tmp_path_factory.mktemp("written")
    out, err = train(write_data(folder / "data"), str(folder / "runs"), "r", max_steps=6, n_layer=2)
    return str(folder / "runs" / "r"), out, err


def test_the_last_line_of_stdout_is_the_result(written):
    """A program reads the result from the last line of stdout, one JSON object."""
    names = (
        "run_id step tokens loss val_loss val_bits_per_byte seconds tokens_per_sec peak_memory_gb checkpoint"
    )
    assert set(result_of(written[1])) == set(names.split())


def test_progress_goes_to_stderr_and_to_the_log(written):
    """Progress is on stderr, without a bar if that is not a terminal, and train.log has the same lines."""
    run_dir, _, err = written
    with open(f"{run_dir}/train.log", encoding="utf-8") as file:
        log = file.read()
    assert log == err
    assert "\r" not in err
    assert log.count("\nstep ") == 6


def test_a_training_line_describes_its_update(written):
    """The line of step 1 has the keys of the contract, and the numbers of the first update."""
    row = next(row for row in lines(written[0], SCALARS) if row["step"] == 1)
    names = (
        "step epoch tokens loss lr weight_decay stage grad_norm tokens_per_sec step_ms mfu memory_gb gpu_util"
    )
    assert set(row) == {*names.split(), "time"}
    assert row["tokens"] == 64
    assert row["epoch"] == 4 / 31
    assert row["stage"] == 1
    assert row["lr"] == pytest.approx(5e-4)


def test_the_line_of_the_last_update_of_stage_1_says_so(written):
    """The stage of a line is that of its update: of six steps, the third is the last of stage 1."""
    assert [row["stage"] for row in lines(written[0], SCALARS) if "stage" in row] == [1, 1, 1, 2, 2, 2]


def test_the_settings_are_stored_with_their_origin(written):
    """config.json holds each setting with its origin, and the process."""
    with open(f"{written[0]}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    assert config["settings"]["max_steps"] == {"value": 6, "origin": "--max_steps=6"}
    assert config["pid"]


def test_ternary_health_has_a_row_for_each_layer(written):
    """A line of bitnet.jsonl holds the total and all 14 layers of two blocks."""
    health = lines(written[0], "metrics/bitnet.jsonl")[0]
    assert set(health) == {"step", "total", "layers"}
    assert len(health["layers"]) == 14


def test_a_checkpoint_has_three_files(written):
    """A checkpoint is its two parts and the manifest; checkpoint.pt holds all that use needs."""
    folder = step_dir(written[0], 6)
    assert set(os.listdir(folder)) == {"checkpoint.pt", "trainer.pt", "manifest.json"}
    assert set(checkpoint.load(folder)) == {"format", "step", "tokens", "config", "tokenizer", "model"}


def test_events_begin_with_the_start_and_end_with_the_finish(written):
    """The events of a run are its start, its saves and its finish."""
    events = [event["event"] for event in lines(written[0], EVENTS)]
    assert events[0] == "start"
    assert events[-1] == "finish"
    assert "save" in events


def test_samples_are_written_in_three_modes(written):
    """Each prompt is continued greedily, by top_k and by nucleus."""
    samples = lines(written[0], "samples/samples.jsonl")
    assert [sample["mode"] for sample in samples] == ["greedy", "top_k", "nucleus"]
    assert set(samples[0]) == {"step", "mode", "prompt", "generated_text", "repetition"}


def read_now(leader):
    """Return what has arrived at a terminal."""
    try:
        return os.read(leader, 65536)
    except BlockingIOError:
        return b""


def test_a_terminal_gets_a_bar(data_dir, out_dir):
    """A terminal of 60 columns shows a bar that fits, loss lines and a sample."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    patch = faults.in_terminal(os.ttyname(follower), (2,))
    child = start_train(data_dir, out_dir, "r", patch, max_steps=8)
    os.set_blocking(leader, False)
    shown = b""
    while not child.ended():
        shown += read_now(leader)
        time.sleep(0.01)
    shown += read_now(leader)
    os.close(follower)
    assert child.wait(0)[0] == 0
    bars = re.findall(r"\r([^\r\n]*?8/8 100%[^\r\n]*)", shown.decode())
    assert bars, "the bar reaches the end"
    assert max(map(len, bars)) <= 60
    assert "loss" in bars[-1]
    assert "tok/s" in bars[-1]
    assert b"step 3/8" in shown
    assert b"sample 8/8" in shown
