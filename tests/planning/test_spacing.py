from __future__ import annotations

import pytest
from fingerprints import fingerprint_of

from sagittal.planning.spacing import median_shape, target_spacing


def test_the_median_of_each_axis():
    fingerprint = fingerprint_of(
        *[(90, 100, 110)] * 3, spacings=((1.0, 0.7, 0.8), (2.0, 0.9, 0.8), (1.5, 0.8000000119, 0.8))
    )
    spacing, reason = target_spacing(fingerprint, 3.0)
    assert spacing == pytest.approx((1.5, 0.8, 0.8), abs=1e-7)
    assert reason == "median spacing of 3 cases, (1.5, 0.8, 0.8) mm (D, H, W); not anisotropic (1.87 <= 3)"


def test_few_thick_slices_take_the_tenth_percentile():
    thickness = [2.0, 3.0, 5.0, 5.0, 5.0]
    fingerprint = fingerprint_of(*[(20, 200, 210)] * 5, spacings=tuple((length, 0.8, 0.8) for length in thickness))
    spacing, reason = target_spacing(fingerprint, 3.0)
    assert spacing == (2.4, 0.8, 0.8)
    assert "axis D is anisotropic (6.25 > 3)" in reason and "10th percentile, 2.4 mm" in reason


def test_the_coarse_axis_stays_coarser_than_the_others():
    fingerprint = fingerprint_of(*[(200, 210, 20)] * 3, spacings=((0.8, 0.8, 0.1), (0.8, 0.8, 5.0), (0.8, 0.8, 5.0)))
    assert target_spacing(fingerprint.replace(spacings_mm=((0.8, 0.8, 0.1),) * 3), 3.0)[0] == (0.8, 0.8, 0.1)
    spacing, _ = target_spacing(fingerprint, 3.0)
    assert spacing == (0.8, 0.8, pytest.approx(1.08))
    finer = fingerprint.replace(
        spacings_mm=((0.8, 0.8, 0.1), (0.8, 0.8, 0.1), (0.8, 0.8, 5.0), (0.8, 0.8, 5.0)),
        shapes_vox=((200, 210, 20),) * 4,
    )
    assert target_spacing(finer, 3.0)[0] == (0.8, 0.8, 0.80001)


def test_a_coarse_axis_with_many_voxels_keeps_its_median():
    fingerprint = fingerprint_of(*[(80, 200, 210)] * 3, spacings=((4.0, 0.8, 0.8), (5.0, 0.8, 0.8), (6.0, 0.8, 0.8)))
    spacing, reason = target_spacing(fingerprint, 3.0)
    assert spacing == (5.0, 0.8, 0.8)
    assert "its 80 voxels are not 3 times fewer than the 200 of the others" in reason


def test_the_threshold_itself_is_not_anisotropic():
    fingerprint = fingerprint_of((10, 200, 210), spacings=((3.0, 1.0, 1.0),))
    spacing, reason = target_spacing(fingerprint, 3.0)
    assert spacing == (3.0, 1.0, 1.0)
    assert reason.startswith("median spacing of 1 case,") and "3 <= 3" in reason


def test_the_median_case_is_taken_after_resampling():
    fingerprint = fingerprint_of(
        (10, 40, 30), (20, 40, 50), (15, 60, 30), spacings=((2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (2.0, 0.5, 1.0))
    )
    assert median_shape(fingerprint, (1.0, 1.0, 2.0)) == (20, 40, 15)
    assert median_shape(fingerprint, (1.0, 1.0, 2.0), keeps_slices=True) == (15, 40, 15)
