from __future__ import annotations

import numpy as np
import pytest

from sagittal.evaluation.metrics import METRICS, MaskPair, Metric

FULL = np.ones((2, 3, 4), bool)
EMPTY = ~FULL


def value(key: str, reference: np.ndarray, prediction: np.ndarray) -> float | None:
    pair = MaskPair(reference=reference, prediction=prediction, spacing_mm=(2.0, 1.0, 0.5), image_shape=(9, 9, 9))
    return METRICS[key].compute(pair)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())
def test_every_metric_is_defined_in_words(metric: Metric) -> None:
    for text in (metric.definition, metric.empty_reference, metric.empty_prediction, metric.both_empty, metric.source):
        assert text.endswith(".")


@pytest.mark.parametrize("key", METRICS)
class TestContract:
    """What every metric must keep, whatever it measures."""

    def test_misses_and_false_alarms_have_a_value(self, key: str) -> None:
        assert value(key, FULL, EMPTY) is not None
        assert value(key, EMPTY, FULL) is not None

    def test_absent_class_is_undefined(self, key: str) -> None:
        assert value(key, EMPTY, EMPTY) is None

    def test_perfect_beats_partial_beats_missed(self, key: str) -> None:
        half = FULL.copy()
        half[:, 1:] = False
        order = [value(key, FULL, prediction) for prediction in (FULL, half, EMPTY)]
        assert order == sorted(order, key=lambda score: score or 0.0, reverse=METRICS[key].higher_is_better)
        assert len(set(order)) == 3


def test_a_missed_class_is_as_far_as_the_whole_image_not_as_its_box() -> None:
    assert value("hd95_mm", FULL, EMPTY) == pytest.approx(np.hypot(np.hypot(18.0, 9.0), 4.5))
