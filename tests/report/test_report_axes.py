from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.report.axes import Axis, linear_axis

numbers = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(numbers, numbers)
def test_axis_holds_its_values_with_few_even_ticks(first: float, second: float) -> None:
    low, high = sorted((first, second))
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return
    axis = linear_axis(low, high)
    assert axis.low <= low + 1e-6 * (axis.high - axis.low)
    assert axis.high >= high - 1e-6 * (axis.high - axis.low)
    assert 2 <= len(axis.ticks) <= 7
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert axis.percent(axis.low) == 0.0
    assert axis.percent(axis.high) == 100.0


def test_round_ends() -> None:
    assert linear_axis(0.0, 1.0).ticks == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert linear_axis(-0.61, 0.93).ticks == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert linear_axis(0.0, 0.0).ticks == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_values_beyond_the_axis_stay_at_its_end() -> None:
    axis = Axis(0.0, 10.0, (0.0, 10.0))
    assert [axis.percent(value) for value in (-5.0, 2.5, 1000.0)] == [0.0, 25.0, 100.0]


@pytest.mark.parametrize(
    ("tick", "label"),
    [(0.0, "0"), (0.25, "0.25"), (200.0, "200"), (15000.0, "15k"), (2.5e-4, "2.5e-4"), (1e-5, "1e-5")],
)
def test_labels_are_short(tick: float, label: str) -> None:
    assert Axis(0.0, 1.0, ()).label(tick) == label
    assert math.isclose(float(label.replace("k", "e3")), tick)
