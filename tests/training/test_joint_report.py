"""The evaluations of folds as one: by `join_evaluations` where every case is held out once, case by case otherwise."""

from __future__ import annotations

import numpy as np

from sagittal.evaluation import FAST_METRICS, ClassSet, Evaluation, EvaluationSettings, Failure, evaluate_case
from sagittal.training.joint_report import _joined

CLASSES = ClassSet.of_mapping({"head": 1})


def fold(*cases: str, failed: str | None = None, settings: EvaluationSettings | None = None) -> Evaluation:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 1:3, 1:4] = 1
    scores = [
        evaluate_case(labels, labels, (2.0, 1.0, 1.0), CLASSES, case=case, settings=settings or EvaluationSettings())
        for case in cases
    ]
    failures = [Failure(case=failed, code="grid_mismatch", message="two grids")] if failed else []
    return Evaluation.of_cases(CLASSES, scores, settings=settings, failures=failures, warnings=["a remark"])


def test_failures_and_warnings_of_the_folds_are_in_the_joint_report() -> None:
    found = _joined({"0": fold("a", "b", failed="x"), "1": fold("c")}, CLASSES)
    assert [score.case for score in found.cases] == ["a", "b", "c"]
    assert [failure.case for failure in found.failures] == ["x"] and found.summary.failed == 1
    assert found.warnings == ("a remark",)


def test_a_case_that_own_splits_hold_out_twice_is_two_results() -> None:
    found = _joined({"0": fold("a", "b", failed="x"), "1": fold("b")}, CLASSES)
    assert [score.case for score in found.cases] == ["a", "b", "b"]
    assert [failure.case for failure in found.failures] == ["x"]


def test_folds_of_two_versions_have_in_common_what_both_measured() -> None:
    found = _joined({"0": fold("a"), "1": fold("b", settings=EvaluationSettings(metrics=FAST_METRICS))}, CLASSES)
    assert tuple(found.metrics) == FAST_METRICS and found.summary.cases == 2
