from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from sagittal.errors import DataError
from sagittal.evaluation import count_overlap, dice

SHAPE = (3, 4, 5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(hnp.arrays(np.bool_, SHAPE), hnp.arrays(np.bool_, SHAPE))
def test_counts_and_dice_equal_brute_force(reference: np.ndarray, prediction: np.ndarray) -> None:
    pairs = list(zip(reference.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    counts = count_overlap(reference, prediction)
    assert counts == (pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))
    total = sum(r + p for r, p in pairs)
    assert dice(reference, prediction) == (2 * pairs.count((True, True)) / total if total else None)
    assert dice(prediction, reference) == dice(reference, prediction)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [(True, False, 0.0), (False, True, 0.0), (False, False, None), (True, True, 1.0)],
)
def test_rules_for_empty_masks(reference: bool, prediction: bool, expected: float | None) -> None:
    assert dice(np.full(SHAPE, reference), np.full(SHAPE, prediction)) == expected


def test_single_voxel_in_a_large_volume_is_counted() -> None:
    reference, prediction = np.zeros((30, 40, 50), bool), np.zeros((30, 40, 50), bool)
    reference[29, 39, 49] = prediction[29, 39, 49] = prediction[0, 0, 0] = True
    assert dice(reference, prediction) == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_anything_but_bool_is_refused(dtype: type) -> None:
    mask = np.ones(SHAPE, bool)
    with pytest.raises(DataError, match=r"prediction: dtype .* boolean mask") as caught:
        dice(mask, mask.astype(dtype))
    assert caught.value.code == "mask_dtype"


def test_two_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"reference \(3, 4, 5\), prediction \(3, 5, 4\)"):
        dice(np.ones((3, 4, 5), bool), np.ones((3, 5, 4), bool))


def test_two_dimensions_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected|takes \(D, H, W\)"):
        dice(np.ones((3, 4), bool), np.ones((3, 4), bool))
