from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.testing.strategies import affines, geometries, shapes
from sagittal.volumes.geometry import (
    Geometry,
    Reorientation,
    axis_codes,
    describe,
    differences,
    direction_of,
    is_sheared,
    is_usable,
    reorientation_to_ras,
    reverse_axes,
    shifted,
    spacing_of,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)


def a_grid(shape=(4, 5, 6), spacing=(5.0, 0.78, 0.78), origin=(10.0, -20.0, 30.0)) -> Geometry:
    affine = np.diag((spacing[2], spacing[1], spacing[0], 1.0))
    affine[:3, 3] = origin
    return Geometry(shape, reverse_axes(affine))


def test_the_slowest_axis_is_the_file_s_last():
    file_affine = np.array([[0.5, 0, 0, 1], [0, 0.6, 0, 2], [0, 0, 5.0, 3], [0, 0, 0, 1.0]])
    affine = reverse_axes(file_affine)
    assert spacing_of(affine) == (5.0, 0.6, 0.5)
    d, h, w = 7, 3, 2
    assert np.array_equal(affine @ (d, h, w, 1), file_affine @ (w, h, d, 1))
    assert np.array_equal(reverse_axes(affine), file_affine)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_all_48_axis_orders_become_one(order, signs):
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    home = Geometry((2, 3, 4), reverse_axes(np.array([[2.0, 0, 0, 5], [0, 3, 0, -6], [0, 0, 4, 7], [0, 0, 0, 1]])))
    stored_as = Reorientation(tuple(order), tuple(sign < 0 for sign in signs))
    stored, affine = stored_as.apply(volume), stored_as.affine(home.affine, home.shape)
    back = reorientation_to_ras(affine)
    assert back == stored_as.inverse()
    assert np.array_equal(back.apply(stored), volume)
    assert np.array_equal(back.affine(affine, stored.shape), home.affine)
    assert back.shape(stored.shape) == home.shape


@quick
@given(geometries())
def test_reorientation_agrees_with_nibabel_oblique_or_not(geometry):
    array = np.arange(np.prod(geometry.shape)).reshape(geometry.shape)
    image = nib.Nifti1Image(array.T.astype(np.int32), reverse_axes(geometry.affine))
    canonical = nib.as_closest_canonical(image)
    change = reorientation_to_ras(geometry.affine)
    assert np.array_equal(change.apply(array), np.asarray(canonical.dataobj).T)
    assert np.allclose(change.affine(geometry.affine, geometry.shape), reverse_axes(canonical.affine), atol=1e-9)
    assert axis_codes(change.affine(geometry.affine, geometry.shape)) == "SAR"
    assert axis_codes(geometry.affine) == "".join(nib.aff2axcodes(image.affine))[::-1]


@quick
@given(geometries(), st.randoms(use_true_random=False))
def test_reorienting_keeps_every_voxel_where_it_is(geometry, random):
    change = reorientation_to_ras(geometry.affine)
    labelled = np.arange(np.prod(geometry.shape)).reshape(geometry.shape)
    turned = change.apply(labelled)
    moved = change.affine(geometry.affine, geometry.shape)
    index = [random.randrange(size) for size in geometry.shape]
    found = np.argwhere(turned == labelled[tuple(index)])[0]
    assert np.allclose(geometry.affine @ [*index, 1], moved @ [*found, 1], atol=1e-9)
    undo = change.inverse()
    assert np.array_equal(undo.apply(turned), labelled)
    assert np.allclose(undo.affine(moved, turned.shape), geometry.affine, atol=1e-9)
    assert change.is_identity == (axis_codes(geometry.affine) == "SAR")


def test_reorientation_leaves_channels_in_front():
    array = np.zeros((2, 3, 4, 5))
    assert Reorientation((2, 0, 1), (True, False, False)).apply(array).shape == (2, 5, 3, 4)


@quick
@given(affines(), shapes())
def test_shifting_moves_the_first_voxel(affine, start):
    assert np.allclose(shifted(affine, start) @ [0, 0, 0, 1], affine @ [*start, 1])
    assert np.array_equal(shifted(affine, start)[:3, :3], affine[:3, :3])


@quick
@given(affines())
def test_direction_times_spacing_is_the_affine(affine):
    assert np.allclose(direction_of(affine) * spacing_of(affine), affine[:3, :3])
    assert not is_sheared(affine)
    assert is_usable(affine)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(3),
        np.diag([1.0, 1, np.nan, 1]),
        np.diag([1.0, 0, 1, 1]),
        np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.diag([1.0, 1, 1, 2]),
    ],
    ids=["3x3", "nan", "flat", "parallel axes", "last row"],
)
def test_unusable_affines_are_told(affine):
    assert not is_usable(affine)


def test_a_shear_is_told():
    affine = np.eye(4)
    affine[0, 1] = 0.1
    assert is_sheared(affine)
    assert is_usable(affine)


@quick
@given(geometries(), st.integers(0, 2**32 - 1))
def test_noise_in_the_last_digits_is_forgiven(geometry, seed):
    noise = np.random.default_rng(seed).uniform(-1e-8, 1e-8, (3, 4))
    other = geometry.affine.copy()
    other[:3] += noise
    assert differences(geometry, Geometry(geometry.shape, other)) == ()


def test_spacing_is_compared_with_numbers():
    found = differences(a_grid(), a_grid(spacing=(5.0, 0.80, 0.80)))
    assert [difference.kind for difference in found] == ["spacing"]
    assert describe(found) == "spacing_mm (5, 0.78, 0.78) against (5, 0.8, 0.8), 2.6 % apart, tolerance 0.1 %"


def test_each_difference_is_told():
    grid = a_grid()
    assert [each.kind for each in differences(grid, a_grid(shape=(4, 5, 7)))] == ["shape"]
    assert [each.kind for each in differences(grid, a_grid(origin=(10.0, -20.0, 32.0)))] == ["origin"]
    assert "2 mm apart" in describe(differences(grid, a_grid(origin=(10.0, -20.0, 32.0))))
    flipped = grid.affine.copy()
    flipped[:3, 2] *= -1
    (direction,) = differences(grid, Geometry(grid.shape, flipped))
    assert direction.kind == "direction"
    assert "SAR against SAL, 180 degrees apart" in direction.message


def test_a_small_tilt_beyond_the_tolerance_is_told_and_one_within_is_not():
    grid = a_grid()

    def tilted(degrees: float) -> Geometry:
        angle = np.radians(degrees)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = turn @ grid.affine
        affine[:3, 3] = grid.affine[:3, 3]
        return Geometry(grid.shape, affine)

    assert [each.kind for each in differences(grid, tilted(0.2))] == ["direction"]
    assert differences(grid, tilted(0.05)) == ()
