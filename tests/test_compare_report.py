"""nanobit/compare/report.py: what paired runs show, in numbers, words and a picture."""

import math
import statistics

import pytest

from nanobit.compare import report

FACTS = dict(cpu="a", threads=1, device="cpu", torch="2.13", commit="c", tokens_per_step=64, steps=8)
FACTS |= dict(tokens_per_sec=10.0, seconds=6.4, settings={}, failed="", twin=False)
LOSSES = dict(unchanged=[3.0, 3.2, 3.1], muon=[2.9, 3.05, 3.04])


def made_up(losses, **changes):
    """Return the rows of runs with these {variant: [losses]}, of seeds from 1."""
    facts = FACTS | changes
    return [
        facts | dict(variant=name, seed=seed, val_loss=loss, curve=[[0, 4.0], [8, loss]])
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def test_the_statistics_are_those_of_paired_differences():
    """The difference is the mean over the seeds, its error that of a mean, t their ratio: by hand."""
    row = report.results(made_up(LOSSES))["variants"][1]
    # the differences are -0.1, -0.15 and -0.06; their squared deviations add up to 0.00406667
    assert row["difference"] == pytest.approx(-0.31 / 3)
    assert row["error"] == pytest.approx(math.sqrt(0.0040666667 / 2 / 3))
    assert row["t"] == pytest.approx(-3.96914, abs=1e-5)
    assert row["seeds"] == 3
    assert row["val_loss"] == pytest.approx(statistics.mean(LOSSES["muon"]))


def test_seeds_that_failed_on_one_side_are_not_paired():
    """A seed on which either run failed has no difference, and is named."""
    rows = made_up(LOSSES)
    rows[1]["failed"] = "error x"
    result = report.results(rows)
    assert result["variants"][1]["seeds"] == 2
    assert result["variants"][1]["difference"] == pytest.approx(-0.08)
    assert "unchanged, seed 2 failed: error x" in report.notes(result, [1, 2, 3])


@pytest.mark.parametrize(
    "values, says",
    [
        ([2.9, 3.1, 3.0], "lower by more than three standard errors (3 seeds)"),
        ([3.1, 3.3, 3.201], "higher by more than three standard errors (3 seeds)"),
        ([2.9, 3.05, 3.09], "within three standard errors: 3 seeds do not show a difference"),
        ([3.0, 3.2, 3.1], "exactly the same losses on all 3 seeds"),
    ],
)
def test_a_verdict_names_the_errors_and_the_seeds(values, says):
    """A difference within three standard errors is plainly called so, with the number of seeds."""
    result = report.results(made_up(LOSSES | dict(muon=values)))
    assert f"muon: {says}" in report.notes(result, [1, 2, 3])


def test_one_seed_has_no_error():
    """One seed gives a difference without an error, and the lines say so."""
    result = report.results(made_up(dict(unchanged=[3.0], muon=[2.9])))
    assert result["variants"][1]["error"] is result["variants"][1]["t"] is None
    assert "one pair gives no error" in report.notes(result, [1])[0]


@pytest.mark.parametrize("n_seeds, is_said", [(2, True), (4, True), (5, False)])
def test_few_seeds_are_a_weak_test(n_seeds, is_said):
    """The lines say that an error from fewer than five seeds is itself uncertain."""
    losses = dict(unchanged=[3.0, 3.2, 3.1, 3.0, 3.3], muon=[2.9, 3.1, 3.0, 3.1, 3.2])
    rows = made_up({name: values[:n_seeds] for name, values in losses.items()})
    lines = report.notes(report.results(rows), list(range(n_seeds)))
    assert any("fewer than five seeds" in line for line in lines) == is_said


def test_the_best_of_many_is_to_be_confirmed():
    """Several tries come with a warning that the best is biased, and with fresh seeds; one does not."""
    several = report.notes(report.results(made_up(LOSSES | dict(other=[3.0, 3.0, 3.0]))), [1, 2, 3])
    assert "--seeds=4,5,6,7,8" in several[-1]
    assert "--seeds" not in "\n".join(report.notes(report.results(made_up(LOSSES)), [1, 2, 3]))


@pytest.mark.parametrize("key", ["cpu", "threads", "device", "torch", "commit", "steps"])
@pytest.mark.parametrize("is_twin", [False, True], ids=["variant", "twin"])
def test_runs_that_were_not_made_alike_come_with_a_warning(key, is_twin):
    """A pair that differs in its machine, code or tokens is named; pairs that agree are not."""
    rows = made_up(LOSSES)
    assert report.results(rows)["warnings"] == []
    if is_twin:
        rows = made_up(dict(unchanged=[3.0, 3.2])) + made_up(dict(unchanged=[2.8, 3.0]), twin=True)
    rows[-1][key] = 999
    result = report.results(rows)
    (warning,) = result["warnings"]
    name = dict(steps="tokens").get(key, key)
    assert warning.startswith(f"{name} of {rows[-1]['variant']} is ")
    assert warning.endswith(f"on seeds {rows[-1]['seed']}")
    assert f"warning: {warning}" in report.notes(result, [1, 2, 3])


def test_other_validation_text_comes_with_a_warning():
    """Losses on other windows are paired with a warning, one for all seeds."""
    rows = made_up(LOSSES)
    for row in rows[3:]:
        row["settings"] = dict(seq_len=32)
    (warning,) = report.results(rows)["warnings"]
    assert warning == "seq_len of muon is 32, but that of unchanged is the default, on seeds 1,2,3"


def test_the_picture_shows_the_mean_of_the_paired_differences(tmp_path, monkeypatch):
    """A curve is the mean difference over the seeds at equal tokens; a variant that failed has none."""
    rows = made_up(LOSSES | dict(lost=[3.0, 3.0, 3.0]))
    for row in rows[3:6]:
        row |= dict(tokens_per_step=32, curve=[[2 * step, loss] for step, loss in row["curve"]])
    for row in rows[6:]:
        row["failed"] = "error"
    figures = []
    monkeypatch.setattr(report.plots, "write", lambda figure, path: figures.append(figure))
    report.draw(rows, "x.png")
    (ax,) = figures[0].axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["muon"]
    assert ax.lines[1].get_xdata().tolist() == [0, 8]
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([0, -0.31 / 3])
    monkeypatch.undo()
    report.draw(rows, f"{tmp_path}/x.png")
    with open(f"{tmp_path}/x.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
