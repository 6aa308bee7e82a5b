from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import distance_transform_edt

from sagittal.evaluation import distances
from sagittal.evaluation.distances import nearest_mm

SPACINGS = st.tuples(*[st.sampled_from([0.3, 0.78, 1.0, 2.5, 5.0])] * 3)
MASKS = hnp.arrays(np.bool_, (4, 7, 5))


@pytest.mark.parametrize("voxels_per_query", [0, 10**9], ids=["tree", "transform"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(source=MASKS, target=MASKS, spacing=SPACINGS)
def test_both_ways_find_the_nearest(
    voxels_per_query: int, source: np.ndarray, target: np.ndarray, spacing: tuple[float, float, float]
) -> None:
    target[0, 0, 0] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "_VOXELS_PER_QUERY", voxels_per_query)
        found = nearest_mm(source, target, spacing)
    expected = distance_transform_edt(~target, sampling=spacing)[source]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_whole_number_of_voxels_is_exactly_that_distance() -> None:
    # In coordinates, 0.3 * 9 - 0.3 * 2 is not 0.3 * 7: a tolerance of 2.1 mm would lose what lies at 2.1 mm.
    source, target = np.zeros((1, 1, 40), bool), np.zeros((1, 1, 40), bool)
    source[..., 9], target[..., 2] = True, True
    assert nearest_mm(source, target, (5.0, 1.0, 0.3)).tolist() == [7 * 0.3]


def test_large_surfaces_are_searched_in_a_tree_and_dense_noise_is_transformed(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("_by_tree", "_by_transform"):
        original = getattr(distances, name)
        monkeypatch.setattr(distances, name, lambda *given, n=name, o=original: (used.append(n), o(*given))[1])
    thin, other = np.zeros((40, 40, 40), bool), np.zeros((40, 40, 40), bool)
    thin[3], other[9] = True, True
    nearest_mm(thin, other, (1.0, 1.0, 1.0))
    noise = np.random.default_rng(0).random((2, 12, 13, 14)) < 0.5
    nearest_mm(noise[0], noise[1], (1.0, 1.0, 1.0))
    assert used == ["_by_tree", "_by_transform"]
