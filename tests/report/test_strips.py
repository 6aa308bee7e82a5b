from __future__ import annotations

import pytest

from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings
from sagittal.report.strips import MAX_HALF_HEIGHT_PX, PLAIN_DOTS, Strip, make_strips

CLASSES = ClassSet.of_mapping({"a": 1, "b": 2})
SETTINGS = EvaluationSettings(metrics=("dice", "hd95_mm"))


def evaluation(*scores: tuple[float | None, float | None], outcome: str = "present") -> Evaluation:
    """Cases named 0, 1, ... of which class a has the given Dice and HD95, and class b is perfect."""
    volumes = {"present": (1.0, 1.0), "missed": (1.0, 0.0), "false_alarm": (0.0, 1.0)}
    perfect = ClassScore(reference_ml=1.0, prediction_ml=1.0, metrics={"dice": 1.0, "hd95_mm": 0.0})
    cases = []
    for number, (dice, distance) in enumerate(scores):
        reference_ml, prediction_ml = volumes[outcome if number == 0 else "present"]
        metrics = {"dice": dice, "hd95_mm": distance}
        score = ClassScore(reference_ml=reference_ml, prediction_ml=prediction_ml, metrics=metrics)
        cases.append(
            CaseScore(case=str(number), shape=(2, 3, 4), spacing_mm=(1.0, 1.0, 1.0), classes={"a": score, "b": perfect})
        )
    return Evaluation.of_cases(CLASSES, cases, settings=SETTINGS)


def strips(found: Evaluation, floor: float | None = None) -> tuple[Strip, Strip]:
    dice, distance = make_strips(found, floor=floor)
    assert (dice.key, distance.key) == ("dice", "hd95_mm")
    return dice, distance


def test_every_case_is_a_dot_at_its_value() -> None:
    dice, distance = strips(evaluation((0.2, 3.0), (0.9, 1.0)))
    assert [(dot.x, dot.title) for dot in dice.rows[0].dots] == [(20.0, "0: 0.200"), (90.0, "1: 0.900")]
    assert [dot.title for dot in distance.rows[0].dots] == ["1: 1.00 mm", "0: 3.00 mm"]
    assert dice.rows[0].mean_x == pytest.approx(55.0)


def test_equal_values_are_stacked_and_none_is_hidden() -> None:
    dice, _ = strips(evaluation(*[(0.8, 1.0)] * 40))
    dots = dice.rows[0].dots
    assert len({(dot.x, dot.y) for dot in dots}) == 40
    assert max(abs(dot.y) for dot in dots) <= MAX_HALF_HEIGHT_PX + 1e-9
    assert dice.rows[0].half_height_px > max(abs(dot.y) for dot in dots)


@pytest.mark.parametrize(("outcome", "remark"), [("missed", "missed"), ("false_alarm", "false alarm")])
def test_a_penalty_does_not_press_the_others_against_zero(outcome: str, remark: str) -> None:
    scores = [(0.0, 300.0), *[(0.9, 2.0)] * 99]
    _, distance = strips(evaluation(*scores, outcome=outcome))
    assert distance.axis.high < 10
    penalty = distance.rows[0].dots[-1]
    assert (penalty.x, penalty.empty, penalty.title) == (100.0, True, f"0: 300.00 mm, {remark}")
    assert sum(dot.empty for dot in distance.rows[0].dots) == 1


def test_undefined_cases_have_no_dot() -> None:
    dice, distance = strips(evaluation((None, None), (0.5, 1.0)))
    assert [len(dice.rows[0].dots), len(distance.rows[0].dots), len(dice.rows[1].dots)] == [1, 1, 2]


def test_a_mean_that_penalties_pull_off_the_axis_is_told_not_drawn() -> None:
    _, distance = strips(evaluation((0.0, 300.0), (0.9, 2.0), (0.9, 3.0), outcome="missed"))
    assert distance.rows[0].mean == pytest.approx(305 / 3)
    assert distance.rows[0].mean_x is None
    assert distance.rows[1].mean_x == 0.0


def test_the_interval_of_a_mean_is_drawn_around_it() -> None:
    found = evaluation((0.2, 3.0), (0.9, 1.0), (0.7, 1.0))
    row = strips(found)[0].rows[0]
    summary = found.summary.classes["a"].metrics["dice"]
    assert row.interval_x == pytest.approx((100 * summary.low, 100 * summary.high))
    assert row.interval_x[0] < row.mean_x < row.interval_x[1]
    assert strips(evaluation((0.2, 3.0)))[0].rows[0].interval_x is None


def test_thousands_of_cases_are_one_path_that_holds_them_all() -> None:
    row = strips(evaluation((0.0, 9.0), *[(0.9, 2.0)] * PLAIN_DOTS, outcome="missed"))[0].rows[0]
    assert row.compact
    assert row.path(empty=False).count("M") == PLAIN_DOTS
    assert row.path(empty=True) == f"M0 {row.half_height_px:.4g}h0"
    assert not strips(evaluation(*[(0.9, 2.0)] * PLAIN_DOTS))[0].rows[0].compact


def test_signed_errors_have_an_axis_to_both_sides_of_zero() -> None:
    settings = EvaluationSettings(metrics=("volume_error_ml", "volume_error_percent"))
    cases = []
    for number, error in enumerate((-3.0, 8.0)):
        metrics = {"volume_error_ml": error, "volume_error_percent": error * 10}
        score = ClassScore(reference_ml=10.0, prediction_ml=10.0 + error, metrics=metrics)
        spacing, both = (1.0, 1.0, 1.0), {"a": score, "b": score}
        cases.append(CaseScore(case=str(number), shape=(2, 3, 4), spacing_mm=spacing, classes=both))
    (percent,) = make_strips(Evaluation.of_cases(CLASSES, cases, settings=settings))
    assert percent.key == "volume_error_percent"
    assert percent.axis.low <= -30 < 80 <= percent.axis.high
    assert "a: mean 25.0 %, from -30.0 to 80.0 in 2 cases" in percent.alt


def test_rows_line_up_across_metrics_and_the_floor_belongs_to_dice() -> None:
    dice, distance = strips(evaluation((0.1, 5.0), (0.5, 5.0), (0.9, 5.0)), floor=0.66)
    assert [row.half_height_px for row in dice.rows] == [row.half_height_px for row in distance.rows]
    assert dice.floor_x == pytest.approx(66.0)
    assert distance.floor_x is None


def test_no_cases_give_empty_rows() -> None:
    dice, _ = strips(Evaluation.of_cases(CLASSES, [], settings=SETTINGS))
    assert [row.dots for row in dice.rows] == [(), ()]
    assert dice.alt == "Dice of every case by class. Nothing is defined."
