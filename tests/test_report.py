"""nanobit/bench/report.py: what a plan warns of and recommends, and the units of its numbers."""

import re

import pytest
from plans import BASELINE, COST, COUNTS, bench, rows_of

from nanobit.bench import report


def test_a_plan_that_contradicts_itself_is_reported():
    """Speeds, tokens or a budget that do not agree are reported with both values."""
    plan = dict(plan=True, total_batch_size=32768, tokens_per_sec=20000, step_ms=250, steps="400000")
    found, out, _ = bench(BASELINE, **plan, total_tokens=10e9, budget_hours=144)
    speeds, tokens = found["warnings"]
    for text in ("20,000 tokens/s are 1.64 s a step and 182.0 hours", "over the budget of 144"):
        assert text in speeds
    assert "250 ms are 131,072 tokens/s and 27.8 hours" in speeds
    assert "the rows use step_ms" in speeds
    assert found["rows"][0]["hours"] == pytest.approx(27.8, abs=0.05)
    assert found["step_ms"] == 250
    assert "13,107,200,000" in tokens
    assert "305,176 steps" in tokens
    assert f"warning: {speeds}" in out
    again, *_ = bench("config/train_moe_500m.py", plan=True, step_ms=9, steps="400000", total_tokens=10e9)
    assert "total_tokens = 10,000,000,000 does not follow" in again["warnings"][0]
    # without the step time, the budget does not hold the run
    del plan["step_ms"]
    found, *_ = bench(BASELINE, **plan, budget_hours=144)
    assert found["rows"][0]["hours"] == pytest.approx(182.0, abs=0.05)
    assert "budget_hours = 144 does not hold 400,000 steps" in found["warnings"][0]
    assert found["recommendation"].startswith("none")
    assert found["rows"][0]["spare_hours"] < 0


@pytest.mark.parametrize(
    "steps, cost, chosen, why",
    [
        ([400_000, 5_000_000], {}, 400_000, "5,000,000 steps do not fit the budget"),
        ([400_000, 3_000_000], {}, 400_000, "would repeat the data 24.6 times"),
        ([3_000_000, 3_100_000], dict(dataset_tokens=0), 3_000_000, "buy only 0.00"),
        ([100_000, 400_000], {}, 400_000, "the longest of these lengths"),
        ([5_000_000], {}, None, "over the budget"),
        # without a budget, what a doubling of the hours buys decides
        ([20_000, 400_000, 16_000_000], dict(budget_hours=0, dataset_tokens=0), 400_000, "buy only"),
    ],
)
def test_the_recommendation_and_its_reason(steps, cost, chosen, why):
    """A length over the budget, or one that repeats the data too often, is not recommended, and the reason
    is the one that decided."""
    row, sentence = report.recommendation(rows_of(steps, **cost)[1], own=400_000)
    assert (row and row["steps"]) == chosen
    assert why in sentence


def test_unwise_lengths_are_reported():
    """Few tokens per parameter, many epochs and a long warm-up are reported."""
    cfg, rows = rows_of([2_000, 1_000_000, 4_000_000])
    few, *rest = sorted(report.cautions(cfg, COUNTS, rows, COST), key=lambda text: "parameter" not in text)
    assert "2,000 steps" in few
    assert "1,000,000" not in few
    assert sum("see the data" in text for text in rest) == 2
    assert "8.2 times: repetition begins" in "".join(rest)
    assert "32.8 times: most" in "".join(rest)
    assert any("warmup_steps = " in text for text in report.cautions(cfg, COUNTS, rows_of([5])[1], COST))
    assert "8 of" not in "".join(report.cautions(cfg, COUNTS, rows_of([400_000])[1], COST))


def test_a_small_plan_has_numbers():
    """Small numbers are printed in the unit in which they are not 0."""
    found, out, _ = bench(
        "config/train_simple.py", plan=True, step_ms=50, steps="100,4000", gpu_memory_gb=0.5
    )
    assert "76,800" in out
    assert "3.07M" in out
    assert " 55 MB" in out
    assert not re.search(r"\b0\.0+(B| GB)", out)
    assert [report.count(n) for n in (768, 3e8)] == ["768", "0.30B"]
    assert report.size(1.04) == "1.0 GB"
