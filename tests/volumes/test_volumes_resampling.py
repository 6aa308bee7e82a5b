from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sagittal.testing.strategies import affines
from sagittal.volumes.resampling import axis_weights, new_shape


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.integers(1, 15)] * 3),
    st.sampled_from((0, 1, 3)),
    st.integers(0, 2**32 - 1),
)
def test_three_matrices_are_scipy_s_zoom_of_the_volume(shape, target, order, seed):
    volume = np.random.default_rng(seed).normal(size=shape)
    factors = [new / old for new, old in zip(target, shape, strict=True)]
    expected = ndimage.zoom(volume, factors, order=order, mode="nearest", grid_mode=True)
    weights = [axis_weights(old, new, order) for old, new in zip(shape, target, strict=True)]
    got = np.einsum("ad,bh,cw,dhw->abc", *weights, volume)
    assert got.shape == target
    assert np.abs(got - expected).max() < 1e-12


@settings(max_examples=25, deadline=None, derandomize=True)
@given(affines(), st.tuples(*[st.integers(2, 9)] * 3), st.tuples(*[st.integers(1, 12)] * 3))
def test_resampling_keeps_world_positions(affine, shape, target):
    """A linear function of the place in the world comes out at every new voxel between the old ones."""
    scale = np.array(shape) / target
    turned = np.diag([*scale, 1.0])
    # Both grids cover the same box, so that the first centres lie half a voxel within the same border.
    turned[:3, 3] = (scale - 1.0) / 2.0
    slope = np.array([0.3, -0.7, 0.5, 1.0])

    def world(matrix, size):
        index = np.stack([*np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), np.ones(size)], axis=-1)
        return index @ matrix.T @ slope, index

    weights = [axis_weights(old, new, 1) for old, new in zip(shape, target, strict=True)]
    got = np.einsum("ad,bh,cw,dhw->abc", *weights, world(affine, shape)[0])
    expected, index = world(affine @ turned, target)
    places = (index @ turned.T)[..., :3]
    between = ((places >= 0) & (places <= np.array(shape) - 1)).all(axis=-1)
    assert between.any()
    assert np.abs(got - expected)[between].max() < 1e-9 * max(1.0, np.abs(expected).max())


def test_linear_weights_by_hand():
    assert np.allclose(axis_weights(2, 4, 1), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    assert np.allclose(axis_weights(4, 2, 1), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 7), (5, 13), (40, 9), (1, 3), (6, 1)])
def test_rows_sum_to_one_and_equal_sizes_change_nothing(n_in, n_out, order):
    weights = axis_weights(n_in, n_out, order)
    assert weights.shape == (n_out, n_in)
    assert np.allclose(weights.sum(axis=1), 1.0, atol=1e-12)
    if n_in == n_out:
        assert np.allclose(weights, np.eye(n_in), atol=1e-12)


def test_weights_are_cached_and_protected():
    weights = axis_weights(6, 8, 3)
    assert axis_weights(6, 8, 3) is weights
    with pytest.raises(ValueError, match="read-only"):
        weights[0, 0] = 1.0


def test_axes_without_voxels_are_a_bug():
    with pytest.raises(AssertionError, match="axes of 0"):
        axis_weights(0, 3, 1)


@pytest.mark.parametrize(
    ("shape", "old", "new", "expected"),
    [
        ((26, 164, 166), (5.0, 0.795, 0.795), (1.5, 1.5, 1.5), (87, 87, 88)),
        ((5, 3, 7), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (2, 2, 4)),
        ((1, 10, 10), (1.0, 1.0, 1.0), (9.0, 1.0, 1.0), (1, 10, 10)),
    ],
    ids=["spleen", "halves go to even", "never no voxel"],
)
def test_new_shape_rounds_as_nnunet_does(shape, old, new, expected):
    assert new_shape(shape, old, new) == expected
