from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from sagittal.evaluation.masks import bounding_box, union_box


@settings(max_examples=50, deadline=None, derandomize=True)
@given(hnp.arrays(np.bool_, (3, 4, 5)))
def test_bounding_box_is_the_smallest_that_holds_every_voxel(mask: np.ndarray) -> None:
    voxels = np.argwhere(mask)
    if not len(voxels):
        assert bounding_box(mask) is None
        return
    low, high = voxels.min(axis=0).tolist(), (voxels.max(axis=0) + 1).tolist()
    assert bounding_box(mask) == tuple(slice(a, b) for a, b in zip(low, high, strict=True))


def test_union_of_boxes() -> None:
    first, second = (slice(1, 2), slice(3, 9), slice(0, 4)), (slice(0, 1), slice(4, 5), slice(2, 7))
    assert union_box(first, second) == (slice(0, 2), slice(3, 9), slice(0, 7))
    assert union_box(None, second) == second
    assert union_box(first, None) == first
    assert union_box(None, None) is None
