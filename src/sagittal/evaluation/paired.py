"""Two methods on the same cases: tests of their differences, and how large the differences are.

Everything is about one number per patient, because two scans of one patient are no two independent pieces of evidence.
Nothing here knows of metrics or classes: differences go in, one column per class.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtr

from sagittal.plan.base import Frozen

EXACT_WILCOXON = 50
"""Differences other than zero up to which the distribution of rank sums is counted out, as scipy does."""
SIGN_FLIPS = 10_000
"""Random sign flips; all of them are tried where they are fewer, which is up to 13 patients."""
_ROUND = 12
"""Decimals that differences are rounded to before they are ranked: 0.9 - 0.8 and 0.8 - 0.7 are one difference."""


class PatientDifferences(NamedTuple):
    """Differences of two methods by patient; the last column is about the mean over classes."""

    means: Float64[np.ndarray, "patients columns"]
    """A patient's mean difference: over the patient's cases; in the last column of each case's mean over classes. NaN
    where undefined."""
    shares: Float64[np.ndarray, "patients columns"]
    """What each patient adds to the mean difference over cases (in the last column to its mean over classes): the sum
    over patients is that mean. 0 where undefined."""


class Wilcoxon(Frozen):
    """Wilcoxon's signed-rank test, two-sided."""

    rank_sum: float
    """Sum of the ranks of the positive differences."""
    p: float
    n: int
    """Differences other than zero: those that are ranked."""
    zeros: int
    """Differences of zero, which are left out (Wilcoxon's own rule)."""
    ties: int
    """Ranked differences whose size occurs more than once; they share the mean of their ranks."""
    exact: bool
    """Whether p is counted out over all signs, ties as they are, or from the normal approximation."""


class SignFlip(Frozen):
    """The paired permutation test of the mean difference: every patient's sign is flipped at random, two-sided."""

    p: float
    flips: int
    """Sign patterns that were tried, what was found among them."""
    exact: bool
    """Whether these were all that there are."""


def by_patient(
    differences: Float64[np.ndarray, "cases classes"], groups: Sequence[Hashable] | None = None
) -> PatientDifferences:
    """Gather differences of cases by patient and append the column of the mean over classes.

    Args:
        differences: first method minus second, NaN where undefined.
        groups: the patient of each case; by itself every case is a patient of its own.
    """
    owners = list(range(len(differences))) if groups is None else list(groups)
    assert differences.ndim == 2 and len(owners) == len(differences)
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    of_group = np.array([places[owner] for owner in owners], dtype=np.intp)
    with_mean = np.concatenate([differences, mean_of_rows(differences)[:, None]], axis=1)
    known = ~np.isnan(with_mean)
    sums, counts = (np.zeros((len(places), with_mean.shape[1])) for _ in range(2))
    np.add.at(sums, of_group, np.where(known, with_mean, 0.0))
    np.add.at(counts, of_group, known)
    total = counts.sum(0)
    shares = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    defined = int((total[:-1] > 0).sum())
    shares[:, -1] = shares[:, :-1].sum(1) / defined if defined else 0.0
    return PatientDifferences(_divide(sums, counts), shares)


def wilcoxon_signed_rank(differences: Float64[np.ndarray, " patients"]) -> Wilcoxon:
    """Test whether differences lie symmetrically about zero; undefined (NaN) ones are left out.

    Zeros are dropped and ties share their mean rank. Up to `EXACT_WILCOXON` ranked differences p is exact, ties and
    all: every pattern of signs is counted. Above, the normal approximation with the correction for ties is used,
    without one for continuity.

    Source: F. Wilcoxon, Biometrics Bulletin 1 (1945); for ties W. J. Conover, Practical Nonparametric
        Statistics (1999).
    """
    rounded = np.round(differences[~np.isnan(differences)], _ROUND)
    ranked = rounded[rounded != 0]
    zeros, n = len(rounded) - len(ranked), len(ranked)
    if not n:
        return Wilcoxon(rank_sum=0.0, p=1.0, n=0, zeros=zeros, ties=0, exact=True)
    ranks, repeats = _mean_ranks(np.abs(ranked))
    rank_sum = float(ranks[ranked > 0].sum())
    exact = n <= EXACT_WILCOXON
    p = _exact_p(ranks, rank_sum) if exact else float(_normal_p(n, rank_sum, float((repeats**3 - repeats).sum())))
    ties = int(repeats[repeats > 1].sum())
    return Wilcoxon(rank_sum=rank_sum, p=p, n=n, zeros=zeros, ties=ties, exact=exact)


def rank_biserial(test: Wilcoxon) -> float:
    """Return the matched-pairs rank-biserial correlation: share of the rank sum for the first method minus the rest.

    -1 to 1; 0 where no difference is other than zero.

    Source: D. S. Kerby, The Simple Difference Formula, Comprehensive Psychology 3 (2014).
    """
    total = test.n * (test.n + 1) / 2
    return (2 * test.rank_sum - total) / total if total else 0.0


def cohen_dz(differences: Float64[np.ndarray, " patients"]) -> float | None:
    """Return the mean difference in standard deviations (n - 1) of the differences; None where there is no spread.

    Source: D. Lakens, Calculating and reporting effect sizes, Frontiers in Psychology 4 (2013), d_z.
    """
    known = differences[~np.isnan(differences)]
    spread = float(np.round(known, _ROUND).std(ddof=1)) if len(known) > 1 else 0.0
    return float(known.mean()) / spread if spread > 0 else None


