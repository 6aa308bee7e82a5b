from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from small_scans import ball_case

from sagittal.data.normalizing import nonzero_mask, scaling
from sagittal.plan.plan import CTNormalization, NoNormalization, Normalization, RescaleToUnit, ZScore


def normalize(image: np.ndarray, schemes: list[Normalization]) -> np.ndarray:
    """Each channel by its scheme, in two pieces."""
    mask = nonzero_mask(list(image))
    out = np.empty_like(image)
    for channel, scheme, target in zip(image, schemes, out, strict=True):
        found = scaling(channel, scheme, mask)
        for rows in (slice(0, 1), slice(1, None)):
            where = (rows, slice(None), slice(None))
            target[where] = found.apply(channel[where], where)
        low, high = found.bounds(channel)
        assert low - 0.01 <= target.min() and target.max() <= high + 0.01
    return out


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
    inside = nonzero_mask(list(image))
    assert not z[~inside].any()
    assert z[inside].mean() == pytest.approx(0.0, abs=1e-5) and z[inside].std() == pytest.approx(1.0, abs=1e-5)


def test_holes_belong_to_the_mask_as_in_scipy():
    rng = np.random.default_rng(3)
    image = (rng.random((2, 9, 10, 11)) < 0.35).astype(np.float32)
    expected = ndimage.binary_fill_holes((image != 0).any(axis=0))
    assert expected.sum() > (image != 0).any(axis=0).sum()
    np.testing.assert_array_equal(nonzero_mask(list(image)), expected)


def test_each_scheme_by_hand():
    image = np.array([-10.0, 0, 5, 30], np.float32).reshape(1, 1, 2, 2)
    ct = CTNormalization(lower=-5.0, upper=20.0, mean=5.0, std=2.5)
    assert normalize(image, [ct]).ravel().tolist() == [-4.0, -2.0, 0.0, 6.0]
    assert normalize(image, [RescaleToUnit()]).ravel().tolist() == [0.0, 0.25, 0.375, 1.0]
    assert normalize(image, [NoNormalization()]).ravel().tolist() == image.ravel().tolist()
    assert normalize(np.full_like(image, 4.0), [ZScore()]).ravel().tolist() == [0.0] * 4
    assert normalize(np.full_like(image, 4.0), [RescaleToUnit()]).ravel().tolist() == [0.0] * 4
    assert normalize(np.zeros_like(image), [ZScore(nonzero_only=True)]).ravel().tolist() == [0.0] * 4
