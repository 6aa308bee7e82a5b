from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sagittal.errors import DataError
from sagittal.evaluation import FAST_METRICS, ClassSet, EvaluationSettings, dice, evaluate_case, hd95_mm

SPACING = (5.0, 0.8, 0.5)
FAST = EvaluationSettings(metrics=FAST_METRICS)
CLASSES = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}
maps = hnp.arrays(np.uint8, (4, 5, 6), elements=st.integers(0, 4))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(maps, maps)
def test_every_class_equals_the_metrics_of_its_masks(reference: np.ndarray, prediction: np.ndarray) -> None:
    result = evaluate_case(reference, prediction, SPACING, CLASSES, case="a", settings=FAST)
    assert list(result.classes) == ["whole", "core", "tip"]
    for name, values in {"whole": [1, 2, 3], "core": [2, 3], "tip": [3]}.items():
        masks = np.isin(reference, values), np.isin(prediction, values)
        score = result.classes[name]
        assert score.metrics == {"dice": dice(*masks), "hd95_mm": hd95_mm(*masks, SPACING)}
        assert score.reference_ml == pytest.approx(masks[0].sum() * 5.0 * 0.8 * 0.5 / 1000)
        assert score.prediction_ml == pytest.approx(masks[1].sum() * 5.0 * 0.8 * 0.5 / 1000)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(maps, maps)
def test_ignored_voxels_belong_to_no_mask(reference: np.ndarray, prediction: np.ndarray) -> None:
    result = evaluate_case(reference, prediction, SPACING, {"a": 1, "b": [1, 2, 3], "ignore": 4}, settings=FAST)
    kept = reference != 4
    for name, values in {"a": [1], "b": [1, 2, 3]}.items():
        masks = np.isin(reference, values) & kept, np.isin(prediction, values) & kept
        assert result.classes[name].metrics == {"dice": dice(*masks), "hd95_mm": hd95_mm(*masks, SPACING)}


def test_prediction_does_not_matter_where_the_reference_is_ignored() -> None:
    reference = np.zeros((3, 4, 5), np.uint8)
    reference[0] = 1
    reference[1] = 9
    prediction = reference.copy()
    prediction[1] = 1
    result = evaluate_case(reference, prediction, SPACING, {"a": 1, "ignore": 9}, settings=FAST)
    assert result.classes["a"].metrics == {"dice": 1.0, "hd95_mm": 0.0}
    assert result.classes["a"].prediction_ml == result.classes["a"].reference_ml


@pytest.mark.parametrize(
    ("in_reference", "in_prediction", "outcome", "expected"),
    [
        (True, False, "missed", 0.0),
        (False, True, "false_alarm", 0.0),
        (False, False, "absent", None),
        (True, True, "present", 1.0),
    ],
)
def test_outcome_and_rules_for_an_empty_class(
    in_reference: bool, in_prediction: bool, outcome: str, expected: float | None
) -> None:
    reference, prediction = np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.uint8)
    reference[1, 1:3, 2] = 7 * in_reference
    prediction[1, 1:3, 2] = 7 * in_prediction
    score = evaluate_case(reference, prediction, SPACING, {"a": 7}).classes["a"]
    assert score.outcome == outcome
    assert score.metrics["dice"] == expected
    diagonal = math.sqrt(15.0**2 + 3.2**2 + 2.5**2)
    assert score.metrics["hd95_mm"] == {"present": 0.0, "absent": None}.get(outcome, pytest.approx(diagonal))


def test_result_does_not_depend_on_the_integer_type() -> None:
    labels = np.arange(60).reshape(3, 4, 5) % 3
    results = {
        evaluate_case(labels.astype(dtype), labels.astype(np.uint8)[::-1], SPACING, {"a": 1, "b": 2}).to_json()
        for dtype in (np.uint8, np.uint16, np.int16, np.int64)
    }
    assert len(results) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (np.zeros((3, 4, 5), np.float32), "case_1: reference has dtype float32"),
        (np.zeros((3, 4), np.uint8), r"case_1: reference has shape \(3, 4\)"),
        (np.full((3, 4, 5), -1, np.int16), "values from -1 to -1"),
        (np.full((3, 4, 5), 70000, np.int32), "values from 70000 to 70000"),
        (np.zeros((3, 5, 4), np.uint8), r"grids differ \(shape \(3, 5, 4\) against \(3, 4, 5\)\)"),
    ],
)
def test_unusable_label_maps_are_refused(reference: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_case(reference, np.zeros((3, 4, 5), np.uint8), SPACING, ClassSet.of_mapping({"a": 1}), case="case_1")