def sign_flip_test(
    shares: Float64[np.ndarray, "patients columns"], *, flips: int = SIGN_FLIPS, seed: int = 0
) -> tuple[SignFlip, ...]:
    """Test the sum of each column against the sums that it has when each row's sign is flipped at random.

    All scans of a patient flip together. All patterns are tried where they are no more than `flips`, else as many
    random ones; the pattern that was found counts as one of these, so that p is never 0.

    Args:
        shares: what each patient adds to a mean difference, as `PatientDifferences.shares`.
        flips: random patterns.
        seed: of the patterns; the same gives the same bits.

    Source: R. A. Fisher, The Design of Experiments (1935); for the random ones B. Phipson and G. K. Smyth, Statistical
        Applications in Genetics and Molecular Biology 9 (2010).
    """
    assert shares.ndim == 2
    found = np.abs(shares.sum(0))
    # Sums of the same numbers in another order differ in their last bits and are equal all the same.
    least = found - 1e-9 * np.abs(shares).sum(0)
    moving = np.flatnonzero((shares != 0).any(1))
    shares = shares[moving]
    exact = 2 ** len(shares) <= flips
    if exact:
        patterns = np.arange(2 ** len(shares))[:, None] >> np.arange(len(shares)) & 1
        sums = np.abs((2.0 * patterns - 1.0) @ shares)
        p = (sums >= least).mean(0)
        return tuple(SignFlip(p=float(value), flips=len(patterns), exact=True) for value in p)
    rng = np.random.default_rng(seed)
    hits = np.zeros(shares.shape[1])
    chunk = max(1, 2_000_000 // len(shares))
    for first in range(0, flips, chunk):
        signs = rng.integers(0, 2, size=(min(chunk, flips - first), len(shares))) * 2.0 - 1.0
        hits += (np.abs(signs @ shares) >= least).sum(0)
    return tuple(SignFlip(p=float(value), flips=flips + 1, exact=False) for value in (hits + 1) / (flips + 1))


def holm(values: Sequence[float]) -> tuple[float, ...]:
    """Return p values corrected by Holm for all of them being tried, in their order.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6
        (1979).
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        highest = max(highest, min(1.0, values[index] * (len(values) - place)))
        adjusted[index] = highest
    return tuple(adjusted)


def drawn_wilcoxon(
    differences: Float64[np.ndarray, " patients"], times: Float64[np.ndarray, "draws patients"]
) -> tuple[Float64[np.ndarray, " draws"], Float64[np.ndarray, " draws"]]:
    """Return z and two-sided p of Wilcoxon's test in many samples, by the normal approximation.

    Args:
        differences: one per patient; NaN where undefined.
        times: how often each patient is in each sample.
    """
    rounded = np.round(differences, _ROUND)
    used = np.flatnonzero(~np.isnan(rounded) & (rounded != 0))
    if not len(used):
        return np.zeros(len(times)), np.ones(len(times))
    used = used[np.argsort(np.abs(rounded[used]), kind="stable")]
    weights = times[:, used]
    # Equal sizes lie side by side: one column for each size.
    starts = np.flatnonzero(np.diff(np.abs(rounded[used]), prepend=-1.0))
    per_level, positive = weights, weights * (rounded[used] > 0)
    if len(starts) < len(used):
        per_level, positive = (np.add.reduceat(table, starts, axis=1) for table in (per_level, positive))
    sums = (positive * (np.cumsum(per_level, axis=1) - (per_level - 1) / 2)).sum(1)
    n = weights.sum(1)
    z = _normal_z(n, sums, (per_level**3 - per_level).sum(1))
    return z, 2 * ndtr(-np.abs(z))


def mean_of_rows(table: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, " rows"]:
    """Return the mean over what is defined (not NaN) in each row; NaN where nothing is."""
    known = ~np.isnan(table)
    return _divide(np.where(known, table, 0.0).sum(1), known.sum(1).astype(np.float64))


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
    return quotient


def _mean_ranks(sizes: Float64[np.ndarray, " n"]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " levels"]]:
    """Return ranks from 1, equal sizes sharing their mean rank, and how often each size occurs."""
    _, level, repeats = np.unique(sizes, return_inverse=True, return_counts=True)
    ranks = np.cumsum(repeats) - (repeats - 1) / 2
    return ranks[level], repeats.astype(np.float64)


def _exact_p(ranks: Float64[np.ndarray, " n"], rank_sum: float) -> float:
    # Twice a mean rank is whole, so that sums of ranks are places in an array; 2^50 patterns are exact in float64.
    doubled = np.round(2 * ranks).astype(np.intp)
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[:-rank]
    place = round(2 * rank_sum)
    tail = min(float(ways[: place + 1].sum()), float(ways[place:].sum()))
    return min(1.0, math.ldexp(2 * tail, -len(ranks)))


def _normal_z(n: np.ndarray, rank_sum: np.ndarray, tie_term: np.ndarray) -> np.ndarray:
    variance = n * (n + 1) * (2 * n + 1) / 24 - tie_term / 48
    centred = rank_sum - n * (n + 1) / 4
    z: np.ndarray = np.divide(centred, np.sqrt(variance), out=np.zeros_like(centred), where=variance > 0)
    return z


def _normal_p(n: int, rank_sum: float, tie_term: float) -> float:
    z = _normal_z(*(np.array([float(value)]) for value in (n, rank_sum, tie_term)))
    return float(2 * ndtr(-abs(z[0])))
