from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sagittal.inference.slabs import AxisTaps, BlockResampler, halo_shapes, halo_voxels, multiply
from sagittal.inference.windows import tile


@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), cuts=st.sets(st.integers(1, 39)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_of_an_axis_make_each_output_once_as_torch_does(n_in: int, n_out: int, cuts: set[int]) -> None:
    values = np.random.default_rng(0).standard_normal(n_in).astype(np.float32)
    borders = [0, *sorted(cut for cut in cuts if cut < n_in), n_in]
    taps = AxisTaps(n_in, n_out)
    made = []
    for start, stop in pairwise(borders):
        outputs = taps.made_with(start, stop)
        assert outputs.start == len(made)
        if n_in == n_out:
            made.extend(values[start:stop])
        else:
            made.extend(taps.matrix(start, stop) @ values[max(start - 1, 0) : stop])
    expected = nn.functional.interpolate(torch.from_numpy(values)[None, None], size=n_out, mode="linear")[0, 0].numpy()
    np.testing.assert_allclose(np.array(made), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_matrix_along_any_axis(axis: int) -> None:
    values = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    matrix = np.random.default_rng(1).standard_normal((6, values.shape[axis + 1])).astype(np.float32)
    expected = np.moveaxis(np.tensordot(matrix, values, (1, axis + 1)), 0, axis + 1)
    np.testing.assert_allclose(multiply(values, matrix, axis), expected, rtol=1e-4, atol=1e-5)


def test_a_thin_anisotropic_axis_is_linear_not_nearest() -> None:
    tiling = tile((4, 1, 1), (4, 1, 1), 0.5)
    ramp = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    whole = (slice(0, 4), slice(0, 1), slice(0, 1))
    place, got = BlockResampler(tiling, (0, 1, 2), (4, 1, 1), (8, 1, 1), 1).resample(whole, ramp, 0)
    assert place[0] == slice(0, 8)
    np.testing.assert_allclose(got[0, :, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_halos_exist_only_where_the_grids_differ() -> None:
    tiling = tile((20, 30, 40), (10, 10, 10), 0.5)
    assert halo_voxels(tiling, (0, 1, 2), (20, 30, 40), (20, 30, 40)) == 0
    # One plane along W, as thick as a layer and as wide as a row; H keeps its own size.
    assert halo_shapes(tiling, (0, 1, 2), (20, 30, 40), (20, 30, 80)) == {2: (13, 13, 1)}
    assert halo_shapes(tiling, (0, 1, 2), (20, 30, 40), (10, 30, 40)) == {0: (1, 30, 40)}
