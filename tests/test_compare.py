"""compare.py: paired runs, found again by their settings, and what their differences show."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from unittest import mock

import faults
import pytest
from comparisons import NULL, Forked, arguments, call, compared, folders, no_run
from conftest import ROOT, lines, result_of, write_data
from fork import Script

import compare
from nanobit import files
from nanobit.compare import runs
from nanobit.run_dir import steps

DIVERGING, BREAKING = "learning_rate=1e30", "init_from=nowhere"


def without_clock(result):
    """Return the variants of a result without their times."""
    clocked = {"tokens_per_sec", "seconds"}
    return [{key: row[key] for key in row.keys() - clocked} for row in result["variants"]]


def rows_of(out_dir):
    """Return {(variant, twin): row} of results.jsonl."""
    return {(row["variant"], row["twin"]): row for row in lines(f"{out_dir}/compare/c", "results.jsonl")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (data_dir, out_dir, stdout) of a comparison of three variants: nothing that matters differs in
    one, one diverges, and one breaks."""
    folder = tmp_path_factory.mktemp("made")
    where = write_data(folder / "data"), str(folder / "runs")
    code, out, err = call(*arguments(*where, NULL, DIVERGING, BREAKING))
    assert code == 0, err
    return *where, out


@pytest.fixture
def again(made, out_dir):
    """Return (data_dir, out_dir) with a copy of those runs."""
    shutil.copytree(made[1], out_dir)
    return made[0], out_dir


def test_a_null_comparison_is_exactly_zero(made):
    """Two runs of the same settings under two names differ by exactly 0.0, at each evaluation."""
    _, null, *_ = result_of(made[2])["variants"]
    rows = rows_of(made[1])
    one, other = (rows[name, False] for name in ("unchanged", NULL))
    assert null["difference"] == 0.0
    assert one["curve"] == other["curve"]
    assert [step for step, _ in one["curve"]] == [0, 4, 8]
    assert one["run"] != other["run"]
    assert all(steps(f"{made[1]}/compare/c/{row['run']}")[0] == 8 for row in (one, other))


@pytest.mark.parametrize(
    "name, says", [(DIVERGING, "steps in a row were not finite"), (BREAKING, "nowhere")], ids=["nan", "error"]
)
def test_a_run_that_fails_is_a_row(made, name, says):
    """A variant that diverges or breaks is a row with its last error, and the others have theirs."""
    row = next(row for row in result_of(made[2])["variants"] if row["variant"] == name)
    assert row["val_loss"] is row["difference"] is None
    assert says in row["failed"]["1"]
    (line,) = [line for line in made[2].splitlines() if line.startswith(f"{name}, seed 1 failed: ")]
    assert says in line
    assert "--resume" not in row["failed"]["1"]  # with other settings, which would make it another variant


def test_ended_runs_are_not_repeated(again):
    """The same command, without what broke, trains nothing and gives the same result."""
    before = rows_of(again[1])
    result = compared(*again, NULL, DIVERGING, popen=no_run)
    assert without_clock(result)[1]["difference"] == 0.0
    assert rows_of(again[1]) == before


def test_the_float_twins_give_gaps(again):
    """With --twin only the twins are trained, and the gap is the loss of a variant minus that of its twin."""
    result = compared(*again, NULL, twin=True)
    rows = rows_of(again[1])
    gap = rows["unchanged", False]["val_loss"] - rows["unchanged", True]["val_loss"]
    assert [row["variant"] for row in result["gaps"]] == ["unchanged", NULL]
    assert result["gaps"][0]["difference"] == gap != 0
    assert result["variants"][3]["difference"] == 0.0
    with open(f"{again[1]}/compare/c/{rows[NULL, True]['run']}/config.json") as file:
        assert json.load(file)["settings"]["ternary"]["value"] is False


def test_killed_and_run_again_it_gives_the_same_table(made, data_dir, out_dir):
    """A comparison killed in the middle of a run continues it, and gives the table of an unbroken one."""
    argv = arguments(data_dir, out_dir, NULL)
    child = Script(os.path.join(ROOT, "compare.py"), argv, ROOT, faults.forked_runs(0.1))
    deadline = time.time() + 60
    while not (started := [path for path in folders(out_dir) if NULL in path and runs.last_step(path) >= 4]):
        assert not child.ended() and time.time() < deadline, child.output()
        time.sleep(0.02)
    child.kill(signal.SIGKILL)
    pid = files.read_json(f"{started[0]}/config.json")["pid"]
    os.kill(pid, signal.SIGKILL)
    child.wait(10)
    result = compared(data_dir, out_dir, NULL)
    assert without_clock(result) == without_clock(result_of(made[2]))[:2]
    events = [row["event"] for row in lines(started[0], "metrics/events.jsonl")]
    assert "resume" in events
    assert "finish" not in events[: events.index("resume")]


