"""The schedules: rates at points computed by hand, the stages, and what is due at a step."""

import math

import pytest
from conftest import settings

import config
from nanobit import schedule

BASE = dict(
    max_steps=1000,
    warmup_steps=10,
    learning_rate=1.0,
    stage2_lr_ratio=0.5,
    min_lr_ratio=0.1,
    weight_decay=0.1,
)


@pytest.mark.parametrize(
    "name, points",
    [
        # two lines that meet at the boundary; the update after step 500 is the first of stage 2
        ("two_stage", {10: 1.0, 255: 0.75, 500: 0.5, 750: 0.3, 1000: 0.1}),
        # E + (P - E)(1 - t/T): a drop at the boundary from 0.55 to 0.3
        ("bitnet", {10: 0.1 + 0.9 * 0.99, 499: 0.1 + 0.9 * 0.501, 500: 0.1 + 0.4 * 0.5, 1000: 0.1}),
        ("wsd", {10: 1.0, 669: 1.0, 670: 1.0, 835: 0.55, 1000: 0.1}),
        ("cosine", {10: 1.0, 505: 0.55, 1000: 0.1}),
        ("linear", {10: 1.0, 505: 0.55, 1000: 0.1}),
        ("constant", {10: 1.0, 999: 1.0}),
    ],
)
def test_schedules_hit_their_points(name, points):
    """A schedule has its rates at the end of the warm-up, at the boundary, between them and at the end."""
    cfg = settings(schedule=name, **BASE)
    assert {step: schedule.lr(cfg, step) for step in points} == pytest.approx(points)


@pytest.mark.parametrize("name", config.CHOICES["schedule"])
def test_the_first_update_is_not_lost(name):
    """The warm-up begins at learning_rate / warmup_steps, not at zero, and its last update has the peak."""
    cfg = settings(schedule=name, **BASE)
    assert schedule.lr(cfg, 0) == pytest.approx(0.1)
    assert schedule.lr(cfg, 9) == pytest.approx(1.0)


@pytest.mark.parametrize("name", config.CHOICES["schedule"])
def test_the_whole_schedule_scales_with_the_learning_rate(name):
    """All rates, those of stage 2 and of the end too, are proportional to learning_rate."""
    rates = []
    for peak in (0.0, 1.0, 2.0):
        cfg = settings(schedule=name, **BASE | dict(learning_rate=peak))
        rates.append([schedule.lr(cfg, step) for step in range(1000)])
    assert not any(rates[0])
    assert rates[2] == [2 * rate for rate in rates[1]]


def test_weight_decay_ends_with_stage_1():
    """Weight decay, stage and kept checkpoints change at the boundary, to the step."""
    cfg = settings(schedule="two_stage", **BASE)
    assert [schedule.weight_decay(cfg, step) for step in (0, 499, 500, 999)] == [0.1, 0.1, 0.0, 0.0]
    assert [schedule.stage(cfg, step) for step in (499, 500)] == [1, 2]
    assert schedule.boundary_steps(cfg) == {499, 500}


def test_a_schedule_of_one_stage_keeps_its_weight_decay():
    """A schedule of one stage stays in stage 1, with weight_decay, and has no boundary."""
    cfg = settings(schedule="cosine", **BASE)
    assert schedule.weight_decay(cfg, 999) == 0.1
    assert schedule.stage(cfg, 999) == 1
    assert schedule.boundary_steps(cfg) == set()


@pytest.mark.parametrize("name", config.CHOICES["schedule"])
def test_warm_up_may_exceed_the_run(name):
    """A short trial of a long recipe stays in the warm-up."""
    cfg = settings(schedule=name, **BASE | dict(max_steps=5, warmup_steps=20))
    assert [schedule.lr(cfg, step) for step in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])


@pytest.mark.parametrize("name", config.CHOICES["schedule"])
def test_a_run_may_have_one_step(name):
    """A run of one step divides by nothing."""
    cfg = settings(schedule=name, **BASE | dict(max_steps=1))
    assert all(math.isfinite(schedule.lr(cfg, step)) for step in (0, 1))


def test_warm_up_may_pass_the_boundary():
    """A line of the schedule starts where a long warm-up ends, and no rate is above the peak."""
    cfg = settings(schedule="two_stage", **BASE | dict(warmup_steps=600))
    assert schedule.lr(cfg, 599) == 1.0
    assert schedule.lr(cfg, 600) == 0.5
    assert schedule.lr(cfg, 800) == pytest.approx(0.3)


def test_warm_up_may_pass_the_beginning_of_the_decay():
    """The decay of wsd starts where a long warm-up ends."""
    cfg = settings(schedule="wsd", **BASE | dict(warmup_steps=800))
    assert schedule.lr(cfg, 799) == 1.0
    assert schedule.lr(cfg, 900) == pytest.approx(0.55)


EVERY = dict(max_steps=24, save_every=5, eval_every=6, sample_every=12)
NEVER = dict(max_steps=24, save_every=0, eval_every=0, sample_every=0)


@pytest.mark.parametrize(
    "task, changes, steps",
    [
        ("save", EVERY | dict(schedule="linear"), [5, 10, 15, 20, 24]),
        ("save", EVERY | dict(schedule="two_stage"), [5, 10, 11, 12, 15, 20, 24]),
        ("save", NEVER | dict(schedule="linear"), [24]),
        ("save", NEVER | dict(schedule="two_stage"), [11, 12, 24]),
        ("eval", EVERY, [0, 6, 12, 18, 24]),
        ("eval", NEVER, []),
        ("sample", EVERY, [12, 24]),
        ("sample", NEVER, []),
    ],
)
def test_what_is_due(task, changes, steps):
    """Each task is due at the multiples of its setting: a save also at the end and at both steps of the
    boundary, and only an evaluation at step 0."""
    cfg = settings(stage_boundary=0.5, **changes)
    assert [step for step in range(25) if schedule.due(task, cfg, step)] == steps


@pytest.mark.parametrize(
    "step, max_minutes, seconds, reason",
    [
        (0, 0.0, 0.0, ""),
        (23, 0.0, 1e9, ""),
        (24, 0.0, 0.0, "max_steps"),
        (25, 0.0, 0.0, "max_steps"),
        (0, 1.0, 60.0, ""),
        (0, 1.0, 60.1, "max_minutes"),
        (24, 1.0, 60.1, "max_steps"),
    ],
)
def test_what_ends_a_run(step, max_minutes, seconds, reason):
    """A run ends at max_steps, or after max_minutes if that is not 0."""
    assert schedule.ending(settings(max_steps=24, max_minutes=max_minutes), step, seconds) == reason


def test_what_is_forced_is_due_at_any_step_unless_it_is_off():
    """The end of a run, or a repeated evaluation, forces what is due; a setting of 0 keeps it off."""
    cfg = settings(schedule="constant", eval_every=7, sample_every=0, **BASE)
    assert not schedule.due("eval", cfg, 3)
    assert schedule.due("eval", cfg, 3, "max_steps")
    assert not schedule.due("sample", cfg, 3, "max_steps")
