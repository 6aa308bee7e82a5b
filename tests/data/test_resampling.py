from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from scipy import ndimage

from sagittal.data.resampling import resample_image, resample_labels, separate_axis

SHAPES = [(7, 20, 9), (22, 28, 18), (5, 5, 5), (1, 3, 40)]


def reference(volume: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """scikit-image's resize(mode="edge", anti_aliasing=False, clip=True): this call of scipy, then the clamp."""
    factors = [out / size for out, size in zip(shape, volume.shape, strict=True)]
    resized = ndimage.zoom(volume.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(resized, volume.min(), volume.max())


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 11, 14, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 4, (3, 4, 3))
    return ndimage.zoom(coarse, 4, order=0).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_resampled_as_nnunet_does(image, shape):
    expected = np.stack([reference(channel, shape, 3) for channel in image])
    np.testing.assert_allclose(resample_image(image, shape), expected, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_take_the_largest_share(labels, shape):
    shares = np.stack([reference((labels == index).astype(float), shape, 1) for index in range(4)])
    resampled = resample_labels(labels, shape)
    assert resampled.dtype == np.uint8
    # The scores of equal shares are rounded apart; there any of the tied indices is right.
    chosen = np.take_along_axis(shares, resampled[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(chosen, shares.max(axis=0), atol=1e-9)


def test_a_tie_goes_to_the_nearest_voxel_where_that_is_tied_and_else_to_the_smallest_index():
    labels = np.array([3, 1, 1, 1, 2, 2, 2, 3], np.uint8).reshape(2, 2, 2)
    assert resample_labels(labels, (1, 1, 1)).item() == 1
    line = np.array([5, 5, 2, 2], np.uint8).reshape(1, 1, 4)
    assert resample_labels(line, (1, 1, 2)).ravel().tolist() == [5, 2]
    # Between 5 and 2 the middle of three voxels has shares of one half; scipy's nearest voxel there is the second.
    middle = resample_labels(np.array([5, 2], np.uint8).reshape(1, 1, 2), (1, 1, 3)).ravel()
    assert middle.tolist() == [5, 2, 2]


def test_many_labels_and_slabs_give_the_same():
    labels = np.random.default_rng(4).integers(0, 300, (9, 8, 7)).astype(np.uint16)
    whole = resample_labels(labels, (13, 11, 5))
    with patch("sagittal.data.resampling.PIECE_BYTES", 1):
        np.testing.assert_array_equal(resample_labels(labels, (13, 11, 5)), whole)


@pytest.mark.parametrize("apart", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(7, 20, 9), (22, 28, 5), (11, 9, 18)])
def test_pieces_give_the_same_image(image, shape, apart):
    whole = resample_image(image, shape, apart=apart)
    with patch("sagittal.data.resampling.PIECE_BYTES", 1):
        np.testing.assert_allclose(resample_image(image, shape, apart=apart), whole, atol=1e-6)


def test_a_separate_axis_takes_the_nearest_plane(image):
    shape = (23, 7, 15)
    flat = np.stack(
        [np.stack([reference(plane[None], (1, *shape[1:]), 3)[0] for plane in channel]) for channel in image]
    )
    nearest = np.floor((np.arange(23) + 0.5) * 11 / 23).astype(int)
    np.testing.assert_allclose(resample_image(image, shape, apart=0), flat[:, nearest], atol=5e-6)


@pytest.mark.parametrize("apart", [0, 1, 2])
def test_labels_keep_their_planes_along_a_separate_axis(labels, apart):
    shape = tuple(27 if axis == apart else size for axis, size in enumerate(labels.shape))
    nearest = np.floor((np.arange(27) + 0.5) * labels.shape[apart] / 27).astype(int)
    np.testing.assert_array_equal(resample_labels(labels, shape, apart=apart), labels.take(nearest, axis=apart))


def test_the_same_shape_is_the_same_array(image, labels):
    assert resample_image(image, (11, 14, 9)) is image
    assert resample_labels(labels, labels.shape) is labels


def test_large_intensities_keep_their_range():
    image = np.random.default_rng(2).uniform(0, 5e6, (1, 9, 7, 8)).astype(np.float32)
    resampled = resample_image(image, (18, 5, 11))
    assert image.min() <= resampled.min() and resampled.max() <= image.max()
    np.testing.assert_allclose(resampled[0], reference(image[0], (18, 5, 11), 3), rtol=1e-5, atol=5)


@pytest.mark.parametrize(
    ("spacing", "target", "axis"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        ((5.0, 0.8, 0.8), (5.0, 0.8, 0.8), 0),
        ((0.8, 0.8, 5.0), (1.0, 1.0, 1.0), 2),
        ((1.0, 1.0, 1.0), (0.5, 4.0, 0.5), 1),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        ((5.0, 5.0, 1.0), (1.0, 1.0, 9.0), None),
    ],
)
def test_the_coarsest_axis_is_kept_apart_beyond_the_threshold(spacing, target, axis):
    assert separate_axis(spacing, target, 3.0) == axis
