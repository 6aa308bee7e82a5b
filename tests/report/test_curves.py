from __future__ import annotations

import math
from typing import Any

import pytest

from sagittal.report.curves import MAX_POINTS, Panel, training_panels


def step(number: int, loss: Any = 1.0, rate: Any = 0.1) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "learning_rate": rate, "seconds": 1.0}


def validation(number: int, mean: Any, **dice: Any) -> dict[str, Any]:
    return {"kind": "validation", "step": number, "dice": dice, "mean_dice": mean}


def panel(panels: tuple[Panel, ...], title: str) -> Panel:
    return next(item for item in panels if item.title == title)


def values(found: Panel, name: str) -> list[tuple[float, float]]:
    line = next(line for line in found.lines if line.name == name)
    width, height = found.x.high - found.x.low, found.y.high - found.y.low
    return [
        (round(found.x.low + x / 100 * width, 9), round(found.y.high - y / 100 * height, 9)) for x, y in line.points
    ]


def test_points_lie_where_the_records_say() -> None:
    panels = training_panels([step(1, 2.0, 0.4), step(2, -1.0, 0.2), validation(2, 0.5, a=0.4, b=0.6)])
    assert [item.title for item in panels] == ["Training loss", "Validation Dice", "Learning rate"]
    assert values(panel(panels, "Training loss"), "Loss") == [(1.0, 2.0), (2.0, -1.0)]
    assert values(panel(panels, "Learning rate"), "Learning rate") == [(1.0, 0.4), (2.0, 0.2)]
    dice = panel(panels, "Validation Dice")
    assert [values(dice, name) for name in ("a", "b", "Mean")] == [
        [(2.0, 0.4)],
        [(2.0, 0.6)],
        [(2.0, 0.5)],
    ]
    assert (dice.y.low, dice.y.high) == (0.0, 1.0)


def test_long_runs_are_averaged_and_the_band_keeps_their_range() -> None:
    losses = [3.0 if number % 7 == 0 else 1.0 for number in range(1, 5001)]
    found = panel(training_panels([step(n, loss) for n, loss in enumerate(losses, 1)]), "Training loss")
    (line,) = found.lines
    assert len(line.points) <= MAX_POINTS
    mean = sum(y for _, y in values(found, "Loss")) / len(line.points)
    assert mean == pytest.approx(sum(losses) / len(losses), rel=0.01)
    assert {round(found.y.percent(loss), 6) for loss in (1.0, 3.0)} == {round(100 - y, 6) for _, y in line.band}


def test_a_resumed_run_counts_its_last_record_of_a_step() -> None:
    found = panel(training_panels([step(1, 5.0), step(2, 4.0), step(2, 3.0), step(3, 2.0)]), "Training loss")
    assert values(found, "Loss") == [(1.0, 5.0), (2.0, 3.0), (3.0, 2.0)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_values_that_are_no_numbers_are_left_out(loss: Any) -> None:
    panels = training_panels([step(1, 2.0), step(2, loss), step(3, 1.0), validation(3, 0.5, a=None, b=0.5)])
    assert values(panel(panels, "Training loss"), "Loss") == [(1.0, 2.0), (3.0, 1.0)]
    assert values(panel(panels, "Validation Dice"), "a") == []


@pytest.mark.parametrize("records", [[], [{"kind": "note", "text": "x"}], [{"kind": "step"}], [step(1, None, None)]])
def test_nothing_to_show_gives_no_panel(records: list[dict[str, Any]]) -> None:
    assert training_panels(records) == ()


def test_alt_text_tells_the_end_and_the_best() -> None:
    records = [validation(10, 0.4), validation(20, 0.7), validation(30, 0.6)]
    (found,) = training_panels(records)
    assert found.alt == "Validation Dice at 3 checks: 0.600 at last, best 0.700 at step 20."
