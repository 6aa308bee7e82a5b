from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sagittal.plan.volume_range import VolumeRange


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.integers(0, 3))
def test_numbers_are_numpys_and_zeros_are_cases_without_the_label(volumes, absent):
    found = VolumeRange.of([*volumes, *[0.0] * absent])
    assert (found.present, found.absent, found.cases) == (len(volumes), absent, len(volumes) + absent)
    assert found.quantiles_ml == pytest.approx(np.quantile(volumes, [0, 0.025, 0.5, 0.975, 1]))
    logs = np.log(volumes)
    assert found.log_mad == pytest.approx(np.median(np.abs(logs - np.median(logs))))
    assert VolumeRange.from_json(found.to_json()) == found


def test_a_label_that_no_case_has_has_no_volume():
    found = VolumeRange.of([0.0, 0.0])
    assert found == VolumeRange(present=0, absent=2, quantiles_ml=None, log_mad=0.0)
    assert found.robust_z(3.0) is None


def test_robust_z_counts_deviations_of_logarithms():
    found = VolumeRange.of([2.0, 4.0, 8.0, 16.0, 1000.0])
    assert found.log_mad == pytest.approx(math.log(2))
    assert found.robust_z(8.0) == 0.0
    assert found.robust_z(1.0) == pytest.approx(-3 / 1.4826)
    assert found.robust_z(0.0) is None
    # Cases that are alike make no case unusual that is a few per cent off.
    assert VolumeRange.of([5.0] * 9).robust_z(5.5) == pytest.approx(math.log(1.1) / 0.1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"present": -1}, "must not be negative"),
        ({"quantiles_ml": None}, "None where present is 0"),
        ({"quantiles_ml": (2.0, 1.0, 3.0, 4.0, 5.0)}, "positive and ascending"),
        ({"quantiles_ml": (0.0, 1.0, 3.0, 4.0, 5.0)}, "positive and ascending"),
        ({"log_mad": -0.1}, "log_mad must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        VolumeRange.of([1.0, 2.0]).replace(**changes)
