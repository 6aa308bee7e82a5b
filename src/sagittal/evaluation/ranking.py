"""Which method is best, and would other patients say the same? Ranks by three rules, each with its stability.

Rules disagree, and so do samples of patients: a rank without both is a claim without its error bar.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sagittal.evaluation.paired import by_patient, drawn_wilcoxon
from sagittal.plan.base import Frozen

DRAWS = 1000
Rule = Literal["mean", "mean_rank", "significance"]

RULES: dict[Rule, tuple[str, str]] = {
    "mean": ("Mean, then rank", "Methods in the order of their mean over cases (and classes), as the MSD averages."),
    "mean_rank": (
        "Rank, then mean",
        "Methods are ranked in every case and class; the mean of these ranks decides, as in BraTS. Outliers weigh "
        "less.",
    ),
    "significance": (
        "Tests won",
        "Methods in the order of how many others they beat in Wilcoxon's test after Holm's correction.",
    ),
}
"""Title and text of every rule."""


class RuleRanking(Frozen):
    """The ranks by one rule, and what becomes of them with other patients."""

    rule: Rule
    scores: dict[str, float]
    """What the rule ranks by: mean, mean rank, or number of tests won."""
    ranks: dict[str, int]
    """1 is best; methods that are equal share the better rank."""
    shares: dict[str, tuple[float, ...]]
    """Per method the share of samples of patients in which it has rank 1, 2, ...; empty without samples."""
    kendall_tau: float | None
    """Kendall's tau-b between these ranks and those of a sample, mean over samples: 1 where no sample changes any.
    None where all methods are equal."""
    kendall_tau_low: float | None
    """The tau that 5 % of the samples stay below."""


def rank_methods(
    values: Float64[np.ndarray, "cases classes methods"],
    methods: Sequence[str],
    beats: Bool[np.ndarray, "methods methods"],
    groups: Sequence[Hashable] | None = None,
    *,
    higher_is_better: bool = True,
    alpha: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[RuleRanking, ...]:
    """Rank methods by every rule, on all cases and on samples of patients drawn with replacement.

    In samples the tests use the normal approximation. Nothing is ranked where no value is defined.

    Args:
        values: NaN where undefined, for all methods or for none.
        methods: their names.
        beats: whether the method of the row beats that of the column, by the tests on all cases.
        groups: the patient of each case; by itself every case is a patient of its own.
        higher_is_better: whether the highest value has rank 1.
        alpha: level of the tests in the samples.
        draws: samples.
        seed: of the samples.

    Source: M. Wiesenfarth et al., Methods and open-source toolkit for analyzing and visualizing challenge results,
        Scientific Reports 11 (2021).
    """
    assert values.ndim == 3 and values.shape[2] == len(methods)
    if np.isnan(values).all():
        return ()
    owners = list(range(len(values))) if groups is None else list(groups)
    values = values if higher_is_better else -values
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    of_group = np.array([places[owner] for owner in owners], dtype=np.intp)
    patients = len(places)
    weights = _weights(patients, draws, seed)
    ranks = _case_ranks(values)
    found: dict[Rule, np.ndarray] = {
        "mean": _weighted_means(values, of_group, weights),
        "mean_rank": -_weighted_means(ranks, of_group, weights),
        "significance": _tests_won(values, owners, weights, alpha),
    }
    found["significance"][0] = beats.sum(1)
    signs = {"mean": 1.0 if higher_is_better else -1.0, "mean_rank": -1.0, "significance": 1.0}
    return tuple(_ranking(rule, scores, methods, signs[rule]) for rule, scores in found.items())


@lru_cache(maxsize=2)
def _weights(patients: int, draws: int, seed: int) -> Float64[np.ndarray, "draws patients"]:
    """Return how often each patient is in all cases (the first row: once) and in every sample.

    Kept, because every metric and class of a comparison asks for the same ones.
    """
    rng = np.random.default_rng(seed)
    rows = [np.bincount(rng.integers(patients, size=patients), minlength=patients) for _ in range(draws)]
    weights = np.array([np.ones(patients), *rows], dtype=np.float64)
    weights.flags.writeable = False
    return weights


def _case_ranks(values: Float64[np.ndarray, "cases classes methods"]) -> Float64[np.ndarray, "cases classes methods"]:
    """Return the rank of each method in every case and class, 1 the best, equal ones sharing their mean rank."""
    better = (values[..., None, :] > values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    ranks: np.ndarray = np.where(np.isnan(values), np.nan, better + (equal + 1) / 2)
    return ranks


def _weighted_means(
    values: Float64[np.ndarray, "cases classes methods"],
    of_group: Int64[np.ndarray, " cases"],
    weights: Float64[np.ndarray, "draws patients"],
) -> Float64[np.ndarray, "draws methods"]:
    """Return per draw the mean over classes of the means over cases; a class that a draw lacks is left out of it."""
    cases, classes, methods = values.shape
    known = ~np.isnan(values)
    per_case = weights[:, of_group]
    sums = (per_case @ np.where(known, values, 0.0).reshape(cases, -1)).reshape(-1, classes, methods)
    counts = (per_case @ known.astype(np.float64).reshape(cases, -1)).reshape(-1, classes, methods)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    present = (counts > 0).sum(1)
    total: np.ndarray = np.divide(means.sum(1), present, out=np.full(present.shape, np.nan), where=present > 0)
    return total


def _tests_won(
    values: Float64[np.ndarray, "cases classes methods"],
    owners: Sequence[Hashable],
    weights: Float64[np.ndarray, "draws patients"],
    alpha: float,
) -> Float64[np.ndarray, "draws methods"]:
    pairs = list(combinations(range(values.shape[2]), 2))
    tests = [
        drawn_wilcoxon(by_patient(values[..., one] - values[..., other], owners).means[:, -1], weights)
        for one, other in pairs
    ]
    won = np.zeros((len(weights), values.shape[2]))
    adjusted = _holm_of_rows(np.stack([p for _, p in tests], axis=1))
    for place, (one, other) in enumerate(pairs):
        z, significant = tests[place][0], adjusted[:, place] < alpha
        won[:, one] += significant & (z > 0)
        won[:, other] += significant & (z < 0)
    return won


def _holm_of_rows(p: Float64[np.ndarray, "draws pairs"]) -> Float64[np.ndarray, "draws pairs"]:
    order = np.argsort(p, axis=1, kind="stable")
    factors = np.arange(p.shape[1], 0, -1)
    rising = np.maximum.accumulate(np.minimum(1.0, np.take_along_axis(p, order, 1) * factors), axis=1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, rising, 1)
    return adjusted


def _ranking(
    rule: Rule, scores: Float64[np.ndarray, "draws methods"], methods: Sequence[str], sign: float
) -> RuleRanking:
    """Return the ranking by the first row of `scores`, highest first, and its stability over the other rows."""
    # Sums in another order differ in their last bits: that is no better or worse.
    rounded = np.round(scores, 12)
    rounded = rounded[~np.isnan(rounded).any(1)]
    ranks = 1 + (rounded[:, None, :] > rounded[:, :, None]).sum(-1)
    whole, drawn = ranks[0], ranks[1:]
    taus = kendall_taus(whole, drawn)
    return RuleRanking(
        rule=rule,
        scores={name: float(sign * scores[0, place]) for place, name in enumerate(methods)},
        ranks={name: int(whole[place]) for place, name in enumerate(methods)},
        shares={
            name: tuple(float((drawn[:, place] == rank).mean()) for rank in range(1, len(methods) + 1))
            if len(drawn)
            else ()
            for place, name in enumerate(methods)
        },
        kendall_tau=float(taus.mean()) if len(taus) else None,
        kendall_tau_low=float(np.quantile(taus, 0.05)) if len(taus) else None,
    )


def kendall_taus(whole: Int64[np.ndarray, " methods"], drawn: Int64[np.ndarray, "draws methods"]) -> np.ndarray:
    """Return Kendall's tau-b of each row of `drawn` with `whole`; a row without any order has 0, `whole` without any
    has no result at all."""
    one, other = np.triu_indices(len(whole), 1)
    wanted = np.sign(whole[one] - whole[other])
    if not wanted.any():
        return np.empty(0)
    found = np.sign(drawn[:, one] - drawn[:, other])
    scale = np.sqrt(float(np.abs(wanted).sum()) * np.abs(found).sum(1))
    taus: np.ndarray = np.divide(found @ wanted, scale, out=np.zeros(len(drawn)), where=scale > 0)
    return taus
