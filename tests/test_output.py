"""A run survives what happens to its output: closed terminals, readers that end, full disks, encodings."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time

import faults
import pytest
from conftest import EVENTS, ROOT, final, lines, run_flags, start_train, train, write_data
from test_recovery import assert_same_run

from nanobit import terminal
from nanobit.run_dir import steps

pty = pytest.importorskip("pty")

# wait in the middle of a function, when it is called for the nth time, until the terminal is gone
WAIT_IN = """
import {module}, time
real, count = {module}.{function}, [0]
def waiting(*args, **kwargs):
    count[0] += 1
    if count[0] == {nth}:
        open({mark!r}, "w").close()
        time.sleep(0.5)
    return real(*args, **kwargs)
{module}.{function} = waiting
"""


def close_terminal(tmp_path, data_dir, out_dir, module, function, nth, patch=""):
    """Train in a terminal that closes during the nth call of module.function; return the exit code."""
    master, slave = pty.openpty()
    mark = str(tmp_path / "mark")
    patch += faults.in_terminal(os.ttyname(slave))
    patch += WAIT_IN.format(module=module, function=function, nth=nth, mark=mark)
    child = start_train(data_dir, out_dir, "closed", patch)
    os.set_blocking(master, False)
    deadline = time.monotonic() + 60
    while not os.path.exists(mark) and time.monotonic() < deadline:
        try:
            os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(slave)
    os.close(master)  # the kernel sends SIGHUP; what is written from now on gets EIO
    return child.wait(60)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return (data_dir, the folder of an unbroken run)."""
    folder = tmp_path_factory.mktemp("whole")
    data_dir = write_data(folder / "data")
    train(data_dir, str(folder), "whole")
    return data_dir, str(folder / "whole")


@pytest.mark.parametrize(
    "during, module, function, nth",
    [
        ("training", "torch.optim.AdamW", "step", 9),
        ("evaluation", "nanobit.metrics", "mean_loss", 2),
        ("sampling", "nanobit.generate", "repetition", 2),
        ("saving", "nanobit.saving", "save", 2),
        ("health", "nanobit.metrics", "health", 9),
    ],
)
def test_a_closed_terminal_saves_the_step(tmp_path, whole, out_dir, during, module, function, nth):
    """SIGHUP with a terminal that is gone saves the step, exits 129, and resumes bit for bit."""
    if module == "torch.optim.AdamW":
        module, patch = "optimizers", "import torch, sys; sys.modules['optimizers'] = torch.optim.AdamW\n"
    else:
        patch = ""
    data_dir, unbroken = whole
    code = close_terminal(tmp_path, data_dir, out_dir, module, function, nth, patch)
    assert code == 128 + signal.SIGHUP
    end = lines(f"{out_dir}/closed", EVENTS)[-1]
    assert end["event"] == "interrupt"
    assert end["step"] in steps(f"{out_dir}/closed")
    train(data_dir, out_dir, "closed", resume="auto")
    assert_same_run(unbroken, f"{out_dir}/closed")


def test_a_closed_terminal_does_not_stop_what_ignores_it(tmp_path, data_dir, out_dir):
    """With SIGHUP ignored (nohup, disown) only the output is lost, and the run ends complete."""
    patch = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert close_terminal(tmp_path, data_dir, out_dir, "nanobit.saving", "save", 2, patch) == 0
    assert lines(f"{out_dir}/closed", EVENTS)[-1]["event"] == "finish"


def test_a_signal_before_training_leaves_nothing(data_dir, out_dir):
    """SIGHUP after the folder was made and before a step exits 129 and leaves no folder."""
    patch = "import model, os, signal\n"
    patch += "model.Transformer.counts = lambda self: os.kill(os.getpid(), signal.SIGHUP)"
    train(data_dir, out_dir, "early", code=128 + signal.SIGHUP, patch=patch)
    assert not os.path.exists(f"{out_dir}/early")


UNWRITABLE = """
import io, os
class Unwritable(io.RawIOBase):
    def writable(self): return True
    def write(self, data): raise OSError({code}, os.strerror({code}))
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Unwritable()), encoding="ascii")
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Unwritable()), encoding="ascii", line_buffering=True)
"""


@pytest.mark.parametrize("code", ["28", "32"])  # no space under the log; the reader of a pipe has ended
def test_output_that_cannot_be_written_is_lost_alone(data_dir, out_dir, code):
    """A run whose stdout and stderr cannot be written ends complete, with exit code 0."""
    train(data_dir, out_dir, "mute", patch=UNWRITABLE.format(code=code))
    assert final(f"{out_dir}/mute")
    assert lines(f"{out_dir}/mute", EVENTS)[-1]["event"] == "finish"


def test_a_closed_stdout_and_stderr_are_no_error(data_dir, out_dir):
    """A run started with closed descriptors (`>&- 2>&-`, some daemons) ends complete."""
    flags = run_flags(data_dir, out_dir, "r", max_steps=2)
    script = [sys.executable, os.path.join(ROOT, "train.py"), *flags]
    command = shlex.join(script) + " >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=120).returncode == 0
    assert lines(f"{out_dir}/r", EVENTS)[-1]["event"] == "finish"


def test_text_that_the_encoding_lacks_is_escaped():
    """A character that the terminal's encoding cannot print appears as an escape."""
    raw = io.BytesIO()
    stream = terminal.Lossy(io.TextIOWrapper(raw, encoding="latin-1"))
    stream.write("caf\xe9 \u65e5")
    stream.flush()
    assert raw.getvalue() == b"caf\xe9 \\u65e5"


def test_a_stream_that_is_closed_is_no_error():
    """Writing to a closed stream is dropped too."""
    stream = terminal.Lossy(io.StringIO())
    stream.stream.close()
    assert stream.write("x") == 1
    stream.flush()


@pytest.mark.parametrize("text, shown", [("a\x1b[2J", "a\\x1b[2J"), ("a\nb", "a\\nb"), ("\u65e5", "\u65e5")])
def test_control_characters_are_escaped(text, shown):
    """Text from a file cannot move the cursor or break a line."""
    assert terminal.printable(text) == shown
