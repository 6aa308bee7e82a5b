"""Tests of paired differences against scipy's and against all patterns of signs tried one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sagittal.evaluation.paired import (
    EXACT_WILCOXON,
    by_patient,
    cohen_dz,
    drawn_wilcoxon,
    holm,
    rank_biserial,
    sign_flip_test,
    wilcoxon_signed_rank,
)

FEW = settings(max_examples=30, deadline=None, derandomize=True)


def noise(seed: int, count: int, shift: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 0.3, count)


@pytest.mark.parametrize("count", [2, 6, 13, 30, EXACT_WILCOXON])
def test_wilcoxon_is_scipys_exact_test_where_cases_are_few(count: int) -> None:
    differences = noise(count, count)
    found, wanted = wilcoxon_signed_rank(differences), stats.wilcoxon(differences, method="exact")
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-12)
    assert min(found.rank_sum, count * (count + 1) / 2 - found.rank_sum) == wanted.statistic
    assert (found.n, found.zeros, found.ties, found.exact) == (count, 0, 0, True)


@pytest.mark.parametrize("decimals", [1, 12])
def test_wilcoxon_is_scipys_approximation_where_cases_are_many(decimals: int) -> None:
    differences = np.round(noise(4, 150, 0.05), decimals)
    found = wilcoxon_signed_rank(differences)
    wanted = stats.wilcoxon(differences, method="asymptotic", correction=False, zero_method="wilcox")
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert not found.exact
    assert (found.zeros > 0) == (found.ties > 0) == (decimals == 1)


def all_signs_p(differences: np.ndarray) -> float:
    """Brute force: the two-sided p of the rank sum over all patterns of signs, zeros dropped, mean ranks for ties."""
    ranked = differences[differences != 0]
    ranks = stats.rankdata(np.abs(ranked))
    found = ranks[ranked > 0].sum()
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([False, True], repeat=len(ranks))])
    return min(1.0, 2 * min((sums <= found + 1e-9).mean(), (sums >= found - 1e-9).mean()))


@FEW
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9).filter(any))
def test_wilcoxon_with_ties_and_zeros_is_exact(values: list[int]) -> None:
    differences = np.array(values) / 10
    found = wilcoxon_signed_rank(differences)
    assert found.p == pytest.approx(all_signs_p(differences), rel=1e-12)
    assert found.zeros == values.count(0)
    sizes = [abs(value) for value in values if value]
    assert found.ties == sum(sizes.count(size) > 1 for size in sizes)
    signs = stats.rankdata(np.abs(differences[differences != 0])) * np.sign(differences[differences != 0])
    assert rank_biserial(found) == pytest.approx(signs.sum() / np.abs(signs).sum())


def test_equal_differences_are_ties_whatever_their_last_bits() -> None:
    differences = np.array([0.9 - 0.8, 0.8 - 0.7, 0.3 - 0.2, 0.5 - 0.5])
    assert len(set(differences[:3])) > 1
    found = wilcoxon_signed_rank(differences)
    assert (found.ties, found.zeros, found.p) == (3, 1, pytest.approx(0.25))


def test_no_difference_at_all_is_no_evidence() -> None:
    for differences in (np.zeros(5), np.full(3, np.nan), np.empty(0)):
        found = wilcoxon_signed_rank(differences)
        assert (found.p, found.n, rank_biserial(found)) == (1.0, 0, 0.0)
        assert cohen_dz(differences) is None
        assert sign_flip_test(np.nan_to_num(differences)[:, None])[0].p == 1.0


def test_a_wilcoxon_of_five_cases_can_not_be_significant_at_five_percent() -> None:
    assert wilcoxon_signed_rank(np.arange(1.0, 6.0)).p == 0.0625


@pytest.mark.parametrize("count", [3, 10, 12])
def test_sign_flips_of_few_patients_are_scipys_exact_permutation_test(count: int) -> None:
    differences = noise(count + 1, count)
    wanted = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    (found,) = sign_flip_test(differences[:, None] / count)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-12)
    assert (found.exact, found.flips) == (True, 2**count)


def test_sign_flips_of_many_patients_come_close_to_the_t_test_and_repeat_by_seed() -> None:
    shares = np.stack([noise(1, 60, 0.06), noise(2, 60, 0.0)], axis=1) / 60
    found = sign_flip_test(shares, seed=3)
    for column in range(2):
        assert found[column].p == pytest.approx(stats.ttest_1samp(shares[:, column], 0).pvalue, abs=0.02)
        assert not found[column].exact
    assert sign_flip_test(shares, seed=3) == found != sign_flip_test(shares, seed=4)
    assert sign_flip_test(np.full((40, 1), 1.0))[0].p == pytest.approx(1 / 10_001)


def test_scans_of_a_patient_flip_together_and_weigh_by_their_number() -> None:
    differences = np.array([[0.1], [0.3], [-0.2], [0.4]])
    owners = ["p", "p", "q", "r"]
    found = by_patient(differences, owners)
    assert found.means[:, 0] == pytest.approx([0.2, -0.2, 0.4])
    assert found.shares[:, 0] == pytest.approx([0.1, -0.05, 0.1])
    assert found.shares.sum() / 2 == pytest.approx(differences.mean())
    # Patterns of three signs as large as 0.15: all but those in which p and r point to different sides, bar none below.
    sums = np.array([abs(np.dot(signs, [0.1, -0.05, 0.1])) for signs in itertools.product([1, -1], repeat=3)])
    assert sign_flip_test(found.shares[:, :1])[0].p == pytest.approx((sums >= 0.15 - 1e-12).mean())


def test_the_mean_over_classes_gives_a_rare_class_its_full_weight() -> None:
    differences = np.array([[0.2, np.nan], [0.4, 0.1], [0.0, np.nan]])
    found = by_patient(differences)
    assert found.shares.sum(0) == pytest.approx([0.2, 0.1, 0.15])
    assert found.means[:, 2] == pytest.approx([0.2, 0.25, 0.0])
    assert np.isnan(found.means[[0, 2], 1]).all()
    assert by_patient(np.full((2, 1), np.nan)).shares.sum() == 0


def test_effect_size_is_the_mean_in_standard_deviations() -> None:
    differences = noise(9, 25)
    assert cohen_dz(differences) == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert cohen_dz(np.append(differences, np.nan)) == cohen_dz(differences)
    assert cohen_dz(np.array([0.2])) is None
    assert cohen_dz(np.array([0.9 - 0.8, 0.8 - 0.7])) is None


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.5]) == (1.0, 1.0)
    assert holm([]) == ()


@FEW
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_refuses_exactly_what_its_definition_refuses(values: list[float]) -> None:
    for alpha in (0.05, 0.3):
        rejected: set[int] = set()
        for place, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
            if values[index] * (len(values) - place) > alpha:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(values)) if p <= alpha} == rejected


def test_wilcoxon_of_drawn_samples_is_that_of_the_samples_written_out() -> None:
    differences = np.round(np.append(noise(6, 30, 0.1), [0.0, np.nan]), 1)
    times = np.random.default_rng(0).multinomial(32, np.full(32, 1 / 32), size=5).astype(float)
    z, p = drawn_wilcoxon(differences, times)
    for row in range(5):
        sample = np.repeat(differences, times[row].astype(int))
        sample = sample[~np.isnan(sample)]
        wanted = stats.wilcoxon(sample, method="asymptotic", correction=False)
        assert p[row] == pytest.approx(wanted.pvalue, rel=1e-9)
        ranks = stats.rankdata(np.abs(sample[sample != 0]))
        assert (z[row] > 0) == (2 * ranks[sample[sample != 0] > 0].sum() > ranks.sum())
