"""Ranks by three rules, their stability, and Kendall's tau against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sagittal.evaluation.ranking import RuleRanking, kendall_taus, rank_methods

METHODS = ("a", "b", "c")
NOBODY = np.zeros((3, 3), dtype=bool)


def ranked(values: np.ndarray, beats: np.ndarray = NOBODY, **options: object) -> dict[str, RuleRanking]:
    return {item.rule: item for item in rank_methods(values, METHODS, beats, **options)}  # type: ignore[arg-type]


def table(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows)[:, None, :]


def test_mean_and_mean_rank_may_disagree() -> None:
    # c fails once and is best otherwise: its mean is the lowest, its mean rank the best.
    found = ranked(table((0.8, 0.7, 0.9), (0.8, 0.7, 0.9), (0.8, 0.7, 0.9), (0.8, 0.7, 0.0)))
    assert found["mean"].ranks == {"a": 1, "b": 2, "c": 3}
    assert found["mean"].scores == pytest.approx({"a": 0.8, "b": 0.7, "c": 0.675})
    assert found["mean_rank"].ranks == {"a": 2, "b": 3, "c": 1}
    assert found["mean_rank"].scores == pytest.approx({"a": 1.75, "b": 2.75, "c": 1.5})


def test_lowest_value_is_best_where_lower_is_better() -> None:
    found = ranked(table((2.0, 3.0, 1.0), (2.0, 3.0, 1.5)), higher_is_better=False)
    assert found["mean"].ranks == {"a": 2, "b": 3, "c": 1} == found["mean_rank"].ranks
    assert found["mean"].scores == pytest.approx({"a": 2.0, "b": 3.0, "c": 1.25})


def test_equal_methods_share_the_better_rank() -> None:
    found = ranked(table((0.8, 0.8, 0.7), (0.6, 0.6, 0.7)))
    assert found["mean"].ranks == {"a": 1, "b": 1, "c": 1}
    assert found["mean"].kendall_tau is None
    assert found["mean_rank"].scores == pytest.approx({"a": 2.0, "b": 2.0, "c": 2.0})


def test_a_rare_class_weighs_as_much_as_a_common_one() -> None:
    values = np.full((4, 2, 3), np.nan)
    values[:, 0] = [0.8, 0.7, 0.6]
    values[0, 1] = [0.2, 0.4, 0.9]
    found = ranked(values)
    assert found["mean"].scores == pytest.approx({"a": 0.5, "b": 0.55, "c": 0.75})
    assert found["mean_rank"].scores == pytest.approx({"a": 2.0, "b": 2.0, "c": 2.0})


def test_clear_order_is_stable_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    clear = ranked(rng.normal([0.9, 0.7, 0.5], 0.05, (30, 1, 3)))
    assert all(item.ranks == {"a": 1, "b": 2, "c": 3} for rule, item in clear.items() if rule != "significance")
    assert clear["mean"].shares == {"a": (1.0, 0.0, 0.0), "b": (0.0, 1.0, 0.0), "c": (0.0, 0.0, 1.0)}
    assert clear["mean"].kendall_tau == 1.0 == clear["mean"].kendall_tau_low
    noise = ranked(rng.normal(0.7, 0.1, (30, 1, 3)))
    assert noise["mean"].kendall_tau is not None and noise["mean"].kendall_tau < 0.95
    for item in noise.values():
        assert all(sum(shares) == pytest.approx(1.0) for shares in item.shares.values())


def test_tests_won_are_given_for_all_cases_and_tested_in_the_samples() -> None:
    values = np.random.default_rng(1).normal([0.9, 0.7, 0.5], 0.05, (40, 2, 3))
    beats = np.array([[False, True, True], [False, False, True], [False, False, False]])
    found = ranked(values, beats)["significance"]
    assert found.scores == {"a": 2.0, "b": 1.0, "c": 0.0}
    assert found.ranks == {"a": 1, "b": 2, "c": 3}
    assert found.shares["a"][0] > 0.99


def test_samples_draw_patients_not_scans() -> None:
    # One patient of many scans decides alone whether a or b is ahead.
    values = np.concatenate([np.tile([0.9, 0.5, 0.1], (20, 1)), np.tile([0.5, 0.6, 0.1], (10, 1))])[:, None, :]
    owners = ["p"] * 20 + [f"q{number}" for number in range(10)]
    by_scan, by_patient = ranked(values)["mean"], ranked(values, groups=owners)["mean"]
    assert by_scan.shares["a"][0] > 0.99
    # 11 draws of 11 patients lack p with a chance of (10/11)^11 = 0.35; with one p of 20 scans a leads.
    assert by_patient.shares["a"][0] == pytest.approx(1 - (10 / 11) ** 11, abs=0.05)


def test_same_seed_same_shares() -> None:
    values = np.random.default_rng(3).normal(0.7, 0.1, (12, 2, 3))
    assert ranked(values) == ranked(values)
    assert ranked(values) != ranked(values, seed=1)


def test_nothing_defined_gives_no_ranks_and_no_draws_no_shares() -> None:
    assert rank_methods(np.full((3, 1, 3), np.nan), METHODS, NOBODY) == ()
    assert rank_methods(np.empty((0, 1, 3)), METHODS, NOBODY) == ()
    still = ranked(table((0.8, 0.7, 0.6)), draws=0)["mean"]
    assert (still.ranks, still.shares["a"], still.kendall_tau) == ({"a": 1, "b": 2, "c": 3}, (), None)


def test_a_class_that_a_sample_lacks_is_left_out_of_it() -> None:
    values = np.full((6, 2, 3), np.nan)
    values[:, 0] = [0.8, 0.7, 0.6]
    values[0, 1] = [0.0, 0.0, 0.9]
    found = ranked(values)["mean"]
    assert found.ranks == {"a": 2, "b": 3, "c": 1}
    assert found.shares["a"][0] == pytest.approx((5 / 6) ** 6, abs=0.05)


def test_kendalls_tau_is_scipys() -> None:
    rng = np.random.default_rng(5)
    whole, drawn = rng.integers(1, 5, 6), rng.integers(1, 5, (20, 6))
    wanted = [stats.kendalltau(whole, row).statistic for row in drawn]
    assert kendall_taus(whole, drawn) == pytest.approx(wanted)
    assert kendall_taus(np.arange(3), np.ones((1, 3), dtype=np.int64)) == [0.0]
