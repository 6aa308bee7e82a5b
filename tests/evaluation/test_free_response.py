from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from sagittal.errors import DataError
from sagittal.evaluation.free_response import (
    LUNA16_RATES,
    FreeResponse,
    FreeResponsePoint,
    add_free_responses,
    free_response,
)
from sagittal.evaluation.lesions import LesionRule, match_lesions

SPACING = (5.0, 0.8, 0.5)
VOXEL_ML = 5.0 * 0.8 * 0.5 / 1000

Case = tuple[np.ndarray, np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reference = random.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.3]))
    probability = np.where(reference, random.beta(4, 2, shape), random.beta(1, 6, shape))
    return reference, probability.astype(draw(st.sampled_from([np.float16, np.float32, np.float64])))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(cases(), min_size=1, max_size=4),
    st.sampled_from([LesionRule(), LesionRule(minimum_iou=0.3, minimum_ml=2 * VOXEL_ML, dilation_vox=1)]),
)
@example([(np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4)))], LesionRule())
def test_every_threshold_is_a_matching_of_its_own_and_cases_add_up(given_cases: list[Case], rule: LesionRule) -> None:
    thresholds = (0.6, 0.1, 0.3)
    curve = add_free_responses(free_response(*case, SPACING, rule, thresholds=thresholds) for case in given_cases)
    assert curve.cases == len(given_cases)
    assert [point.threshold for point in curve.points] == sorted(thresholds)
    for point in curve.points:
        scores = [match_lesions(r, p >= point.threshold, SPACING, rule) for r, p in given_cases]
        assert point.detected == sum(score.detected for score in scores)
        assert point.false_positives == sum(score.false_positives for score in scores)
        assert curve.lesions == sum(len(score.reference) for score in scores)
    assert FreeResponse.from_json(curve.to_json()) == curve
    if not curve.lesions:
        assert curve.mean_sensitivity is None
        assert curve.sensitivity_at(1.0) is None
        assert curve.curve == ()
    else:
        found = [curve.sensitivity_at(rate) or 0.0 for rate in LUNA16_RATES]
        assert all(a <= b for a, b in itertools.pairwise(found))
        assert curve.mean_sensitivity == pytest.approx(sum(found) / 7)


def response(*points: tuple[float, int, int], lesions: int = 10, cases: int = 4) -> FreeResponse:
    return FreeResponse(
        rule=LesionRule(),
        cases=cases,
        lesions=lesions,
        points=tuple(FreeResponsePoint(threshold=t, detected=d, false_positives=f) for t, d, f in points),
    )


def test_sensitivity_is_read_off_the_curve_by_straight_lines() -> None:
    curve = response((0.2, 9, 16), (0.4, 8, 8), (0.6, 4, 2), (0.8, 0, 0))
    assert curve.curve == ((0.0, 0.0), (0.5, 0.4), (2.0, 0.8), (4.0, 0.9))
    assert curve.sensitivity_at(0.25) == pytest.approx(0.2)
    assert curve.sensitivity_at(0.5) == pytest.approx(0.4)
    assert curve.sensitivity_at(1.0) == pytest.approx(0.4 + 0.4 / 3)
    assert curve.sensitivity_at(3.0) == pytest.approx(0.85)
    assert curve.sensitivity_at(100.0) == pytest.approx(0.9)
    assert curve.mean_sensitivity == pytest.approx((0.1 + 0.2 + 0.4 + 0.4 + 0.4 / 3 + 0.8 + 0.9 + 0.9) / 7)


def test_a_threshold_at_which_lesions_grow_together_does_not_lower_the_curve() -> None:
    falls = response((0.1, 2, 12), (0.4, 8, 8), (0.6, 4, 2))
    assert falls.sensitivity_at(3.0) == pytest.approx(0.8)
    assert falls.sensitivity_at(8.0) == pytest.approx(0.8)


