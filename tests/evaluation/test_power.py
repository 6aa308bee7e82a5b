"""Equivalence against scipy's t tests, power against the noncentral t and against simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sagittal.evaluation.power import (
    analyse_power,
    equivalence_test,
    patients_needed,
    power_to_equal,
    power_to_show,
)


@pytest.mark.parametrize(("shift", "count"), [(0.0, 40), (0.002, 40), (0.006, 12), (-0.004, 25)])
def test_equivalence_is_the_worse_of_two_one_sided_t_tests(shift: float, count: int) -> None:
    differences = np.random.default_rng(count).normal(shift, 0.008, count)
    found = equivalence_test(np.append(differences, np.nan), 0.005)
    above = stats.ttest_1samp(differences, -0.005, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.005, alternative="less").pvalue
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert found is not None
    assert found.p == pytest.approx(max(above, below), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.equivalent == (found.low > -0.005 and found.high < 0.005) == (found.p < 0.05)


def test_equivalence_of_equal_differences_needs_no_t_test() -> None:
    same, far = equivalence_test(np.zeros(4), 0.005), equivalence_test(np.full(4, 0.02), 0.005)
    assert same is not None and same.equivalent
    assert far is not None and not far.equivalent
    assert equivalence_test(np.array([0.001]), 0.005) is None


@pytest.mark.parametrize(("patients", "effect"), [(5, 0.5), (34, 0.5), (200, 0.2), (3000, 0.03)])
def test_power_is_that_of_the_noncentral_t(patients: int, effect: float) -> None:
    critical, shift = stats.t.ppf(0.975, patients - 1), effect * math.sqrt(patients)
    wanted = stats.nct.sf(critical, patients - 1, shift) + stats.nct.cdf(-critical, patients - 1, shift)
    assert power_to_show(patients, effect) == pytest.approx(wanted, abs=1e-9)
    assert power_to_show(patients, -effect) == power_to_show(patients, effect)


def test_patients_needed_are_those_of_cohens_tables() -> None:
    # Cohen (1988), table 2.3.5 by way of any power calculator: a paired t test, d_z 0.5 and 0.2, two-sided 5 %.
    assert patients_needed(lambda n: power_to_show(n, 0.5), 0.8) == 34
    assert patients_needed(lambda n: power_to_show(n, 0.5), 0.9) == 44
    assert patients_needed(lambda n: power_to_show(n, 0.2), 0.8) == 199
    assert patients_needed(lambda n: power_to_show(n, 1e-9), 0.8) is None
    assert patients_needed(lambda _: 1.0, 0.8) == 2


@pytest.mark.parametrize("threshold", [2, 3, 5, 8, 9, 1000])
def test_the_search_finds_the_first_number_that_suffices(threshold: int) -> None:
    assert patients_needed(lambda n: float(n >= threshold), 0.8) == threshold


def test_power_of_equality_is_that_of_studies_drawn() -> None:
    rng = np.random.default_rng(1)
    for patients in (40, 60):
        drawn = rng.normal(0, 1, (20_000, patients))
        reach = stats.t.ppf(0.95, patients - 1) * drawn.std(1, ddof=1) / math.sqrt(patients)
        share = (np.abs(drawn.mean(1)) + reach < 0.5).mean()
        assert power_to_equal(patients, 0.5) == pytest.approx(share, abs=0.01)


def test_numbers_of_patients_are_confirmed_by_simulation() -> None:
    differences = np.random.default_rng(2).normal(0.01, 0.02, 60)
    found = analyse_power(differences, 0.005)
    assert found is not None
    assert found.standard_deviation == pytest.approx(differences.std(ddof=1))
    assert found.patients == 60
    for needed in (*found.to_show, *found.to_equal):
        assert needed.patients is not None
        assert needed.simulated == pytest.approx(needed.power, abs=0.04)
    assert found.to_show[0].patients < found.to_show[1].patients  # type: ignore[operator]
    assert found.smallest_shown is not None
    assert power_to_show(60, found.smallest_shown / found.standard_deviation) == pytest.approx(0.8, abs=1e-6)
    assert analyse_power(differences, 0.005) == found


def test_without_spread_there_is_nothing_to_go_by_and_without_simulations_none_are_told() -> None:
    assert analyse_power(np.full(9, 0.01), 0.005) is None
    assert analyse_power(np.array([0.01, np.nan]), 0.005) is None
    found = analyse_power(np.array([0.01, 0.03, 0.0]), 0.005, simulations=0)
    assert found is not None
    assert [needed.simulated for needed in found.to_show] == [None, None]


def test_a_spread_that_would_take_more_than_a_million_is_told_as_such() -> None:
    found = analyse_power(np.array([-50.0, 50.0, 0.0, 10.0]), 0.005)
    assert found is not None
    assert found.to_show[0].patients is None and found.to_show[0].simulated is None
