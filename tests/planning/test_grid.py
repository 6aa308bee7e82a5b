from __future__ import annotations

import pytest
from fingerprints import fingerprint_of

from sagittal.errors import PlanError
from sagittal.planning.grid import finer_resolution, grid_of, low_resolution

LARGE = fingerprint_of(*[(300, 400, 380)] * 3)


def test_a_grid_is_along_the_networks_axes_where_that_is_meant():
    grid = grid_of(fingerprint_of((40, 30, 20), (40, 34, 20), spacings=((1.0, 1.0, 4.0),) * 2), (1.0, 1.0, 2.0))
    assert grid.transpose == (2, 0, 1)
    assert grid.network_spacing_mm == (2.0, 1.0, 1.0)
    assert grid.median_shape == (40, 40, 32)
    assert grid.dataset_voxels == 2 * 40 * 40 * 32
    assert grid.coverage((20, 40, 32)) == 0.5


def test_slices_keep_their_number():
    fingerprint = fingerprint_of((20, 40, 30), (10, 40, 30), (9, 40, 30), spacings=((5.0, 1.0, 1.0),) * 3)
    grid = grid_of(fingerprint, (2.5, 2.0, 1.0), keeps_slices=True)
    assert (grid.transpose, grid.median_shape) == ((0, 1, 2), (10, 20, 30))
    assert grid_of(fingerprint, (1.0, 1.0, 2.0), transpose=(0, 1, 2)).transpose == (0, 1, 2)


def test_the_spacing_grows_until_a_patch_covers_a_quarter_of_the_median_case():
    full = grid_of(LARGE, (1.0, 1.0, 1.0))
    grid, reason = low_resolution(full, (96, 112, 112), LARGE, lambda grid: (96, 112, 112))
    steps = 26  # the first power of 1.03 whose cube makes 45.6 million voxels at most four times the patch
    assert grid.spacing_mm == pytest.approx((1.03**steps,) * 3)
    assert 0.24 < grid.coverage((96, 112, 112)) < 0.28
    assert "cover 2.6%" in reason and "10 times fewer voxels" in reason


def test_fine_axes_grow_first_and_a_smaller_patch_needs_a_coarser_grid():
    thick = fingerprint_of(*[(100, 512, 512)] * 3, spacings=((5.0, 0.8, 0.8),) * 3)
    full = grid_of(thick, (5.0, 0.8, 0.8))
    grid, _ = low_resolution(full, (64, 160, 160), thick, lambda grid: (64, 160, 160))
    assert grid.spacing_mm[0] == 5.0
    assert grid.spacing_mm[1] == grid.spacing_mm[2] == pytest.approx(0.8 * 1.03**24)
    coarser, _ = low_resolution(full, (64, 160, 160), thick, lambda grid: (48, 128, 128))
    assert coarser.spacing_mm[1] > grid.spacing_mm[1]
    assert coarser.coverage((48, 128, 128)) >= 0.24


def test_no_coarser_configuration_where_the_patch_covers_enough():
    full = grid_of(LARGE, (1.0, 1.0, 1.0))
    with pytest.raises(PlanError, match=r"patch of 192x256x240 voxels covers 26% of the median case") as caught:
        low_resolution(full, (192, 256, 240), LARGE, lambda grid: (192, 256, 240))
    assert caught.value.code == "no_3d_low"


def test_no_coarser_configuration_that_saves_less_than_half():
    full = grid_of(LARGE, (1.0, 1.0, 1.0))
    size = (160, 224, 208)
    with pytest.raises(PlanError, match=r"covers 16\.3% .* only a factor of 1\.56 in voxels, less than 2") as caught:
        low_resolution(full, size, LARGE, lambda grid: size)
    assert caught.value.code == "no_3d_low"


SMALL = fingerprint_of(*[(36, 50, 35)] * 3)


def test_a_network_of_coarse_cells_gets_half_the_spacing_where_a_patch_still_holds_the_median_case():
    full = grid_of(SMALL, (1.0, 1.0, 1.0))
    found = finer_resolution(full, 4, SMALL, lambda grid: (72, 100, 72))
    assert found is not None
    grid, reason = found
    assert grid.spacing_mm == (0.5, 0.5, 0.5)
    assert grid.median_shape == (72, 100, 70)
    assert "cells of 4^3 voxels" in reason


@pytest.mark.parametrize(
    ("fingerprint", "stride", "patch", "keeps_slices"),
    [
        (SMALL, 1, (72, 100, 72), False),  # decides on every voxel
        (SMALL, 4, (64, 64, 64), False),  # the memory holds a part of the case
        (SMALL, 4, (72, 100, 72), True),
        (LARGE, 4, (600, 800, 760), False),  # it would take too long
    ],
)
def test_else_the_spacing_stays(fingerprint, stride, patch, keeps_slices):
    full = grid_of(fingerprint, (1.0, 1.0, 1.0), keeps_slices=keeps_slices)
    assert finer_resolution(full, stride, fingerprint, lambda grid: patch) is None
