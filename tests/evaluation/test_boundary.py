from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from sagittal.errors import DataError
from sagittal.evaluation import boundary_iou
from sagittal.evaluation.boundary import shell
from sagittal.evaluation.surface import surface

MASKS = hnp.arrays(np.bool_, (4, 5, 6))
SPACING = (2.5, 1.0, 0.6)


def brute_shell(mask: np.ndarray, width_mm: float) -> np.ndarray:
    padded = np.pad(mask, 1)
    inside, outside = np.argwhere(padded), np.argwhere(~padded)
    near = cdist(inside * np.array(SPACING), outside * np.array(SPACING)).min(1) <= width_mm + 1e-9
    found = np.zeros_like(padded)
    found[tuple(inside[near].T)] = True
    return found[1:-1, 1:-1, 1:-1] | surface(mask)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(MASKS, MASKS, st.sampled_from([0.1, 0.6, 1.0, 1.3, 2.5, 4.0]))
def test_boundary_iou_equals_brute_force(reference: np.ndarray, prediction: np.ndarray, width_mm: float) -> None:
    reference[1:, 1:], prediction[:3, :, 2:] = True, True
    shells = [brute_shell(mask, width_mm) for mask in (reference, prediction)]
    expected = (shells[0] & shells[1]).sum() / (shells[0] | shells[1]).sum()
    assert boundary_iou(reference, prediction, SPACING, width_mm=width_mm) == pytest.approx(expected, abs=1e-12)


def test_width_is_two_percent_of_the_diagonal_of_the_image() -> None:
    reference, prediction = np.zeros((2, 30, 24, 20), bool)
    reference[4:26, 4:20, 4:16], prediction[5:26, 4:20, 4:16] = True, True
    image_shape = (100, 100, 100)
    width = 0.02 * np.sqrt(sum((100 * size) ** 2 for size in SPACING))
    by_itself = boundary_iou(reference, prediction, SPACING, image_shape)
    assert by_itself == boundary_iou(reference, prediction, SPACING, width_mm=float(width))
    assert by_itself != boundary_iou(reference, prediction, SPACING)


def test_a_width_of_whole_voxels_holds_them_however_it_is_rounded() -> None:
    mask = np.ones((1, 1, 21), bool)
    padded = np.pad(mask, ((20, 20), (20, 20), (0, 0)), constant_values=True)
    assert shell(padded, (1.0, 1.0, 0.1), 0.3)[20, 20].sum() == 6


def test_same_shift_costs_more_than_iou_shows() -> None:
    reference, prediction = np.zeros((2, 44, 44, 44), bool)
    reference[2:40, 2:40, 2:40], prediction[3:41, 2:40, 2:40] = True, True
    found = boundary_iou(reference, prediction, (1.0, 1.0, 1.0), width_mm=2.0)
    assert found is not None
    assert found < 0.9 < (reference & prediction).sum() / (reference | prediction).sum()


@pytest.mark.parametrize(("filled", "expected"), [((True, False), 0.0), ((False, True), 0.0), ((False, False), None)])
def test_rules_for_empty_masks(filled: tuple[bool, bool], expected: float | None) -> None:
    masks = [np.full((3, 4, 5), fill) for fill in filled]
    assert boundary_iou(*masks, SPACING) == expected


def test_label_map_is_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match="boolean mask"):
        boundary_iou(labels, labels, SPACING)
