from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from sagittal.inference.windows import gaussian, summed_weights, tile, window_starts


@pytest.mark.parametrize(
    ("size", "window", "overlap", "starts"),
    [
        # Worked out by hand from nnU-Net's rule: ceil((size - window) / step) + 1 windows, evenly spread, rounded.
        (30, 20, 0.5, (0, 10)),
        (110, 64, 0.5, (0, 23, 46)),
        (128, 64, 0.5, (0, 32, 64)),
        (200, 128, 0.5, (0, 36, 72)),
        (64, 64, 0.5, (0,)),
        (65, 64, 0.5, (0, 1)),
        (100, 64, 0.0, (0, 36)),
        (128, 64, 0.0, (0, 64)),
        (30, 10, 0.9, tuple(range(21))),
        (5, 3, 0.99, (0, 1, 2)),
        (3, 1, 0.5, (0, 1, 2)),
    ],
)
def test_starts_by_hand(size: int, window: int, overlap: float, starts: tuple[int, ...]) -> None:
    assert window_starts(size, window, overlap) == starts


@given(size=st.integers(1, 200), window=st.integers(1, 200), overlap=st.floats(0, 0.99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_voxel_is_covered_and_no_window_repeats(size: int, window: int, overlap: float) -> None:
    size = max(size, window)
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0 and starts[-1] == size - window
    steps = np.diff(starts)
    assert (steps >= 1).all()
    assert (steps <= max(1, int(np.ceil(window * (1 - overlap))))).all()


def test_weights_have_nnunets_place_and_width() -> None:
    for window in (1, 2, 3, 16, 33, 128):
        weights = gaussian(window)
        assert weights.shape == (window,)
        assert weights.min() > 3e-4 and weights[window // 2] == 1
        # nnU-Net blurs a single voxel, that at window // 2.
        spot = np.zeros(window)
        spot[window // 2] = 1
        blurred = gaussian_filter1d(spot, window / 8, mode="constant", radius=window)
        np.testing.assert_allclose(weights, blurred / blurred.max(), rtol=1e-12)
    odd = gaussian(33)
    assert odd[16] == 1.0
    # One sigma, 33 / 8 voxels, from the middle; interpolated between the voxels 4 and 5 away.
    assert np.exp(-0.5) == pytest.approx(np.interp(33 / 8, [4, 5], [odd[20], odd[21]]), rel=0.01)


def test_weights_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        gaussian(8)[0] = 5.0


def test_small_volumes_are_padded_at_both_sides() -> None:
    tiling = tile((5, 16, 7), (16, 16, 10), 0.5)
    assert tiling.before == (5, 0, 1)
    assert tiling.after == (6, 0, 2)
    assert tiling.starts == ((0,), (0,), (0,))
    assert tiling.num_windows == 1


def test_tiling_counts_the_product() -> None:
    tiling = tile((30, 64, 9), (20, 32, 16), 0.5)
    assert [len(axis) for axis in tiling.starts] == [2, 3, 1]
    assert tiling.num_windows == 6


def test_summed_weights_equal_a_brute_force_sum() -> None:
    tiling = tile((13, 10, 7), (8, 5, 7), 0.5)
    brute = np.zeros((13, 10, 7))
    weight = gaussian(8)[:, None, None] * gaussian(5)[:, None] * gaussian(7)
    for d in tiling.starts[0]:
        for h in tiling.starts[1]:
            for w in tiling.starts[2]:
                brute[d : d + 8, h : h + 5, w : w + 7] += weight
    d, h, w = (summed_weights(tiling, axis) for axis in range(3))
    np.testing.assert_allclose(d[:, None, None] * h[:, None] * w, brute, rtol=1e-12)


def test_impossible_windows_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        window_starts(10, 11, 0.5)
    with pytest.raises(AssertionError):
        window_starts(10, 5, 1.0)
    with pytest.raises(AssertionError):
        tile((1, 0, 5), (1, 1, 1), 0.5)
