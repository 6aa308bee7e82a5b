from __future__ import annotations

import pytest
from fingerprints import fingerprint_of

from sagittal.plan.plan import CTNormalization, NoNormalization, RescaleToUnit, ZScore
from sagittal.planning.normalization import normalization

CT = CTNormalization(lower=-20.0, upper=250.0, mean=100.0, std=20.0)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("CT", CT),
        ("ct", CT),
        ("noNorm", NoNormalization()),
        ("zscore", ZScore()),
        ("rescale_to_0_1", RescaleToUnit()),
        ("rgb_to_0_1", RescaleToUnit()),
        ("T1", ZScore()),
        ("FLAIR", ZScore()),
    ],
)
def test_the_channels_name_decides(name, scheme):
    schemes, reason = normalization((name,), fingerprint_of((9, 9, 9)))
    assert schemes == (scheme,)
    assert reason.startswith(f"'{name}': ") and "warning" not in reason


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("ct_scan", "if it holds Hounsfield units, name it 'CT'"),
        ("CTA", "if it holds Hounsfield units, name it 'CT'"),
        ("no_norm", "did you mean 'noNorm'?"),
        ("z-score", "did you mean 'zscore'?"),
        ("rescale_0_1", "did you mean 'rescale_to_0_1'?"),
    ],
)
def test_a_slip_of_the_pen_is_warned_about(name, warning):
    schemes, reason = normalization((name,), fingerprint_of((9, 9, 9)))
    assert schemes == (ZScore(),)
    assert f"(warning: {warning}" in reason


def test_z_scores_inside_the_mask_where_the_crop_saves_a_quarter():
    for share, inside in ((0.74, True), (0.75, False)):
        names = ("T1", "T2", "CT")
        schemes, reason = normalization(names, fingerprint_of((9, 9, 9), channels=3, crop_share=share))
        assert schemes == (ZScore(nonzero_only=inside), ZScore(nonzero_only=inside), CT)
        assert ("inside the non-zero mask" in reason) == inside
        assert reason.startswith("'T1', 'T2': z-score of each image")


def test_a_constant_ct_can_be_divided():
    fingerprint = fingerprint_of((9, 9, 9))
    flat = fingerprint.replace(intensities=(fingerprint.intensities[0].replace(std=0.0),))
    ((scheme,), _) = normalization(("CT",), flat)
    assert scheme.std > 0
