from __future__ import annotations

import pytest

from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings
from sagittal.report.strips import MAX_HALF_HEIGHT_PX, Strip, make_strips

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


def test_rows_line_up_across_metrics_and_the_floor_belongs_to_dice() -> None:
    dice, distance = strips(evaluation((0.1, 5.0), (0.5, 5.0), (0.9, 5.0)), floor=0.66)
    assert [row.half_height_px for row in dice.rows] == [row.half_height_px for row in distance.rows]
    assert dice.floor_x == pytest.approx(66.0)
    assert distance.floor_x is None


def test_no_cases_give_empty_rows() -> None:
    dice, _ = strips(Evaluation.of_cases(CLASSES, [], settings=SETTINGS))
    assert [row.dots for row in dice.rows] == [(), ()]
    assert dice.alt.endswith("Means: none.")
