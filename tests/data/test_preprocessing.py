from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from small_scans import AXES_RAS, affine_of, ball_case

from sagittal.data.preprocessing import filled_nonzero_mask, normalize, prepare
from sagittal.errors import DataError
from sagittal.plan.plan import CTNormalization, NoNormalization, Preprocessing, RescaleToUnit, ZScore
from sagittal.volumes import Volume, read_volume

RAW = NoNormalization()
SPACING = (2.0, 1.0, 0.5)


def in_ras_spacing(**changes) -> Preprocessing:
    return Preprocessing(**{"spacing_mm": SPACING, "normalization": (RAW,), **changes})


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_every_stored_order_reaches_the_network_alike_and_comes_back_exactly(order, signs):
    """All 48 axis orders of one scan: the same prepared array, and labels back in each one's own order."""
    image, labels = ball_case((9, 11, 14), seed=0)
    canonical = prepare(Volume(image, affine_of(SPACING)), in_ras_spacing(), labels)
    flip = tuple(slice(None, None, sign) for sign in signs)
    stored = np.ascontiguousarray(image.transpose(0, *(axis + 1 for axis in order))[:, *flip])
    stored_labels = labels.transpose(order)[flip]
    axes = AXES_RAS[:, list(order)] * np.array(signs)
    spacing = tuple(SPACING[axis] for axis in order)
    prepared = prepare(Volume(stored, affine_of(spacing, axes)), in_ras_spacing(), stored_labels)
    np.testing.assert_array_equal(prepared.image, canonical.image)
    np.testing.assert_array_equal(prepared.labels, canonical.labels)
    assert prepared.frame.spacing_mm == pytest.approx(SPACING)
    back = prepared.frame.uncrop_and_unorient(prepared.labels)
    np.testing.assert_array_equal(back, stored_labels)
    assert back.shape == prepared.frame.stored_shape
    assert back.flags.c_contiguous


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(4, 9)] * 3),
    start=st.tuples(*[st.integers(0, 3)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([1, -1])] * 3),
)
def test_labels_inside_the_crop_survive_any_box_and_order(shape, start, order, signs):
    image = np.zeros((1, *shape), np.float32)
    image[:, *(slice(first, None) for first in start)] = 1.0
    labels = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    affine = affine_of((1.0, 1.0, 1.0), AXES_RAS[:, list(order)] * np.array(signs))
    prepared = prepare(Volume(image, affine), in_ras_spacing(spacing_mm=(1.0, 1.0, 1.0)), labels)
    back = prepared.frame.uncrop_and_unorient(prepared.labels)
    np.testing.assert_array_equal(back, np.where(image[0] != 0, labels, 0))


def test_every_real_axis_order_is_prepared_alike(shared_data):
    files = sorted((shared_data / "orientations").glob("*.nii.gz"))[::6]
    volumes = [read_volume(path) for path in files]
    plan = in_ras_spacing(spacing_mm=volumes[0].reoriented().spacing_mm)
    prepared = [prepare(volume, plan) for volume in volumes]
    for volume, one in zip(volumes, prepared, strict=True):
        np.testing.assert_array_equal(one.image, prepared[0].image)
        back = one.frame.uncrop_and_unorient(one.image[0])
        np.testing.assert_array_equal(back, volume.array[0])


def test_the_stored_order_is_kept_on_request():
    image, _ = ball_case((9, 11, 14), seed=0, border=0)
    affine = affine_of(SPACING, -AXES_RAS)
    prepared = prepare(Volume(image, affine), in_ras_spacing(orientation="stored"))
    np.testing.assert_array_equal(prepared.image, image)
    assert prepared.labels is None


def test_only_the_images_decide_the_crop():
    image, labels = ball_case((9, 11, 14), seed=0, border=3)
    labels[0, 0, 0] = 2
    prepared = prepare(Volume(image, affine_of(SPACING)), in_ras_spacing(), labels)
    assert prepared.image.shape == (1, 3, 5, 8)
    assert (prepared.frame.box.start, prepared.frame.cropped_shape) == ((3, 3, 3), (3, 5, 8))
    assert prepared.labels.shape == (3, 5, 8)
    whole = prepare(Volume(image, affine_of(SPACING)), in_ras_spacing(crop_to_nonzero=False), labels)
    assert whole.image.shape == image.shape


def test_the_box_is_the_union_over_channels_and_an_empty_scan_stays_whole():
    image = np.zeros((2, 5, 6, 7), np.float32)
    image[0, 1, 2, 3], image[1, 3, 2, 5] = 1.0, -1.0
    plan = in_ras_spacing(normalization=(RAW, RAW))
    volumes = [Volume(channel[None], affine_of(SPACING)) for channel in image]
    assert prepare(volumes, plan).image.shape == (2, 3, 1, 3)
    assert prepare([Volume(0 * image, affine_of(SPACING))], plan).image.shape == image.shape


