from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sagittal.data.resampling import indices_present, resample_image, resample_labels, separate_axis

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
def test_labels_are_resampled_one_by_one_in_ascending_order(labels, shape):
    expected = np.zeros(shape, np.uint8)
    for index in (1, 2, 3):
        # Half a millionth below one half: float32 and float64 may round a tie apart.
        expected[reference((labels == index).astype(float), shape, 1) >= 0.5 - 5e-7] = index
    resampled = resample_labels(labels, shape)
    assert resampled.dtype == np.uint8
    assert (resampled != expected).mean() < 0.001


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


def test_where_no_label_reaches_one_half_background_stays():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0] = 1
    assert not resample_labels(labels, (2, 2, 2)).any()


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


def test_present_indices_are_found_without_the_background():
    labels = np.zeros((3, 4, 5), np.uint16)
    labels[2, 1, 1], labels[0, 0, 0] = 400, 7
    assert indices_present(labels) == (7, 400)
    assert indices_present(np.ones((1, 2, 2), np.uint8)) == (1,)