def test_a_model_without_false_alarms_has_its_sensitivity_everywhere() -> None:
    assert response((0.3, 7, 0), (0.5, 6, 0)).mean_sensitivity == pytest.approx(0.7)


def test_a_model_that_finds_nothing_has_none() -> None:
    assert response((0.3, 0, 8), (0.5, 0, 0)).mean_sensitivity == 0.0


def test_a_case_without_lesions_counts_with_its_false_alarms() -> None:
    reference, probability = np.zeros((3, 4, 9), bool), np.zeros((3, 4, 9), np.float32)
    probability[1, 1, [1, 4, 7]] = 0.5
    curve = free_response(reference, probability, SPACING, LesionRule(), thresholds=(0.25, 0.5, 0.75))
    assert (curve.cases, curve.lesions) == (1, 0)
    assert [point.false_positives for point in curve.points] == [3, 3, 0]


def test_far_lesions_have_the_counts_of_the_whole_volume() -> None:
    random = np.random.default_rng(5)
    seeds = random.random((70, 90, 80)) < 0.0002
    reference = ndimage.binary_dilation(seeds, iterations=2)
    probability = np.clip(ndimage.gaussian_filter(reference * 1.0, 1.5) + random.normal(0, 0.1, seeds.shape), 0, 1)
    rule = LesionRule(minimum_iou=0.1)
    curve = free_response(reference, probability, SPACING, rule, thresholds=(0.3, 0.6))
    assert curve.lesions == ndimage.label(reference, np.ones((3, 3, 3)))[1] > 50
    for point in curve.points:
        found, count = ndimage.label(probability >= point.threshold, np.ones((3, 3, 3)))
        score = match_lesions(reference, found > 0, SPACING, rule)
        assert (point.detected, point.false_positives) == (score.detected, score.false_positives)
        assert len(score.predicted) == count
        sizes = np.bincount(found.ravel())[1:]
        assert sorted(lesion.volume_ml for lesion in score.predicted) == pytest.approx(sorted(sizes * VOXEL_ML))


MASK = np.zeros((2, 3, 4), bool)


@pytest.mark.parametrize(
    ("reference", "probability", "thresholds", "message"),
    [
        (MASK, MASK.astype(float), (0.0, 0.5), "thresholds"),
        (MASK, MASK.astype(float), (0.5, 1.5), "thresholds"),
        (MASK, MASK.astype(float), (), "thresholds"),
        (MASK, MASK.astype(float), (float("nan"),), "thresholds"),
        (MASK, MASK, (0.5,), "expected floats"),
        (MASK, np.zeros((2, 3, 5)), (0.5,), "the reference's shape"),
        (MASK, np.full((2, 3, 4), np.nan), (0.5,), "nan and nan"),
        (MASK, np.full((2, 3, 4), -3.0), (0.5,), "not logits"),
        (MASK, np.full((2, 3, 4), 3.0), (0.5,), "not logits"),
        (MASK.astype(np.uint8), MASK.astype(float), (0.5,), "boolean mask"),
    ],
)
def test_what_gives_no_curve_is_refused(
    reference: np.ndarray, probability: np.ndarray, thresholds: tuple[float, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        free_response(reference, probability, SPACING, LesionRule(), thresholds=thresholds)


def test_curves_of_other_settings_are_not_added_up_and_no_case_has_no_curve() -> None:
    curve = response((0.5, 1, 1))
    with pytest.raises(DataError, match="can't be added up"):
        curve + response((0.4, 1, 1))
    with pytest.raises(DataError, match="can't be added up"):
        curve + curve.replace(rule=LesionRule(minimum_iou=0.1))
    with pytest.raises(DataError, match="at least one case"):
        add_free_responses([])


@pytest.mark.parametrize("points", [(), ((0.5, 1, 1), (0.5, 1, 1))])
def test_thresholds_have_to_ascend(points: tuple[tuple[float, int, int], ...]) -> None:
    with pytest.raises(ValidationError, match="must ascend"):
        response(*points)
