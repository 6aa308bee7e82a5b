"""The learning rate: warm-up, decay, and what the clock does to it."""

from __future__ import annotations

import itertools

import pytest

from sagittal.plan.schedule import Schedule
from sagittal.training.schedules import rate_factor, shorten, validation_steps


def test_poly_decay_starts_at_one_and_follows_the_power() -> None:
    schedule = Schedule(steps=100, power=0.9)
    assert rate_factor(schedule, 0) == 1.0
    assert rate_factor(schedule, 50) == pytest.approx(0.5**0.9)
    assert 0 < rate_factor(schedule, 99) < 0.02


@pytest.mark.parametrize("first", [0.01, 0.0])
def test_warm_up_rises_evenly_from_its_start_to_the_peak(first: float) -> None:
    schedule = Schedule(steps=100, warmup_fraction=0.1, warmup_start_factor=first)
    factors = [rate_factor(schedule, step) for step in range(11)]
    # From nothing, the first step would teach nothing: it is one part of the way up.
    assert factors[0] == (first or pytest.approx(1 / 11))
    assert factors[-1] == 1.0
    rises = [after - before for before, after in itertools.pairwise(factors)]
    assert rises == pytest.approx([rises[0]] * 10)


def test_segformer3ds_warm_up_begins_at_4e_6_however_short_it_is() -> None:
    for steps in (100, 1000, 250_000):
        schedule = Schedule(steps=steps, warmup_fraction=0.02, warmup_start_factor=0.01)
        rates = [4e-4 * rate_factor(schedule, step) for step in (0, schedule.warmup_steps)]
        assert rates == pytest.approx([4e-6, 4e-4])


def test_the_rate_never_falls_below_its_floor() -> None:
    assert rate_factor(Schedule(steps=10, final_factor=0.2), 9) == 0.2


def test_enough_time_shortens_nothing() -> None:
    assert shorten(Schedule(steps=100), 10, None, left_s=90.0, step_s=1.0) is None


def test_too_little_time_decays_the_rate_to_zero_in_the_steps_that_fit() -> None:
    schedule = Schedule(steps=100)
    cut = shorten(schedule, 20, None, left_s=30.5, step_s=1.0)
    assert cut is not None
    assert (cut.start, cut.end) == (20, 50)
    assert rate_factor(schedule, 20, cut) == pytest.approx(rate_factor(schedule, 20))
    assert rate_factor(schedule, 35, cut) == pytest.approx(rate_factor(schedule, 60))
    assert rate_factor(schedule, 50, cut) == 0.0
    assert "30 of 80 steps fit" in cut.reason


def test_a_warm_up_that_is_cut_short_still_reaches_the_peak() -> None:
    schedule = Schedule(steps=1000, warmup_fraction=0.1)
    cut = shorten(schedule, 10, None, left_s=500.0, step_s=1.0)
    assert cut is not None
    assert max(rate_factor(schedule, step, cut) for step in range(cut.end)) > 0.99


def test_a_shortened_run_is_shortened_again_without_a_jump_of_the_rate() -> None:
    schedule = Schedule(steps=100)
    first = shorten(schedule, 20, None, left_s=30.0, step_s=1.0)
    second = shorten(schedule, 30, first, left_s=10.0, step_s=1.0)
    assert second is not None
    assert second.end == 40
    assert rate_factor(schedule, 30, second) == pytest.approx(rate_factor(schedule, 30, first))


def test_a_machine_that_is_free_again_gets_steps_back_but_never_more_than_planned() -> None:
    schedule = Schedule(steps=1000)
    busy = shorten(schedule, 20, None, left_s=490.0, step_s=1.0)
    assert busy is not None
    assert busy.end == 510
    free = shorten(schedule, 30, busy, left_s=480.0, step_s=0.5)
    assert free is not None
    assert 510 < free.end <= 1000
    assert rate_factor(schedule, 30, free) == pytest.approx(rate_factor(schedule, 30, busy))
    assert rate_factor(schedule, free.end, free) == 0.0
    factors = [rate_factor(schedule, step, free) for step in range(30, free.end)]
    assert factors == sorted(factors, reverse=True)


def test_small_changes_are_left_alone_except_near_the_end() -> None:
    schedule = Schedule(steps=1000)
    assert shorten(schedule, 100, None, left_s=895.0, step_s=1.0) is None
    last = shorten(schedule, 992, None, left_s=7.0, step_s=1.0)
    assert last is not None
    assert last.end == 999


def test_no_time_at_all_ends_at_once() -> None:
    cut = shorten(Schedule(steps=100), 20, None, left_s=-3.0, step_s=1.0)
    assert cut is not None
    assert cut.end == 20
    assert rate_factor(Schedule(steps=100), 20, cut) == 0.0


def test_validations_are_spread_and_leave_the_end_to_the_last_one() -> None:
    assert validation_steps(Schedule(steps=100, validations=4)) == {25, 50, 75}
    assert validation_steps(Schedule(steps=100, validations=0)) == frozenset()
    assert validation_steps(Schedule(steps=2, validations=20)) <= {1}
