"""Bland and Altman's plot: every case at its place, the bias and the limits of agreement."""

from __future__ import annotations

import math

import pytest

from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings
from sagittal.report.strips import PLAIN_DOTS
from sagittal.report.volume_plot import VolumePanel, make_volume_panels

CLASSES = ClassSet.of_mapping({"a": 1, "b": 2})


def panels(*volumes: tuple[float, float]) -> tuple[VolumePanel, ...]:
    """Cases named 0, 1, ... whose class a has these volumes of reference and prediction; class b is nowhere."""
    cases = []
    absent = ClassScore(reference_ml=0.0, prediction_ml=0.0, metrics={"dice": None})
    for number, (reference, prediction) in enumerate(volumes):
        score = ClassScore(reference_ml=reference, prediction_ml=prediction, metrics={"dice": 0.5})
        spacing = (1.0, 1.0, 1.0)
        cases.append(
            CaseScore(case=str(number), shape=(2, 3, 4), spacing_mm=spacing, classes={"a": score, "b": absent})
        )
    settings = EvaluationSettings(metrics=("dice",))
    return make_volume_panels(Evaluation.of_cases(CLASSES, cases, settings=settings))


def test_bias_and_limits_are_those_of_the_differences() -> None:
    (panel,) = panels((10.0, 11.0), (20.0, 23.0), (30.0, 32.0))
    assert panel.name == "a"
    assert panel.bias_ml == pytest.approx(2.0)
    assert panel.limits_ml == pytest.approx((2.0 - 1.96, 2.0 + 1.96))
    for dot, (mean, difference) in zip(panel.dots, ((10.5, 1.0), (21.5, 3.0), (31.0, 2.0)), strict=True):
        assert dot.x == pytest.approx(panel.x.percent(mean))
        assert dot.y == pytest.approx(100 - panel.y.percent(difference))
    assert panel.dots[0].title == "0: reference 10 mL, prediction 11 mL"
    assert panel.alt == (
        "Volume of a in 3 cases: predictions are 2 mL too large on average, and 95 % of the differences are expected "
        "between 0.04 and 3.96 mL."
    )


def test_misses_and_false_alarms_are_hollow_and_absent_cases_are_left_out() -> None:
    (panel,) = panels((5.0, 0.0), (0.0, 2.0), (0.0, 0.0), (4.0, 4.0))
    assert [dot.empty for dot in panel.dots] == [True, True, False]
    assert "1 mL too small" in panel.alt


def test_two_cases_have_no_limits_and_none_no_panel() -> None:
    (panel,) = panels((1.0, 1.0), (2.0, 2.5))
    assert panel.limits_ml is None
    assert "expected" not in panel.alt
    assert panels((0.0, 0.0)) == ()
    assert make_volume_panels(Evaluation.of_cases(CLASSES, [])) == ()


def test_many_cases_are_one_path() -> None:
    (panel,) = panels(*[(10.0 + number, 11.0) for number in range(PLAIN_DOTS + 1)])
    assert panel.compact
    assert panel.path(empty=False).count("M") == PLAIN_DOTS + 1
    assert panel.path(empty=True) == ""
    assert all(math.isfinite(dot.x) and 0 <= dot.y <= 100 for dot in panel.dots)
