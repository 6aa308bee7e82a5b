from __future__ import annotations

import pytest

from sagittal.planning.unet_stages import coarse_axes, unet_stages

ONE, TWO, THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)


def test_a_cube_is_halved_until_four_voxels_are_left():
    stages = unet_stages((1.0, 1.0, 1.0), (128, 128, 128))
    assert stages.strides == (ONE, *[TWO] * 5)
    assert stages.kernel_sizes == (THREE,) * 6


def test_thick_slices_are_halved_and_convolved_once_the_plane_is_as_coarse():
    """nnU-Net's own plan for the prostate (Task05): 20x320x256 voxels of 3.6 x 0.62 x 0.62 mm."""
    stages = unet_stages((3.6, 0.62, 0.62), (20, 320, 256))
    plane = (1, 2, 2)
    assert stages.strides == (ONE, plane, plane, TWO, TWO, plane, plane)
    assert stages.kernel_sizes == ((1, 3, 3), (1, 3, 3), *[THREE] * 5)


def test_an_axis_left_alone_needs_twelve_voxels():
    assert unet_stages((1.0, 1.0, 1.0), (7, 11, 7)).strides == (ONE, TWO)
    assert unet_stages((1.0, 1.0, 1.0), (7, 12, 7)).strides == (ONE, (1, 2, 1))


def test_slices_are_halved_by_the_same_rules():
    stages = unet_stages((0.5, 0.8), (40, 512))
    assert stages.strides == ((1, 1), *[(2, 2)] * 3, *[(1, 2)] * 3)
    assert set(stages.kernel_sizes) == {(3, 3)}
    assert unet_stages((1.0, 1.0), (4, 7)).strides == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("spacing", "axes"), [((1.0, 1.0, 1.0), ()), ((1.0, 1.9, 1.0), ()), ((2.0, 1.0, 1.3), (0,)), ((5.0, 0.8), (0,))]
)
def test_an_axis_is_coarse_from_twice_the_finest_on(spacing, axes):
    assert coarse_axes(spacing) == axes
