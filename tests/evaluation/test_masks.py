from __future__ import annotations

import math

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation.masks import check_masks, check_spacing

MASK = np.ones((2, 3, 4), bool)


def test_two_masks_of_one_shape_pass() -> None:
    check_masks(MASK, ~MASK)


@pytest.mark.parametrize(
    ("reference", "prediction", "code"),
    [
        (MASK.astype(np.uint8), MASK, "mask_dtype"),
        (MASK, MASK.astype(float), "mask_dtype"),
        (MASK[0], MASK[0], "mask_shape"),
        (MASK, MASK[None], "mask_shape"),
        (MASK, MASK[:1], "grid_mismatch"),
    ],
)
def test_anything_else_is_refused(reference: np.ndarray, prediction: np.ndarray, code: str) -> None:
    with pytest.raises(DataError) as caught:
        check_masks(reference, prediction)
    assert caught.value.code == code


def test_spacing_keeps_its_order() -> None:
    assert check_spacing([5.0, 0.5, 0.25]) == (5.0, 0.5, 0.25)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.inf, 1.0)])
def test_spacing_that_is_none_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="D, H, W order"):
        check_spacing(spacing)
