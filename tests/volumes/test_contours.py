from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sagittal.volumes.contours import outlines


def windings(polygon: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how often a polygon goes round points, and how many of its edges a ray from them crosses."""
    around, crossed = np.zeros(rows.shape, int), np.zeros(rows.shape, int)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        hit = (min(y0, y1) <= rows) & (rows < max(y0, y1)) & (columns < x0 + (rows - y0) / (y1 - y0) * (x1 - x0))
        around += hit * (1 if y1 > y0 else -1)
        crossed += hit
    return around, crossed


def require_mask(mask: np.ndarray) -> None:
    """Require that a voxel is in the mask exactly where its centre is inside, by whichever rule of filling."""
    rows, columns = np.indices(mask.shape)
    united = np.zeros(mask.shape, bool)
    parity = np.zeros(mask.shape, int)
    for polygon in outlines(mask):
        around, crossed = windings(polygon, rows, columns)
        assert np.array_equal(around != 0, crossed % 2 == 1)
        united |= around != 0
        parity += crossed
    assert np.array_equal(united, mask)
    assert np.array_equal(parity % 2 == 1, mask)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 11))))
def test_a_voxel_is_in_the_mask_where_its_centre_is_inside(mask):
    require_mask(mask)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_many_holes(share):
    require_mask(np.random.default_rng(2).random((40, 37)) < share)


def test_rings_within_rings():
    mask = np.zeros((21, 23), bool)
    for edge in range(0, 10, 2):
        mask[edge : 21 - edge, edge : 23 - edge] = True
        mask[edge + 1 : 20 - edge, edge + 1 : 22 - edge] = False
    require_mask(mask)
    assert len(outlines(mask)) == 5


def test_holes_beside_each_other_in_a_row():
    mask = np.ones((5, 17), bool)
    mask[2, 2::3] = False
    (polygon,) = outlines(mask)
    require_mask(mask)
    assert len(polygon) == len(np.unique(polygon, axis=0)) + 2 * 5


def test_straight_edges_have_no_points_between():
    mask = np.zeros((9, 30), bool)
    mask[2:7, 3:28] = True
    (polygon,) = outlines(mask)
    # A rectangle whose corners are cut.
    assert len(polygon) == 8
    assert polygon.min(axis=0).tolist() == [2.5, 1.5] and polygon.max(axis=0).tolist() == [27.5, 6.5]


def test_nothing_has_no_outline():
    assert outlines(np.zeros((3, 4), bool)) == []
