"""nanobit/compare/runs.py: how a run of a comparison is found, started and ended."""

import json
import os
import signal
import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
from comparisons import no_run
from conftest import settings

from nanobit import files
from nanobit.compare import runs


def write_run(path, event, scalars=()):
    """Write the record of a run that ended with an event."""
    (path / "metrics").mkdir()
    (path / "metrics" / "events.jsonl").write_text(json.dumps(event | dict(step=8)) + "\n")
    (path / "metrics" / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scalars))


def row_of(path):
    """Return the row of a run."""
    variant = SimpleNamespace(name="x", is_twin=False, cfg=SimpleNamespace(total_batch_size=64))
    with mock.patch.object(runs, "compared", return_value={}):
        return runs.row_of(str(path), variant, 1, "")


FINISHED = dict(event="finish", why="max_steps", result={})


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
        (FINISHED, True),
        (dict(event="failed", what="50 steps in a row were not finite; use a lower rate"), True),
        (dict(event="failed", what="KeyError: 'x'"), False),
        (dict(event="interrupt"), False),
    ],
    ids=["finished", "diverged", "broken", "interrupted"],
)
def test_only_what_would_end_alike_is_not_repeated(tmp_path, event, is_over):
    """A finished run and one that diverged are not trained again; one that broke or was stopped is."""
    write_run(tmp_path, event)
    assert runs.has_ended(str(tmp_path)) == is_over


def test_a_child_has_its_own_session_and_its_errors_are_read():
    """train.py has its own session, so that Ctrl-C reaches it once, and its stderr is read."""
    options = {}

    def start(command, **given):
        options.update(given)
        raise InterruptedError

    with mock.patch.object(subprocess, "Popen", start), pytest.raises(InterruptedError):
        runs.train("nowhere/x", {}, 1)
    assert options["start_new_session"]
    assert options["stderr"] == subprocess.PIPE


def test_a_run_gets_every_setting_that_a_comparison_does_not_decide():
    """No setting of the command line is dropped on the way to train.py."""
    missing = vars(settings()).keys() & runs.DEFAULTS.keys() - runs.compared(settings()).keys()
    assert missing == {"seed", "resume", "max_minutes", "patience", "run_id", "out_dir", "total_tokens"}


def test_a_folder_is_found_whatever_its_variant_is_called(tmp_path):
    """The same settings under another name are the same run."""
    path = runs.path_of(str(tmp_path), "n_layer=1 n_head=2", dict(n_layer=1, n_head=2), 7)
    os.mkdir(path)
    assert runs.path_of(str(tmp_path), "n_head=2 n_layer=1", dict(n_layer=1, n_head=2), 7) == path
    assert runs.path_of(str(tmp_path), "n_layer=1", dict(n_layer=1, n_head=2), 8) != path


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, capsys):
    """The run of a killed comparison, which still trains, is not started a second time."""
    write_run(tmp_path, FINISHED)
    held = files.lock(f"{tmp_path}/.lock")
    with mock.patch.object(subprocess, "Popen", no_run):
        assert runs.train(str(tmp_path), {}, 1, show=held.release) == (0, "")
    assert "another process trains" in capsys.readouterr().err


def test_a_run_that_another_process_starts_first_is_its_run(tmp_path):
    """If two comparisons start one run at the same time, the slower one takes the result of the other."""

    def start(command, **options):
        write_run(tmp_path, FINISHED)  # meanwhile, by the other process
        return SimpleNamespace(
            returncode=2, communicate=lambda timeout: ("", "error: another process trains it")
        )

    with mock.patch.object(subprocess, "Popen", start):
        assert runs.train(str(tmp_path), {}, 1) == (0, "")


@pytest.mark.parametrize(
    "what, error",
    [
        ("50 steps in a row were not finite; try another rate", "50 steps in a row were not finite"),
        ("the end is not saved; free disk space", "the end is not saved; free disk space"),
        (None, "failed"),
    ],
)
def test_the_error_of_a_row_is_that_of_the_run(what, error, tmp_path):
    """A row has the last error of its run with the remedy, but not the advice to change its settings."""
    write_run(tmp_path, dict(event="failed", what=what))
    assert row_of(tmp_path)["failed"] == error


@pytest.mark.parametrize("last, failed", [(3.0, ""), (None, "the last validation loss is not finite")])
def test_the_last_loss_must_be_finite(last, failed, tmp_path):
    """A run whose last validation loss is not finite has failed, even if an earlier one was finite."""
    write_run(tmp_path, FINISHED, [dict(step=4, val_loss=2.0), dict(step=8, val_loss=last)])
    row = row_of(tmp_path)
    assert (row["failed"], row["val_loss"]) == (failed, last)


@pytest.mark.parametrize("former", ["", '{"run": "other", "x": 1}\n{"half'])
def test_rows_of_other_runs_stay(former, tmp_path):
    """A new row replaces that of the same run, and keeps those of others; half a line is dropped."""
    path = tmp_path / "results.jsonl"
    path.write_text(former)
    for value in (1, 2):
        runs.save_rows(str(path), [dict(run="own", x=value)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[-1] == dict(run="own", x=2)
    assert rows[:-1] == [dict(run="other", x=1)] * bool(former)
