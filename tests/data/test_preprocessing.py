from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_scans import AXES_RAS, affine_of, ball_case

from sagittal.data.preprocessing import prepare
from sagittal.errors import DataError
from sagittal.plan.plan import CTNormalization, NoNormalization, Preprocessing, ZScore
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


def test_a_transposition_turns_the_arrays_and_comes_back_exactly():
    image, labels = ball_case((9, 11, 14), seed=0)
    scan = Volume(image, affine_of(SPACING))
    plain = prepare(scan, in_ras_spacing(), labels)
    turned = prepare(scan, in_ras_spacing(transpose=(2, 0, 1)), labels)
    np.testing.assert_array_equal(turned.image, plain.image.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(turned.labels, plain.labels.transpose(2, 0, 1))
    assert turned.frame.spacing_mm == pytest.approx((0.5, 2.0, 1.0))
    np.testing.assert_array_equal(turned.frame.uncrop_and_unorient(turned.labels), labels)


def test_the_target_spacing_is_along_the_axes_before_the_transposition():
    image, _ = ball_case((6, 11, 14), seed=0, border=0)
    plan = in_ras_spacing(transpose=(1, 0, 2), spacing_mm=(1.0, 1.0, 0.5))
    assert prepare(Volume(image, affine_of(SPACING)), plan).image.shape == (1, 11, 12, 14)


def test_a_compact_image_is_float16_where_that_holds_its_values():
    image, _ = ball_case((9, 11, 14), seed=0, border=0)
    plan = in_ras_spacing(normalization=(ZScore(),), spacing_mm=(1.0, 1.0, 1.0))
    whole, half = (prepare(Volume(image, affine_of(SPACING)), plan, compact=compact).image for compact in (False, True))
    assert (whole.dtype, half.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    assert prepare(Volume(image, affine_of(SPACING)), in_ras_spacing(), compact=True).image.dtype == np.float32
    image[0, 0, 0, 0] = 1e9
    wide = CTNormalization(lower=-5.0, upper=2e9, mean=5.0, std=2.5)
    far = prepare(Volume(image, affine_of(SPACING)), in_ras_spacing(normalization=(wide,)), compact=True)
    assert far.image.dtype == np.float32


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


def test_slices_keep_their_number_where_the_plan_says_so():
    image, labels = ball_case((9, 11, 14), seed=0)
    case = Volume(image, affine_of((4.0, 2.0, 1.0)))
    thin = in_ras_spacing(crop_to_nonzero=False)
    assert prepare(case, thin, labels).labels.shape == (18, 22, 28)
    prepared = prepare(case, thin.replace(keeps_slices=True), labels)
    assert prepared.image.shape == (1, 9, 22, 28)
    turned = thin.replace(keeps_slices=True, transpose=(2, 0, 1))
    assert prepare(case, turned, labels).labels.shape == (14, 18, 22)
