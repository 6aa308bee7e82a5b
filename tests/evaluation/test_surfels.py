from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sagittal.errors import DataError
from sagittal.evaluation.surfels import areas_mm2, corner_codes, surfel_distances_mm

SPACING = (2.0, 1.5, 0.5)


def area_mm2(mask: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> float:
    return float(areas_mm2(spacing)[corner_codes(mask)].sum())


def test_inside_alone_and_outside_alone_have_no_surface() -> None:
    areas = areas_mm2(SPACING)
    assert areas.shape == (256,)
    assert areas[0] == areas[255] == 0
    assert (areas[1:255] > 0).all()


def test_surface_is_the_same_seen_from_either_side() -> None:
    areas = areas_mm2(SPACING)
    apart = [code for code in range(256) if not math.isclose(areas[code], areas[255 - code], rel_tol=1e-12)]
    # Only the chains of four corners may differ, whose complement is a chain too: and even they do not.
    assert apart == []


@pytest.mark.parametrize(("axis", "expected"), [(0, 1.5 * 0.5), (1, 2.0 * 0.5), (2, 2.0 * 1.5)])
def test_flat_surface_has_the_area_of_a_voxels_side(axis: int, expected: float) -> None:
    mask = np.zeros((2, 2, 2), bool)
    index: list[slice | int] = [slice(None)] * 3
    index[axis] = 0
    mask[tuple(index)] = True
    assert areas_mm2(SPACING)[corner_codes(mask)[1, 1, 1]] == pytest.approx(expected)


def test_single_voxel_is_an_octahedron() -> None:
    # Eight triangles through the middles of the way to its six neighbours.
    a, b, c = (size / 2 for size in SPACING)
    triangle = 0.5 * math.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2)
    mask = np.ones((1, 1, 1), bool)
    assert area_mm2(mask) == pytest.approx(8 * triangle)


def test_area_of_a_ball_comes_near_that_of_the_sphere() -> None:
    # Marching cubes between voxels makes a ball's surface a tenth too large, whatever its size.
    spacing = (1.0, 0.8, 1.2)
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip((41, 51, 35), spacing, strict=True)])
    ball = sum(axis**2 for axis in grid) <= 17.0**2
    assert 1.0 < area_mm2(ball.transpose(1, 0, 2), spacing) / (4 * math.pi * 17.0**2) < 1.12


@settings(max_examples=20, deadline=None, derandomize=True)
@given(hnp.arrays(np.bool_, (3, 4, 5)), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_area_does_not_depend_on_how_the_axes_lie(mask: np.ndarray, order: list[int], flips: tuple[bool, ...]) -> None:
    turned = np.flip(mask, [axis for axis, flip in enumerate(flips) if flip]).transpose(order)
    spacing = tuple(SPACING[axis] for axis in order)
    assert area_mm2(np.ascontiguousarray(turned), spacing) == pytest.approx(area_mm2(mask), rel=1e-12)


def test_code_tells_each_of_the_eight_voxels_around_a_corner() -> None:
    seen = set()
    for place in np.ndindex(2, 2, 2):
        mask = np.zeros((2, 2, 2), bool)
        mask[place] = True
        seen.add(int(corner_codes(mask)[1, 1, 1]))
    assert seen == {1, 2, 4, 8, 16, 32, 64, 128}
    assert corner_codes(np.ones((2, 2, 2), bool))[1, 1, 1] == 255


def test_shifted_block_is_within_the_tolerance_that_it_was_shifted_by() -> None:
    reference, prediction = np.zeros((6, 8, 20), bool), np.zeros((6, 8, 20), bool)
    reference[1:5, 2:6, 4:12], prediction[1:5, 2:6, 7:15] = True, True
    found = surfel_distances_mm(reference, prediction, SPACING)
    assert found is not None
    assert found.nsd(1.5) == 1.0
    assert 0 < found.nsd(1.49) < 1.0
    assert found.hd95_mm == pytest.approx(1.5)


def test_an_empty_mask_has_no_elements() -> None:
    full = np.ones((2, 3, 4), bool)
    for masks in ((full, ~full), (~full, full), (~full, ~full)):
        assert surfel_distances_mm(*masks, SPACING) is None


def test_label_map_is_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match="boolean mask"):
        surfel_distances_mm(labels, labels, SPACING)
