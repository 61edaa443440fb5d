"""nanobit/compare/runs.py: how a run of a comparison is found, started and ended."""

import json
import os
import signal
import subprocess
from unittest import mock

import pytest

from nanobit.compare import runs


def test_a_run_killed_by_the_system_says_so():
    """A run without a last word, such as one that the system killed, has the signal as its error."""
    assert runs.last_error(-9, "step 1/8\n") == "killed by signal 9"


def test_an_error_is_the_last_line_of_a_run():
    """The last error line counts, whatever is printed after it; without one, the last line."""
    assert runs.last_error(2, "x\nerror: no data\nbye\n") == "no data"
    assert runs.last_error(1, "Traceback\nKeyError: 'x'\n\n") == "KeyError: 'x'"
    assert runs.last_error(1, "") == "exit code 1"


def test_a_signal_while_waiting_starts_no_run():
    """A signal that comes while another process trains the run ends the wait, and nothing is started."""
    with (
        mock.patch.object(runs, "received", [signal.SIGINT]),
        mock.patch.object(subprocess, "Popen") as started,
        pytest.raises(runs.Stopped),
    ):
        runs.train("nowhere/x", {}, 1)
    started.assert_not_called()


def test_signals_that_nohup_ignores_stay_ignored():
    """listen() takes over the signals of an interactive shell, not those that are ignored."""
    former = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        runs.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)


@pytest.mark.parametrize(
    "event, is_over",
    [
        (dict(event="finish", why="max_steps", result={}), True),
        (dict(event="failed", what="50 steps in a row were not finite; use a lower rate"), True),
        (dict(event="failed", what="KeyError: 'x'"), False),
        (dict(event="interrupt"), False),
    ],
    ids=["finished", "diverged", "broken", "interrupted"],
)
def test_only_what_would_end_alike_is_not_repeated(tmp_path, event, is_over):
    """A finished run and one that diverged are not trained again; one that broke or was stopped is."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/events.jsonl").write_text(json.dumps(event | dict(step=3)) + "\n")
    assert runs.has_ended(str(tmp_path)) == is_over


def test_a_child_is_one_of_its_own_session_whose_errors_are_read():
    """train.py has a session of its own, so that Ctrl-C reaches it once, and its stderr is read."""
    options = {}

    def start(command, **given):
        options.update(given)
        raise InterruptedError

    with mock.patch.object(subprocess, "Popen", start), pytest.raises(InterruptedError):
        runs.train("nowhere/x", {}, 1)
    assert options["start_new_session"]
    assert options["stderr"] == subprocess.PIPE


def test_a_folder_is_found_whatever_its_variant_is_called(tmp_path):
    """The same settings under another name are the same run."""
    path = runs.path_of(str(tmp_path), "n_layer=1 n_head=2", dict(n_layer=1, n_head=2), 7)
    os.mkdir(path)
    assert runs.path_of(str(tmp_path), "n_head=2 n_layer=1", dict(n_layer=1, n_head=2), 7) == path
    assert runs.path_of(str(tmp_path), "n_layer=1", dict(n_layer=1, n_head=2), 8) != path