class Interrupted(Forked):
    """A run during which this process gets Ctrl-C, once it has made two steps."""

    patch = faults.slow_updates(0.1)
    is_sent = False

    def communicate(self, timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return super().communicate(0.05)
        if not self.is_sent and runs.last_step(self.path) >= 2:
            self.is_sent = True
            os.kill(os.getpid(), signal.SIGINT)
        raise subprocess.TimeoutExpired("train.py", timeout)


def test_ctrl_c_saves_the_run_and_says_how_to_continue(data_dir, out_dir):
    """A signal reaches the run, which saves; compare.py prints its command and exits with 128 + signal."""
    code, out, err = call(*arguments(data_dir, out_dir, NULL), popen=Interrupted)
    assert code == 128 + signal.SIGINT
    assert "to continue: " in err
    assert f"--try={NULL}" in err
    assert out == ""
    (path,) = folders(out_dir)
    assert lines(path, "metrics/events.jsonl")[-1]["event"] == "interrupt"
    assert 2 <= steps(path)[0] < 8


def test_another_default_is_another_run(made):
    """A run is found by all that it depends on: with an edited default.py no former run is found."""
    row = rows_of(made[1])["unchanged", False]
    folder = f"{made[1]}/compare/c"
    assert runs.path_of(folder, "unchanged", row["settings"], 1) == os.path.join(folder, row["run"])
    for name in runs.DEFAULTS.keys() - {"run_id", "out_dir", "resume", "total_tokens"}:
        edited = {name: "another"} if name in row["settings"] else {}
        path = runs.path_of(folder, "unchanged", row["settings"] | edited, 1)
        assert os.path.exists(path) == (name in ("seed", "patience", "max_minutes")), name


def test_minutes_become_one_number_of_tokens(data_dir, out_dir):
    """--minutes is timed once, on the unchanged config; all variants train for the tokens of its steps."""
    argv = arguments(data_dir, out_dir, "learning_rate=1", "batch_size=2 total_batch_size=32", minutes=0.02)
    argv = [arg for arg in argv if not arg.startswith("--max_steps")]
    lengths = []
    for popen in (Forked, no_run):
        with mock.patch.object(compare, "run_all", side_effect=SystemExit(0)) as run_all:
            assert call(*argv, popen=popen)[0] == 0
        lengths.append([variant.cfg.max_steps for variant in run_all.call_args[0][1]])
    first, second, third = lengths[0]
    assert lengths[0] == lengths[1]
    assert first == second
    assert third == 2 * first
    (path,) = folders(out_dir)
    times = [row["step_ms"] for row in lines(path, "metrics/scalars.jsonl") if row.get("step_ms")]
    assert first == round(1200 / statistics.median(times))


def test_a_fault_of_the_unchanged_config_ends_the_comparison(data_dir, out_dir):
    """If train.py refuses the unchanged config, no variant is tried: exit code 2 with its words."""
    code, _, err = call(*arguments(data_dir, out_dir, NULL, dataset="nowhere"))
    assert code == 2
    assert "nowhere" in err
    assert folders(out_dir) == []


def test_nothing_can_be_compared_with_a_config_that_diverges(data_dir, out_dir):
    """If the unchanged config never finishes, the table is printed, and the exit code is 1."""
    code, out, _ = call(*arguments(data_dir, out_dir, NULL, learning_rate=1e30))
    assert code == 1
    assert [row["seeds"] for row in result_of(out)["variants"]] == [0, 0]


def test_each_seed_is_trained_for_all_variants_before_the_next(data_dir, out_dir):
    """A comparison that is stopped early has whole pairs."""
    argv = arguments(data_dir, out_dir, NULL, seeds="5,3")
    with mock.patch.object(runs, "train", return_value=(1, "x")) as train:
        call(*argv)
    trained = [(seed, NULL in path) for path, _, seed, _ in (asked.args for asked in train.call_args_list)]
    assert trained == [(5, False), (5, True), (3, False), (3, True)]


def test_a_row_holds_the_run_and_its_machine(made):
    """A row has what the run wrote about its end, its processor and its code."""
    row = rows_of(made[1])["unchanged", False]
    path = f"{made[1]}/compare/c/{row['run']}"
    with open(f"{path}/config.json") as file:
        content = json.load(file)
    end = lines(path, "metrics/events.jsonl")[-1]["result"]
    assert (row["seed"], row["steps"], row["val_loss"]) == (1, 8, end["val_loss"])
    assert (row["cpu"], row["threads"], row["torch"]) == (content["cpu"], 1, content["versions"]["torch"])
    assert row["commit"] == content["git_commit"]
    assert row["cpu"]
    other = rows_of(made[1])[NULL, False]  # a line stands for two steps
    logged = [
        row for row in lines(f"{made[1]}/compare/c/{other['run']}", "metrics/scalars.jsonl") if "loss" in row
    ]
    assert other["seconds"] == pytest.approx(sum(2e-3 * row["step_ms"] for row in logged))
    assert row["settings"]["n_embd"] == 32
