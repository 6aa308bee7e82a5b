from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sagittal.errors import DataError
from sagittal.evaluation import hd95_mm, surface_distances_mm
from sagittal.evaluation.surface import diagonal_mm, surface

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7))
SPACINGS = st.tuples(*[st.sampled_from([0.4, 0.78, 1.0, 2.5, 5.0])] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    return draw(hnp.arrays(np.bool_, shape)), draw(hnp.arrays(np.bool_, shape))


def brute_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for voxel in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                neighbour = voxel.copy()
                neighbour[axis] += step
                inside = all(0 <= n < length for n, length in zip(neighbour, mask.shape, strict=True))
                if not inside or not mask[tuple(neighbour)]:
                    found.append(tuple(int(n) for n in voxel))
    return sorted(set(found))


def brute_hd95(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float | None:
    if not reference.any() and not prediction.any():
        return None
    if not reference.any() or not prediction.any():
        return math.sqrt(sum((n * s) ** 2 for n, s in zip(reference.shape, spacing, strict=True)))
    surfaces = [brute_surface(reference), brute_surface(prediction)]
    directed = []
    for own, other in (surfaces, surfaces[::-1]):
        nearest = [
            min(math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True))) for q in other)
            for p in own
        ]
        directed.append(float(np.percentile(nearest, 95)))
    return max(directed)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(mask_pairs(), SPACINGS)
@example((np.ones((3, 4, 5), bool), np.ones((3, 4, 5), bool)), (5.0, 0.78, 0.4))
@example((np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)), (5.0, 0.78, 0.4))
def test_hd95_equals_brute_force(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, ...]) -> None:
    expected = brute_hd95(*masks, spacing)
    found = hd95_mm(*masks, spacing)
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-9))
    assert hd95_mm(masks[1], masks[0], spacing) == found


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mask_pairs())
def test_surface_equals_brute_force(masks: tuple[np.ndarray, np.ndarray]) -> None:
    assert [tuple(voxel) for voxel in np.argwhere(surface(masks[0])).tolist()] == brute_surface(masks[0])


def test_border_of_the_image_is_surface() -> None:
    outer = surface(np.ones((4, 5, 6), bool))
    assert outer.sum() == 4 * 5 * 6 - 2 * 3 * 4
    assert not outer[1:-1, 1:-1, 1:-1].any()


@pytest.mark.parametrize(("axis", "expected"), [(0, 3 * 5.0), (1, 3 * 0.8), (2, 3 * 0.5)])
def test_two_single_voxels_three_apart_use_the_spacing_of_their_axis(axis: int, expected: float) -> None:
    reference, prediction = np.zeros((6, 7, 8), bool), np.zeros((6, 7, 8), bool)
    reference[1, 1, 1] = True
    there = [1, 1, 1]
    there[axis] += 3
    prediction[tuple(there)] = True
    assert hd95_mm(reference, prediction, (5.0, 0.8, 0.5)) == pytest.approx(expected, abs=1e-12)


def test_larger_direction_counts_and_directions_are_not_pooled() -> None:
    reference, prediction = np.zeros((1, 1, 40), bool), np.zeros((1, 1, 40), bool)
    reference[0, 0, :30] = True
    prediction[0, 0, 0] = True
    distances = surface_distances_mm(reference, prediction, (1.0, 1.0, 1.0))
    assert distances is not None
    assert distances.from_prediction_mm.tolist() == [0.0]
    assert hd95_mm(reference, prediction, (1.0, 1.0, 1.0)) == pytest.approx(0.95 * 29)


def test_cropping_does_not_change_the_distance() -> None:
    generator = np.random.default_rng(0)
    reference, prediction = generator.random((2, 4, 5, 6)) > 0.6
    padding = ((3, 1), (0, 4), (2, 2))
    spacing = (2.0, 0.7, 1.1)
    inside = hd95_mm(np.pad(reference, padding), np.pad(prediction, padding), spacing)
    assert inside == hd95_mm(reference, prediction, spacing)


class TestEmptyMasks:
    full = np.ones((3, 4, 5), bool)
    empty = np.zeros((3, 4, 5), bool)
    spacing = (2.0, 1.0, 0.5)
    diagonal = math.sqrt(6.0**2 + 4.0**2 + 2.5**2)

    def test_miss_is_the_diagonal_of_the_image(self) -> None:
        assert hd95_mm(self.full, self.empty, self.spacing) == pytest.approx(self.diagonal)

    def test_false_alarm_is_the_diagonal_of_the_image(self) -> None:
        assert hd95_mm(self.empty, self.full, self.spacing) == pytest.approx(self.diagonal)

    def test_both_empty_is_undefined(self) -> None:
        assert hd95_mm(self.empty, self.empty, self.spacing) is None

    def test_no_distance_exceeds_the_diagonal(self) -> None:
        first, last = self.empty.copy(), self.empty.copy()
        first[0, 0, 0] = last[-1, -1, -1] = True
        found = hd95_mm(first, last, self.spacing)
        assert found is not None
        assert found < diagonal_mm(first.shape, self.spacing)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0)])
def test_bad_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    mask = np.ones((2, 3, 4), bool)
    with pytest.raises(DataError, match="three positive numbers in D, H, W order"):
        hd95_mm(mask, mask, spacing)


def test_label_map_is_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match="boolean mask"):
        hd95_mm(labels, labels, (1.0, 1.0, 1.0))
