"""bench.py: the plan that it prints, and the flags that it refuses."""

import json
import os
import re
import shlex
import sys

import pytest
from conftest import ROOT, run
from plans import BASELINE, TINY, bench

import config


def test_the_baseline_takes_what_its_plan_says():
    """Hours, tokens and epochs of a plan follow from steps x batch; a speed that is given is not timed."""
    found, out, _ = bench(BASELINE, plan=True, step_ms=695, steps="400000", dataset_tokens=10e9)
    row = found["rows"][0]
    assert row["hours"] == pytest.approx(77.2, abs=0.05)
    assert row["tokens"] == 3_276_800_000
    assert row["tokens_per_param"] == pytest.approx(34.4, abs=0.05)
    assert row["epochs"] == pytest.approx(0.33, abs=0.005)
    assert row["hours"] < row["hours_total"] < 1.05 * row["hours"]
    assert found["params"] == 95_367_936
    assert "first step" not in out
    assert "device" not in found
    assert [each["steps"] for each in found["milestones"]] == list(range(50_000, 400_001, 50_000))
    assert [each["what"] for each in found["milestones"]][3] == "stage boundary"
    assert not found["warnings"]
    # the same by throughput
    again, *_ = bench(BASELINE, plan=True, tokens_per_sec=8192 / 0.695, steps="400000", dataset_tokens=10e9)
    assert again["rows"][0]["hours"] == pytest.approx(row["hours"])


def test_the_page_on_cost_is_what_the_planner_says():
    """The numbers of docs/cost.md are those that its commands print."""
    page = open(os.path.join(ROOT, "docs", "cost.md"), encoding="utf-8").read()
    first, second = (shlex.split(block) for block in re.findall(r"```bash\npython (.*)\n```", page))
    rows = run(*first)[0]
    for each in json.loads(rows.strip().split("\n")[-1])["rows"]:
        shown = [f"{each['steps']:,}", f"{each['tokens'] / 1e9:.2f}B", f"{each['tokens_per_param']:.1f}"]
        shown += [f"{each['epochs']:.2f}", f"{each['hours']:.1f}", f"{each['hours_total']:.1f}"]
        shown += [f"{each['checkpoint_gb'] + each['log_gb']:.1f} GB", f"{each['expected_loss']:.2f}"]
        assert f"| {' | '.join(shown)} | {each['price']:.2f} |" in page
    assert "182.0 hours" in run(*second)[0]


def test_a_terminal_gets_no_json(monkeypatch, capsys):
    """On a terminal the line of JSON is printed only with --json."""
    how = [BASELINE, "--plan", "--step_ms=695", "--steps=400000"]
    for flags, has_json in (([], False), (["--json"], True)):
        monkeypatch.setattr(sys, "argv", ["bench.py", *how, *flags])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        import bench as script

        script.main(config.load(sys.argv[1:], flags=script.FLAGS, derive=script.derive))
        assert ('{"params"' in capsys.readouterr().out) is has_json


def test_bench_wants_an_experiment_as_training_does():
    """Without a config file bench.py exits with 2, as train.py does."""
    _, _, err = bench(code=2, vocab_size=64)
    assert "has no length; name a config file" in err


@pytest.mark.parametrize(
    "values, says",
    [
        (dict(plan=True, steps="many"), "steps = 'many' is not numbers"),
        (dict(plan=True, steps="0,5"), "must each be from 1"),
        (dict(plan=True, steps=1e12), "must each be from 1 to 1,000,000,000"),
        (dict(budget_hours=3), "--budget_hours only applies together with --plan"),
        (dict(peers="x"), "--peers only applies together with --compare"),
        (dict(compare=True, vocab_size=60000), "has 50304 tokens"),
        (dict(plan=True, watts=-1), "watts = -1.0 must be at least 0"),
        (dict(plan=True, watts=100), "--watts only applies together with --price_per_kwh"),
        (dict(plan=True, step_ms=5, calibrate="nowhere"), "calibrate = 'nowhere' is not a finished run"),
        (dict(compare=True, peers="nowhere"), "nowhere/nanoGPT/model.py does not exist"),
        (dict(sample=True, head="float16"), "choose one of float32, bfloat16"),
        (dict(sample=True, plan=True), "--plan and --sample exclude each other"),
        (dict(vocab_size=0, data_dir="nowhere"), "set --vocab_size="),
    ],
)
def test_wrong_flags_are_refused(values, says):
    """A flag with a wrong value, or without the flag it belongs to, exits with 2 and names the remedy."""
    _, _, err = bench(**TINY | dict(max_steps=10) | values, code=2)
    assert says in err
