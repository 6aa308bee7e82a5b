from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.inference.blending import Blender, carried_voxels, visiting_order, visits
from sagittal.inference.windows import gaussian, shares, tile
from sagittal.plan.base import Triple

AXIS = st.integers(1, 12)
TRIPLE = st.tuples(AXIS, AXIS, AXIS)
ORDERS = st.permutations([0, 1, 2]).map(tuple)


@given(
    shape=TRIPLE,
    window=TRIPLE,
    overlap=st.sampled_from([0.0, 0.4, 0.5, 0.8]),
    order=ORDERS,
    levels_in_file=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_cover_the_volume_once_with_the_weighted_mean(
    shape: Triple,
    window: Triple,
    overlap: float,
    order: Triple,
    levels_in_file: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tiling = tile(shape, window, overlap)
    padded = tuple(axis[-1] + size for axis, size in zip(tiling.starts, window, strict=True))
    weight = gaussian(window[0])[:, None, None] * gaussian(window[1])[:, None] * gaussian(window[2])
    total, weights = np.zeros((2, *padded)), np.zeros(padded)
    got, covered = np.zeros((2, *padded), np.float32), np.zeros(padded, int)
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.getbasetemp()
    blender = Blender(tiling, order, 2, scratch=folder, levels_in_file=levels_in_file)
    for number in visits(tiling, order):
        values = rng.standard_normal((2, *window)).astype(np.float32)
        starts = [axis[at] for axis, at in zip(tiling.starts, number, strict=True)]
        where = tuple(slice(start, start + size) for start, size in zip(starts, window, strict=True))
        total[:, *where] += values * weight
        weights[where] += weight
        place, block = blender.add(number, values)
        got[:, *place] = block
        covered[place] += 1
    blender.close()
    assert (covered == 1).all()
    np.testing.assert_allclose(got, total / weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_changes_no_bit(tmp_path: Path, dtype: type) -> None:
    tiling = tile((29, 13, 17), (8, 6, 7), 0.5)
    order = visiting_order(tiling)
    blenders = [Blender(tiling, order, 3, dtype, scratch=tmp_path, levels_in_file=levels) for levels in (0, 1, 2)]
    rng = np.random.default_rng(0)
    for number in visits(tiling, order):
        values = rng.standard_normal((3, 8, 6, 7)).astype(np.float32)
        (_, expected), *others = (blender.add(number, values.copy()) for blender in blenders)
        for _, block in others:
            np.testing.assert_array_equal(block, expected)
    for blender in blenders:
        blender.close()


def test_the_longest_axis_is_the_outermost_and_only_overlaps_are_kept() -> None:
    tiling = tile((100, 128, 800), (64, 64, 64), 0.5)
    assert visiting_order(tiling)[0] == 2
    assert visiting_order(tiling, 0)[0] == 0
    order = visiting_order(tiling)
    # By hand: windows along W lie 32 voxels apart (32 are shared), along H 32, along D 18 (46 are shared).
    assert order == (2, 1, 0)
    assert carried_voxels(tiling, order) == (100 * 128 * 32, 64 * 32 * 100, 64 * 64 * 46)


def test_one_window_keeps_nothing() -> None:
    tiling = tile((5, 6, 7), (8, 8, 8), 0.5)
    assert carried_voxels(tiling, (0, 1, 2)) == (0, 0, 0)
    values = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    place, block = Blender(tiling, (0, 1, 2), 1).add((0, 0, 0), values)
    assert block is values and place == (slice(0, 8),) * 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shares_sum_to_one_everywhere(axis: int) -> None:
    tiling = tile((37, 21, 90), (16, 21, 32), 0.6)
    total = np.zeros(tiling.starts[axis][-1] + tiling.window[axis])
    for start, share in zip(tiling.starts[axis], shares(tiling, axis), strict=True):
        total[start : start + tiling.window[axis]] += share
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert prod(shares(tiling, axis).shape) == len(tiling.starts[axis]) * tiling.window[axis]
