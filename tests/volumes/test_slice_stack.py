from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.testing.strategies import affines
from sagittal.volumes.slice_stack import (
    SIDEWAYS_TOLERANCE_VOX,
    SliceStack,
    faults,
    normal_of,
    repeated,
    resample,
    resampled_grid,
    resampled_shape,
)

quick = settings(max_examples=30, deadline=None, derandomize=True)
X, Y = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])


def stack(heights, drift=(0.0, 0.0), spacing=(2.0, 1.5), shape=(6, 7)) -> SliceStack:
    heights = np.asarray(heights, dtype=np.float64)
    positions = np.stack([heights * drift[1] + 4.0, heights * drift[0] - 5.0, heights + 6.0], axis=1)
    return SliceStack(positions, X, Y, spacing, shape)


def codes(one: SliceStack) -> list[str]:
    return [fault.code for fault in faults(one)]


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 3, 6, 9], []),
        ([0, 3.01, 5.99, 9], []),
        ([0, 0.63, 1.25, 1.88, 2.5], []),
        ([0, 3, 9, 12], ["slice_gap"]),
        ([0, 3, 6, 15, 18, 24], ["slice_gap"]),
        ([0, 3, 7, 10], ["slice_spacing"]),
        ([0, 1, 2, 7, 12], ["slice_spacing"]),
        (np.cumsum([0, *[1.0] * 30, *[1.015] * 30]), ["slice_spacing"]),
        ([0, 3], []),
    ],
)
def test_even_steps_pass_and_others_are_told_apart(heights, expected):
    assert codes(stack(heights)) == expected


def test_messages_hold_the_numbers():
    (gap,) = faults(stack([0, 3, 6, 15, 18]))
    assert gap.message == "5 slices, mostly 3 mm apart, but 9 mm between slices 3 and 4: 2 missing"
    (mixed,) = faults(stack([0, 1, 2, 3, 4, 5.5, 7, 8.5, 10]))
    assert mixed.message == (
        "9 slices, mostly 1 mm apart, but 1.5 mm between slices 5 and 6, 1.5 mm between slices 6 and 7, "
        "1.5 mm between slices 7 and 8 and 1 more: "
        "mixed spacings"
    )
    (tilt,) = faults(stack([0, 3, 6, 9], drift=(0.25, 0.0)))
    assert tilt.message == "slices drift sideways by 2.25 mm, a gantry tilt of 14 degrees"


def test_rounded_positions_are_no_tilt_and_both_faults_are_told():
    assert codes(stack([0, 3, 6, 9], drift=(9e-4, 0.0))) == []
    assert codes(stack([0, 1], drift=(0.04, 0.04))) == []
    assert codes(stack([0, 3, 9, 12], drift=(0.2, 0.1))) == ["slice_gap", "gantry_tilt"]


def test_slices_that_share_a_place_are_counted():
    assert repeated(stack([0, 3, 6])) is None
    assert repeated(stack([0, 0, 3, 3, 6, 6])).message == "6 slices at 3 places, up to 2 at the same one"
    assert repeated(stack([0, 3, 3, 3, 6])).message == "5 slices at 3 places, up to 3 at the same one"
    assert repeated(stack([0, 0, 0])).message == "3 slices at 1 places, up to 3 at the same one"


def test_a_regular_stack_has_its_axes_in_file_order():
    one = stack([0, 3, 6])
    assert np.allclose(one.axes, np.diag([1.5, 2.0, 3.0]))
    assert np.allclose(normal_of(X, Y), (0, 0, 1))


@quick
@given(
    affines(),
    st.lists(st.sampled_from((1.0, 2.0, 2.5)), min_size=2, max_size=5),
    st.floats(-0.4, 0.4),
    st.floats(-0.4, 0.4),
)
def test_resampling_keeps_world_positions(affine, steps, drift_h, drift_w):
    """A linear function of the place in the world is known everywhere: inside the slices it must come out again."""
    row, column = (affine[:3, axis] / np.linalg.norm(affine[:3, axis]) for axis in (2, 1))
    normal = normal_of(row, column)
    heights = np.concatenate([[0.0], np.cumsum(steps)])
    positions = affine[:3, 3] + np.outer(heights, normal) + np.outer(heights, drift_h * column + drift_w * row)
    one = SliceStack(positions, row, column, (2.0, 1.5), (9, 8))
    slope = np.array([0.3, -0.7, 0.5])

    def world(axes, origin, shape):
        w, h, d = np.meshgrid(*[np.arange(size) for size in shape[::-1]], indexing="ij")
        return (np.stack([w, h, d], axis=-1) @ axes.T + origin).transpose(2, 1, 0, 3)

    in_plane = np.stack([row * 1.5, column * 2.0, normal], axis=1)
    voxels = np.stack([world(in_plane, origin, (1, 9, 8))[0] @ slope for origin in positions]).astype(np.float32)
    shape = resampled_shape(one)
    result = resample(one, voxels)
    assert result.shape == shape
    axes, origin = resampled_grid(one)
    assert np.allclose(axes.T @ axes, np.diag(np.diag(axes.T @ axes)), atol=1e-6)
    expected = world(axes, origin, shape) @ slope
    covered = _covered(one, shape)
    assert covered.any()
    # A drift too small to count as one stays in the voxels: at most a twentieth of a pixel of 2 mm.
    straight = all(fault.code != "gantry_tilt" for fault in faults(one))
    accepted = SIDEWAYS_TOLERANCE_VOX * 2.0 * float(np.linalg.norm(slope)) if straight else 0.0
    assert np.abs(result - expected)[covered].max() < accepted + 1e-3 * max(1.0, np.abs(expected).max())


def _covered(one: SliceStack, shape) -> np.ndarray:
    """Return where every slice lies under the voxel's whole neighbourhood."""
    lowest = np.floor(one.sideways_vox.min(axis=0)) if faults(one) and shape[1:] != one.shape else np.zeros(2)
    shifts = one.sideways_vox - lowest
    mask = np.zeros(shape, dtype=bool)
    top, left = np.ceil(shifts.max(axis=0)).astype(int)
    bottom, right = np.floor(shifts.min(axis=0)).astype(int) + one.shape
    mask[:, top:bottom, left:right] = True
    return mask


def test_slices_on_the_grid_come_out_unchanged_and_the_rest_is_the_lowest_value():
    one = stack([0, 3, 9, 12], drift=(2.0 / 3.0, 0.0))
    voxels = np.random.default_rng(0).normal(size=(4, 6, 7)).astype(np.float32)
    result = resample(one, voxels)
    assert result.shape == resampled_shape(one) == (5, 10, 7)
    for index, (slice_, top) in {0: (0, 0), 1: (1, 1), 3: (2, 3), 4: (3, 4)}.items():
        assert np.allclose(result[index, top : top + 6], voxels[slice_], atol=1e-6)
        assert np.allclose(np.delete(result[index], np.arange(top, top + 6), axis=0), voxels.min(), atol=1e-6)
