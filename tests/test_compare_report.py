"""nanobit/compare/report.py: what paired runs show, in numbers, words and a picture."""

import math
import statistics
from types import SimpleNamespace

import pytest

from nanobit.compare import report

FACTS = dict(cpu="a", threads=1, device="cpu", torch="2.13", commit="c", tokens_per_step=64)
FACTS |= dict(tokens_per_sec=10.0, seconds=6.4, failed="", twin=False)
LOSSES = dict(unchanged=[3.0, 3.2, 3.1], muon=[2.9, 3.05, 3.04])


def made_up(losses, **changes):
    """Return the rows of runs with these {variant: [losses]}, of seeds from 1."""
    facts = FACTS | changes
    return [
        facts | dict(variant=name, seed=seed, val_loss=loss, curve=[[0, 4.0], [8, loss]])
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def result_of(rows):
    """Return what compare.py reports of rows."""
    return dict(seeds=sorted({row["seed"] for row in rows})) | report.results(rows)


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
    result = result_of(rows)
    assert result["variants"][1]["seeds"] == 2
    assert result["variants"][1]["difference"] == pytest.approx(-0.08)
    assert "unchanged, seed 2 failed: error x" in report.notes(result)


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
    result = result_of(made_up(LOSSES | dict(muon=values)))
    assert f"muon: {says}" in report.notes(result)


def test_the_tables_are_aligned():
    """A table has the names at the left and the numbers below their headings; what is not known is a dash."""
    rows = made_up(LOSSES) + made_up(dict(unchanged=[2.8, 3.0, 2.9]), twin=True)
    assert report.tables(result_of(rows)) == [
        "variant                val_loss  difference   error     t  seeds  tokens/s  time",
        "unchanged                3.1000           -       -     -      3        10   6 s",
        "muon                     2.9967     -0.1033  0.0260  -4.0      3        10   6 s",
        "unchanged, float twin    2.9000           -       -     -      3        10   6 s",
        "",
        "ternary minus float  difference   error  seeds",
        "unchanged               +0.2000  0.0000      3",
    ]


def test_one_seed_has_no_error():
    """One seed gives a difference without an error, and the lines say so."""
    result = result_of(made_up(dict(unchanged=[3.0], muon=[2.9])))
    assert result["variants"][1]["error"] is result["variants"][1]["t"] is None
    assert "one pair gives no error" in report.notes(result)[0]


@pytest.mark.parametrize("n_seeds, is_said", [(2, True), (4, True), (5, False)])
def test_few_seeds_are_a_weak_test(n_seeds, is_said):
    """The lines say that an error from fewer than five seeds is itself uncertain."""
    losses = dict(unchanged=[3.0, 3.2, 3.1, 3.0, 3.3], muon=[2.9, 3.1, 3.0, 3.1, 3.2])
    rows = made_up({name: values[:n_seeds] for name, values in losses.items()})
    lines = report.notes(result_of(rows))
    assert any("fewer than five seeds" in line for line in lines) == is_said


def test_the_best_of_many_is_to_be_confirmed():
    """Several tries come with a warning that the best is biased, and with fresh seeds; one does not."""
    several = report.notes(result_of(made_up(LOSSES | dict(other=[3.0, 3.0, 3.0]))))
    assert "--seeds=4,5,6,7,8" in several[-1]
    assert "--seeds" not in "\n".join(report.notes(result_of(made_up(LOSSES))))


@pytest.mark.parametrize("key", ["cpu", "device", "torch", "commit"])
@pytest.mark.parametrize("is_twin", [False, True], ids=["variant", "twin"])
def test_runs_that_were_not_made_alike_come_with_a_warning(key, is_twin):
    """A pair that differs in its machine or code is named; pairs that agree are not."""
    rows = made_up(LOSSES)
    assert report.results(rows)["warnings"] == []
    if is_twin:
        rows = made_up(dict(unchanged=[3.0, 3.2])) + made_up(dict(unchanged=[2.8, 3.0]), twin=True)
    rows[-1][key] = 999
    result = result_of(rows)
    (warning,) = result["warnings"]
    assert warning.startswith(f"{key} of {rows[-1]['variant']} is ")
    assert warning.endswith(f"on seeds {rows[-1]['seed']}")
    assert f"warning: {warning}" in report.notes(result)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(total_batch_size=128), "x trains on 1,280 tokens, the unchanged config on 640"),
        (dict(total_batch_size=128, max_steps=5), ""),
        (dict(total_batch_size=96, max_steps=7), ""),  # 672 tokens: the nearest length that is not shorter
        (dict(seq_len=32), "seq_len of x is 32, that of the unchanged config 16"),
        (dict(dataset="b"), "dataset of x is b, that of the unchanged config a"),
        (dict(eval_tokens=9), "eval_tokens of x is 9, that of the unchanged config 640"),
        (dict(tokenize_on_fly=True), "tokenize_on_fly of x is True, that of the unchanged config False"),
        (dict(data_dir="c"), "data_dir of x is c, that of the unchanged config b"),
    ],
)
def test_losses_that_cannot_be_compared_come_with_a_warning(changes, says):
    """Other tokens, beyond the rest of a step, and other validation text are named before anything runs."""
    base = dict(max_steps=10, total_batch_size=64, data_dir="b", dataset="a", seq_len=16)
    base |= dict(eval_tokens=640, tokenize_on_fly=False)
    settings = dict(unchanged=SimpleNamespace(**base), x=SimpleNamespace(**base | changes))
    warnings = report.mismatched_settings(settings)
    assert [text.partition(":")[0] for text in warnings] == [says] * bool(says)


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
