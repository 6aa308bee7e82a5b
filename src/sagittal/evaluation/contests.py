"""Methods compared by one metric: means, every pair of methods with its tests, ranks, by class and over classes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from jaxtyping import Float64

from sagittal.evaluation.bootstrap import CONFIDENCE, RESAMPLES, SEED, Interval, bootstrap_means
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.paired import (
    SIGN_FLIPS,
    SignFlip,
    Wilcoxon,
    by_patient,
    cohen_dz,
    holm,
    mean_of_rows,
    rank_biserial,
    sign_flip_test,
    wilcoxon_signed_rank,
)
from sagittal.evaluation.pairing import Missing
from sagittal.evaluation.power import (
    ALPHA,
    MARGIN,
    SIMULATIONS,
    Equivalence,
    PowerAnalysis,
    analyse_power,
    equivalence_test,
)
from sagittal.evaluation.ranking import DRAWS, RuleRanking, rank_methods
from sagittal.plan.base import Frozen


class ComparisonSettings(Frozen):
    """How methods are compared."""

    margin: float = MARGIN
    """Differences below this are as good as none; of metrics between 0 and 1."""
    alpha: float = ALPHA
    """Level of all tests."""
    missing: Missing = "refuse"
    """What becomes of a case that a method has no score for."""
    resamples: int = RESAMPLES
    """Bootstrap samples of patients for intervals."""
    flips: int = SIGN_FLIPS
    """Sign patterns of the permutation test, where not all of them are tried."""
    draws: int = DRAWS
    """Bootstrap samples of patients for the stability of ranks."""
    simulations: int = SIMULATIONS
    """Studies drawn to confirm a number of patients; 0 for none."""
    seed: int = SEED
    """Of everything random: the same gives the same bits."""


class MethodScore(Frozen):
    """One method's values of one metric in one class, or of the mean over classes."""

    mean: float | None
    """Over cases; the mean over classes is over the means of the classes."""
    low: float | None
    """Lower bound of the 95 % BCa bootstrap interval of the mean, by patient."""
    high: float | None
    median: float | None
    """Over cases; of the mean over classes, over each case's mean."""
    std: float | None
    """Between cases (n - 1)."""
    n: int
    """Cases with a value."""


class PairScore(Frozen):
    """The difference of two methods: the first minus the second."""

    first: str
    second: str
    mean: float | None
    """Mean difference over cases."""
    low: float | None
    """Lower bound of its 95 % BCa bootstrap interval, by patient."""
    high: float | None
    patients: int
    """Patients with a difference."""
    wilcoxon: Wilcoxon
    wilcoxon_holm: float
    """p of Wilcoxon's test after Holm's correction over all pairs of methods."""
    permutation: SignFlip
    permutation_holm: float
    rank_biserial: float
    """-1 to 1; above 0 the first method tends to have the higher values."""
    cohen_dz: float | None
    equivalence: Equivalence | None
    """None for metrics that are not between 0 and 1, and with fewer than two patients."""
    power: PowerAnalysis | None
    better: str | None
    """The method that is better: Wilcoxon's test after Holm's correction is significant, and mean and ranks agree."""


class Contest(Frozen):
    """One metric in one class, or of the mean over classes: methods, pairs, ranks."""

    methods: dict[str, MethodScore]
    pairs: tuple[PairScore, ...]
    """Every pair once, in the order of the methods."""
    rankings: tuple[RuleRanking, ...]
    """By each rule; empty where nothing is defined."""

    @property
    def best(self) -> str | None:
        """The method with rank 1 by its mean; None where nothing is defined."""
        return next((name for ranking in self.rankings[:1] for name, rank in ranking.ranks.items() if rank == 1), None)


class MetricComparison(Frozen):
    """One metric: the mean over classes, and every class."""

    mean: Contest
    classes: dict[str, Contest]
    values: dict[str, dict[str, tuple[float | None, ...]]]
    """Class -> method -> values in the order of the cases; None where undefined for all methods."""


def compare_metric(
    values: Float64[np.ndarray, "cases classes methods"],
    metric: Metric,
    methods: tuple[str, ...],
    classes: tuple[str, ...],
    owners: tuple[str, ...],
    wanted: ComparisonSettings,
) -> MetricComparison:
    """Compare methods by one metric, in every class and by the mean over classes.

    Args:
        values: NaN where undefined, for all methods or for none.
        metric: what they are.
        methods: names, in the order of the last axis.
        classes: names, in the order of the second.
        owners: whose case each is.
        wanted: how they are compared.
    """
    scores = [_method_scores(values[..., place], owners, wanted) for place in range(len(methods))]
    pairs = _pair_scores(values, metric, methods, owners, wanted)
    contests = []
    for column in range(len(classes) + 1):
        part = values if column == len(classes) else values[:, column : column + 1]
        tested = tuple(pairs[column])
        contests.append(
            Contest(
                methods={name: scores[place][column] for place, name in enumerate(methods)},
                pairs=tested,
                rankings=rank_methods(
                    part,
                    methods,
                    _beats(tested, methods),
                    owners,
                    higher_is_better=bool(metric.higher_is_better),
                    alpha=wanted.alpha,
                    draws=wanted.draws,
                    seed=wanted.seed,
                ),
            )
        )
    *by_class, mean = contests
    return MetricComparison(
        mean=mean,
        classes=dict(zip(classes, by_class, strict=True)),
        values={
            name: {method: _plain(values[:, column, place]) for place, method in enumerate(methods)}
            for column, name in enumerate(classes)
        },
    )


