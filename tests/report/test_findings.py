"""Lesions of all cases together, and how true the probabilities of all cases are."""

from __future__ import annotations

import pytest

from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings
from sagittal.evaluation.calibration import CalibrationCounts, CalibrationScore, ReliabilityBins
from sagittal.evaluation.free_response import FreeResponse, FreeResponsePoint
from sagittal.evaluation.lesions import LesionRule, LesionScore, PredictedLesion, ReferenceLesion
from sagittal.report.findings import calibration_panels, detection_panels, lesion_rows
from sagittal.report.page import render_report

CLASSES = ClassSet.of_mapping({"lesion": 1, "organ": 2})
SETTINGS = EvaluationSettings(metrics=("dice",), lesions=LesionRule())


def lesions(found: int, missed: int, false: int) -> LesionScore:
    place = (1, 2, 3)
    hits = [ReferenceLesion(volume_ml=2.0, centre_vox=place, found_by=1, dice=0.8, iou=0.7)] * found
    misses = [ReferenceLesion(volume_ml=0.5, centre_vox=place, found_by=0, dice=0.0, iou=0.0)] * missed
    right = [PredictedLesion(volume_ml=2.0, centre_vox=place, finds=1)] * found
    wrong = [PredictedLesion(volume_ml=0.25, centre_vox=place, finds=0)] * false
    return LesionScore(rule=LesionRule(), reference=(*hits, *misses), predicted=(*right, *wrong))


def calibration(voxels: int, believed: float, true: int) -> CalibrationScore:
    bins = ReliabilityBins(voxels=(0, voxels), probability_sums=(0.0, voxels * believed), true=(0, true))
    counts = CalibrationCounts(voxels=voxels, brier_sums={"lesion": 1.0}, classes={"lesion": bins}, top=None)
    return CalibrationScore(kind="sigmoid", margin_mm=10.0, whole=counts, near_foreground=counts)


def with_curve(found: LesionScore, *points: tuple[float, int, int], lesions: int) -> Evaluation:
    """One case whose class lesion has a curve of (threshold, found, false alarms), and organ one without any lesion."""
    base = evaluation((found, None))
    (case,) = base.cases
    curve = FreeResponse(
        rule=LesionRule(),
        cases=1,
        lesions=lesions,
        points=tuple(FreeResponsePoint(threshold=t, detected=d, false_positives=f) for t, d, f in points),
    )
    none = curve.replace(lesions=0, points=tuple(point.replace(detected=0) for point in curve.points))
    classes = {
        "lesion": case.classes["lesion"].replace(free_response=curve),
        "organ": case.classes["organ"].replace(free_response=none),
    }
    both = (case.replace(classes=classes), case.replace(case="again", classes=classes))
    return Evaluation.of_cases(CLASSES, both, settings=SETTINGS)


def evaluation(*cases: tuple[LesionScore | None, CalibrationScore | None]) -> Evaluation:
    organ = ClassScore(reference_ml=1.0, prediction_ml=1.0, metrics={"dice": 1.0})
    scores = [
        CaseScore(
            case=str(number),
            shape=(2, 3, 4),
            spacing_mm=(1.0, 1.0, 1.0),
            classes={
                "lesion": ClassScore(reference_ml=1.0, prediction_ml=1.0, metrics={"dice": 0.5}, lesions=found),
                "organ": organ,
            },
            calibration=trust,
        )
        for number, (found, trust) in enumerate(cases)
    ]
    return Evaluation.of_cases(CLASSES, scores, settings=SETTINGS)


def test_lesions_of_all_cases_count_together() -> None:
    (row,) = lesion_rows(evaluation((lesions(2, 1, 0), None), (lesions(1, 0, 3), None)))
    assert (row.name, row.cases, row.pooled.detected, len(row.pooled.reference)) == ("lesion", 2, 3, 4)
    assert row.pooled.sensitivity == pytest.approx(3 / 4)
    assert row.pooled.precision == pytest.approx(3 / 6)
    assert row.false_per_case == pytest.approx(1.5)
    assert (row.missed_ml, row.false_ml) == (0.5, 0.25)


def test_without_lesions_there_are_no_rows() -> None:
    assert lesion_rows(evaluation((None, None))) == ()


def test_probabilities_of_all_cases_count_together() -> None:
    (panel,) = calibration_panels(evaluation((None, calibration(10, 0.9, 8)), (None, calibration(30, 0.7, 30))))
    assert panel.points == ((pytest.approx(0.75), pytest.approx(0.95), 40),)
    assert panel.ece == pytest.approx(0.2)
    assert panel.brier == pytest.approx(2 / 40)
    assert panel.path == "75.00,5.00"
    assert "believed with 0.75 it was true in 0.95" in panel.alt


def test_free_response_of_all_cases_is_drawn_between_an_eighth_and_eight_false_alarms() -> None:
    (panel,) = detection_panels(with_curve(lesions(2, 1, 0), (0.1, 4, 16), (0.5, 3, 1), (0.9, 1, 0), lesions=4))
    assert (panel.name, panel.response.cases, panel.response.lesions) == ("lesion", 2, 8)
    # Straight from (0, 1/4) to (1, 3/4) and on to (16, 1), of which 8 is the last rate.
    at = [0.25 + 0.5 * rate for rate in (0.125, 0.25, 0.5, 1.0)] + [0.75 + 0.25 * (rate - 1) / 15 for rate in (2, 4, 8)]
    assert panel.mean_sensitivity == pytest.approx(sum(at) / 7)
    assert [(dot.x, dot.y) for dot in panel.dots] == [(0.0, 75.0), (pytest.approx(50.0), 25.0)]
    assert panel.path.startswith("0.00,68.75 ") and panel.path.endswith(f" 100.00,{100 - 100 * at[-1]:.2f}")
    assert [(tick.x, tick.label) for tick in panel.ticks] == [
        (0.0, "1/8"),
        (pytest.approx(100 / 3), "1/2"),
        (pytest.approx(200 / 3), "2"),
        (100.0, "8"),
    ]
    assert "0.50 with 1/2" in panel.alt


def test_free_response_stands_on_the_page_in_words_too() -> None:
    html = render_report(with_curve(lesions(2, 1, 0), (0.5, 3, 1), (0.9, 1, 0), lesions=4))
    assert "mean sensitivity 0.598" in html and "8 lesions in 2 cases" in html
    assert 'aria-label="Sensitivity for lesions of lesion by false alarms per case: ' in html
    assert "threshold 0.5: 6 of 8 lesions found, 1 false alarms per case" in html
    assert "how many false alarms" not in render_report(evaluation((lesions(2, 1, 0), None)))


def test_both_stand_on_the_page_and_only_where_they_were_measured() -> None:
    html = render_report(evaluation((lesions(2, 1, 0), calibration(10, 0.9, 8))))
    assert 'id="lesions"' in html
    assert "2 of 3" in html
    assert "calibration error 0.100, Brier 0.100" in html
    plain = render_report(evaluation((None, None)))
    assert 'id="lesions"' not in plain
    assert 'id="calibration"' not in plain
