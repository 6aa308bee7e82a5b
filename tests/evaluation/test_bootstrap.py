"""Bootstrap intervals against scipy's, against what they promise, and where there is too little to say anything."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sagittal.evaluation.bootstrap import bootstrap_means


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(3).gamma(2.0, 1.0, (400, 1))
    wanted = stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_means(values, resamples=20_000).columns[0]
    assert found.mean == pytest.approx(values.mean())
    width = wanted.high - wanted.low
    assert found.low is not None and found.high is not None
    assert abs(found.low - wanted.low) < 0.02 * width
    assert abs(found.high - wanted.high) < 0.02 * width


@pytest.mark.parametrize("cases", [8, 40])
def test_intervals_hold_the_true_mean_as_often_as_they_promise(cases: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        found = bootstrap_means(rng.normal(0.8, 0.1, (cases, 1)), resamples=600).columns[0]
        assert found.low is not None and found.high is not None
        held += found.low <= 0.8 <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_scans_of_one_patient_count_as_one_piece_of_evidence() -> None:
    patients = np.random.default_rng(5).normal(0.8, 0.1, (20, 1))
    once = bootstrap_means(patients)
    scans = np.repeat(patients, 6, axis=0)
    whose = [f"patient_{number // 6}" for number in range(len(scans))]
    by_patient, by_scan = bootstrap_means(scans, whose).columns[0], bootstrap_means(scans).columns[0]
    assert by_patient[:3] == pytest.approx(once.columns[0][:3])
    assert by_patient.n == 120
    assert by_scan.high is not None and by_scan.low is not None
    assert by_patient.high is not None and by_patient.low is not None
    assert by_scan.high - by_scan.low < 0.6 * (by_patient.high - by_patient.low)


def test_the_mean_over_classes_has_an_interval_of_its_own() -> None:
    # Two classes that go against each other: their mean is the same in every case, so nothing about it is uncertain.
    first = np.random.default_rng(2).uniform(0, 1, 30)
    found = bootstrap_means(np.stack([first, 1 - first], axis=1))
    assert found.overall == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5), 30)
    assert found.columns[0].low is not None and found.columns[0].low < 0.49


def test_undefined_cases_are_in_no_mean_and_too_few_have_no_bounds() -> None:
    nan = np.nan
    values = np.array([[0.5, nan, nan], [0.7, 0.4, nan], [nan, nan, nan]])
    some, one, none = bootstrap_means(values).columns
    assert (some.mean, some.n) == (pytest.approx(0.6), 2)
    assert some.low is not None and some.high is not None and 0.5 <= some.low <= some.high <= 0.7
    assert one == (pytest.approx(0.4), None, None, 1)
    assert none == (None, None, None, 0)
    same_patient = bootstrap_means(values[:2], ["a", "a"]).columns[0]
    assert same_patient == (pytest.approx(0.6), None, None, 2)


def test_nothing_at_all_has_no_mean() -> None:
    found = bootstrap_means(np.empty((0, 2)))
    assert found.overall == (None, None, None, 0)
    assert [column.n for column in found.columns] == [0, 0]


def test_equal_values_have_an_interval_without_width_and_the_seed_decides_on_the_bits() -> None:
    assert bootstrap_means(np.full((9, 1), 0.25)).columns[0] == (0.25, 0.25, 0.25, 9)
    values = np.random.default_rng(7).normal(size=(15, 2))
    assert bootstrap_means(values) == bootstrap_means(values)
    assert bootstrap_means(values) != bootstrap_means(values, seed=1)