def _method_scores(
    values: Float64[np.ndarray, "cases classes"], owners: tuple[str, ...], wanted: ComparisonSettings
) -> list[MethodScore]:
    """Return the score of every class, then of their mean."""
    intervals = bootstrap_means(values, owners, confidence=CONFIDENCE, resamples=wanted.resamples, seed=wanted.seed)
    columns = [*values.T, mean_of_rows(values)]
    return [
        _method_score(column, interval)
        for column, interval in zip(columns, (*intervals.columns, intervals.overall), strict=True)
    ]


def _method_score(column: Float64[np.ndarray, " cases"], interval: Interval) -> MethodScore:
    known = column[~np.isnan(column)]
    return MethodScore(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        median=float(np.median(known)) if len(known) else None,
        std=float(known.std(ddof=1)) if len(known) > 1 else None,
        n=len(known),
    )


def _pair_scores(
    values: Float64[np.ndarray, "cases classes methods"],
    metric: Metric,
    methods: tuple[str, ...],
    owners: tuple[str, ...],
    wanted: ComparisonSettings,
) -> list[list[PairScore]]:
    """Return the pairs of every class, then those of the mean over classes."""
    classes = values.shape[1]
    found: list[list[PairScore]] = [[] for _ in range(classes + 1)]
    for one, other in combinations(range(len(methods)), 2):
        differences = values[..., one] - values[..., other]
        intervals = bootstrap_means(
            differences, owners, confidence=CONFIDENCE, resamples=wanted.resamples, seed=wanted.seed
        )
        by_owner = by_patient(differences, owners)
        flipped = sign_flip_test(by_owner.shares, flips=wanted.flips, seed=wanted.seed)
        for column, interval in enumerate((*intervals.columns, intervals.overall)):
            found[column].append(
                _pair_score(
                    (methods[one], methods[other]),
                    by_owner.means[:, column],
                    interval,
                    flipped[column],
                    wanted,
                    # Studies are simulated for the mean over classes: for every class they would take minutes.
                    simulations=wanted.simulations if column == classes else 0,
                    bounded=metric.unit == "" and bool(metric.higher_is_better),
                )
            )
    return [_corrected(pairs, metric, wanted.alpha) for pairs in found]


def _pair_score(
    names: tuple[str, str],
    differences: Float64[np.ndarray, " patients"],
    interval: Interval,
    flipped: SignFlip,
    wanted: ComparisonSettings,
    *,
    simulations: int,
    bounded: bool,
) -> PairScore:
    test = wilcoxon_signed_rank(differences)
    equivalence = power = None
    if bounded:
        equivalence = equivalence_test(differences, wanted.margin, alpha=wanted.alpha)
        power = analyse_power(differences, wanted.margin, alpha=wanted.alpha, simulations=simulations, seed=wanted.seed)
    return PairScore(
        first=names[0],
        second=names[1],
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        patients=int((~np.isnan(differences)).sum()),
        wilcoxon=test,
        wilcoxon_holm=test.p,
        permutation=flipped,
        permutation_holm=flipped.p,
        rank_biserial=rank_biserial(test),
        cohen_dz=cohen_dz(differences),
        equivalence=equivalence,
        power=power,
        better=None,
    )


def _corrected(pairs: list[PairScore], metric: Metric, alpha: float) -> list[PairScore]:
    """Return the pairs with p values corrected for their number, and with the better method of each."""
    by_ranks = holm([pair.wilcoxon.p for pair in pairs])
    by_flips = holm([pair.permutation.p for pair in pairs])
    sign = 1.0 if metric.higher_is_better else -1.0
    corrected = []
    for pair, ranks, flips in zip(pairs, by_ranks, by_flips, strict=True):
        mean, lead = sign * (pair.mean or 0.0), sign * pair.rank_biserial
        agreed = pair.first if mean > 0 and lead > 0 else pair.second if mean < 0 and lead < 0 else None
        better = agreed if ranks < alpha else None
        corrected.append(pair.replace(wilcoxon_holm=ranks, permutation_holm=flips, better=better))
    return corrected


def _beats(pairs: tuple[PairScore, ...], methods: tuple[str, ...]) -> np.ndarray:
    beats = np.zeros((len(methods), len(methods)), dtype=np.bool_)
    for pair in pairs:
        if pair.better is not None:
            worse = pair.second if pair.better == pair.first else pair.first
            beats[methods.index(pair.better), methods.index(worse)] = True
    return beats


def _plain(values: Float64[np.ndarray, " cases"]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(value) for value in values)