def test_normalisation_comes_before_resampling():
    image, labels = ball_case((9, 11, 14), seed=0, border=0)
    prepared = prepare(
        Volume(image, affine_of(SPACING)), in_ras_spacing(spacing_mm=(1.0, 1.0, 1.0), normalization=(ZScore(),)), labels
    )
    assert prepared.image.shape == (1, 18, 11, 7)
    assert prepared.labels.shape == prepared.frame.prepared_shape == (18, 11, 7)
    z = (image - image.mean()) / image.std()
    assert prepared.image.min() >= z.min() - 1e-5 and prepared.image.max() <= z.max() + 1e-5
    assert set(np.unique(prepared.labels)) == {0, 1, 2}


def test_thick_slices_keep_their_planes():
    image, _ = ball_case((6, 10, 12), seed=1, border=0)
    plan = in_ras_spacing(spacing_mm=(2.5, 1.0, 1.0))
    prepared = prepare(Volume(image, affine_of((5.0, 1.0, 1.0))), plan)
    np.testing.assert_array_equal(prepared.image, np.repeat(image, 2, axis=1))


def test_z_scores_of_huge_intensities_are_exact():
    image = np.random.default_rng(0).normal(3e6, 20.0, (1, 20, 30, 25)).astype(np.float32)
    (z,) = normalize(image, [ZScore()])
    assert z.dtype == np.float32
    expected = image[0].astype(np.float64)
    np.testing.assert_allclose(z, (expected - expected.mean()) / expected.std(), atol=0.02)
    assert abs(z.mean(dtype=np.float64)) < 0.01 and z.std(dtype=np.float64) == pytest.approx(1.0, abs=1e-3)


def test_z_scores_inside_the_mask_leave_the_outside_zero():
    image, _ = ball_case((9, 11, 14), seed=0)
    (z,) = normalize(image, [ZScore(nonzero_only=True)])
    inside = filled_nonzero_mask(image)
    assert not z[~inside].any()
    assert z[inside].mean() == pytest.approx(0.0, abs=1e-5) and z[inside].std() == pytest.approx(1.0, abs=1e-5)


def test_holes_belong_to_the_mask_as_in_scipy():
    rng = np.random.default_rng(3)
    image = (rng.random((2, 9, 10, 11)) < 0.35).astype(np.float32)
    expected = ndimage.binary_fill_holes((image != 0).any(axis=0))
    assert expected.sum() > (image != 0).any(axis=0).sum()
    np.testing.assert_array_equal(filled_nonzero_mask(image), expected)


def test_each_scheme_by_hand():
    image = np.array([-10.0, 0, 5, 30], np.float32).reshape(1, 1, 2, 2)
    ct = CTNormalization(lower=-5.0, upper=20.0, mean=5.0, std=2.5)
    assert normalize(image, [ct]).ravel().tolist() == [-4.0, -2.0, 0.0, 6.0]
    assert normalize(image, [RescaleToUnit()]).ravel().tolist() == [0.0, 0.25, 0.375, 1.0]
    assert normalize(image, [RAW]).ravel().tolist() == image.ravel().tolist()
    assert normalize(np.full_like(image, 4.0), [ZScore()]).ravel().tolist() == [0.0] * 4
    assert normalize(np.full_like(image, 4.0), [RescaleToUnit()]).ravel().tolist() == [0.0] * 4
    assert normalize(np.zeros_like(image), [ZScore(nonzero_only=True)]).ravel().tolist() == [0.0] * 4


def test_another_number_of_channels_is_refused():
    image, _ = ball_case((9, 11, 14), seed=0, channels=2)
    with pytest.raises(DataError, match="2 channels; the plan has 1") as caught:
        prepare(Volume(image, affine_of(SPACING)), in_ras_spacing())
    assert caught.value.code == "channel_count"


def test_channels_and_labels_of_other_shapes_are_refused():
    image, labels = ball_case((9, 11, 14), seed=0)
    volume = Volume(image, affine_of(SPACING))
    smaller = Volume(image[:, 1:], affine_of(SPACING))
    with pytest.raises(DataError, match=r"different shapes .*\(8, 11, 14\)"):
        prepare([volume, smaller], in_ras_spacing(normalization=(RAW, RAW)))
    with pytest.raises(DataError, match=r"label map has shape \(8, 11, 14\) \(D, H, W\), its image \(9, 11, 14\)"):
        prepare(volume, in_ras_spacing(), labels[1:])
