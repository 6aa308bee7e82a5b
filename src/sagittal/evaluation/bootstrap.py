"""Means over cases with the interval in which they would lie for other cases of the same kind: the bootstrap.

Patients are drawn, not cases: two scans of one patient are no two independent pieces of evidence, and an interval that
counts them as such is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Integer
from scipy.special import ndtr, ndtri, stdtrit

CONFIDENCE = 0.95
RESAMPLES = 5000
SEED = 0
_CHUNK = 500
"""Resamples drawn at once, so that thousands of cases need little memory."""
_TIMES = np.uint16
_MOST_KEPT_BYTES = 1 << 25
"""Draws that are kept for the next metric; beyond it they are drawn again."""


class Interval(NamedTuple):
    """A mean over cases and the bounds of its interval; None where there are too few cases for either."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    """Cases in which the value is defined."""


@dataclass(frozen=True)
class Intervals:
    """Of every column its mean over cases, and of the mean over columns of these means."""

    columns: tuple[Interval, ...]
    overall: Interval


def bootstrap_means(
    values: Float64[np.ndarray, "cases columns"],
    groups: Sequence[Hashable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Intervals:
    """Return the means of columns over cases, with bias-corrected and accelerated (BCa) bootstrap intervals.

    Whole groups are drawn with replacement, as many as there are; a mean over what was drawn weighs every case the
    same. All columns share the draws, so that the interval of their mean knows how they go together.

    Args:
        values: one row per case, one column per class; NaN where undefined.
        groups: whose case each row is, for example the patient; by itself each row is a group of its own.
        confidence: share of intervals that should hold the true mean, in (0, 1).
        resamples: how many times the groups are drawn.
        seed: of the draws; the same gives the same bits.

    Returns:
        Means and bounds. Bounds are None where fewer than two groups have a value.

    Source: B. Efron, Better Bootstrap Confidence Intervals, JASA 82 (1987); for clusters A. C. Davison and D. V.
        Hinkley, Bootstrap Methods and their Application (1997), 3.8; for few of them T. C. Hesterberg, What Teachers
        Should Know About the Bootstrap, The American Statistician 69 (2015), expanded percentiles.
    """
    assert values.ndim == 2 and 0 < confidence < 1
    owners = list(range(len(values))) if groups is None else list(groups)
    assert len(owners) == len(values)
    places = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
    of_group = np.array([places[owner] for owner in owners], dtype=np.intp)
    known = ~np.isnan(values)
    sums, counts = (np.zeros((len(places), values.shape[1])) for _ in range(2))
    np.add.at(sums, of_group, np.where(known, values, 0.0))
    np.add.at(counts, of_group, known)
    drawn = _draw_means(sums, counts, resamples, seed)
    left_out = _means(sums.sum(0) - sums, counts.sum(0) - counts)
    means = _means(sums.sum(0), counts.sum(0))
    columns = tuple(
        _interval(
            means[column],
            drawn[:, column],
            left_out[counts[:, column] > 0, column],
            int(known[:, column].sum()),
            confidence,
        )
        for column in range(values.shape[1])
    )
    some = counts.any(1)
    overall = _interval(
        _mean_of_rows(means[None])[0],
        _mean_of_rows(drawn),
        _mean_of_rows(left_out)[some],
        int(known.any(1).sum()),
        confidence,
    )
    return Intervals(columns, overall)


def _draw_means(
    sums: Float64[np.ndarray, "groups columns"],
    counts: Float64[np.ndarray, "groups columns"],
    resamples: int,
    seed: int,
) -> Float64[np.ndarray, "resamples columns"]:
    groups = len(sums)
    if not groups:
        return np.full((resamples, sums.shape[1]), np.nan)
    kept = groups * resamples * np.dtype(_TIMES).itemsize <= _MOST_KEPT_BYTES
    chunks = _kept_draws(groups, resamples, seed) if kept else _draws(groups, resamples, seed)
    # The same patients have a value in every column, most often: then one column tells how many were drawn of all.
    told = counts[:, :1] if (counts == counts[:, :1]).all() else counts
    parts = []
    for chunk in chunks:
        times = chunk.astype(np.float64)
        parts.append(_means(times @ sums, np.broadcast_to(times @ told, (len(times), sums.shape[1]))))
    return np.concatenate(parts)


def _draws(groups: int, resamples: int, seed: int) -> Iterator[Integer[np.ndarray, "resamples groups"]]:
    """Yield how often each group is in each resample, some resamples at a time."""
    rng = np.random.default_rng(seed)
    for first in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - first)
        drawn = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(_TIMES)


@lru_cache(maxsize=1)
def _kept_draws(groups: int, resamples: int, seed: int) -> tuple[Integer[np.ndarray, "resamples groups"], ...]:
    """Return all of `_draws`: every metric of an evaluation asks for the same ones, and drawing is most of the work."""
    return tuple(_draws(groups, resamples, seed))


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums over counts, NaN where nothing was counted."""
    means: np.ndarray = np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
    return means


def _mean_of_rows(table: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, " rows"]:
    known = ~np.isnan(table)
    return _means(np.where(known, table, 0.0).sum(1), known.sum(1).astype(np.float64))


def _interval(
    mean: float,
    drawn: Float64[np.ndarray, " resamples"],
    left_out: Float64[np.ndarray, " groups"],
    n: int,
    confidence: float,
) -> Interval:
    """Return the BCa interval; `left_out` are the means without one of the groups each."""
    if n == 0:
        return Interval(None, None, None, 0)
    drawn, left_out = drawn[~np.isnan(drawn)], left_out[~np.isnan(left_out)]
    if len(left_out) < 2 or not len(drawn):
        return Interval(float(mean), None, None, n)
    below = (np.count_nonzero(drawn < mean) + 0.5 * np.count_nonzero(drawn == mean)) / len(drawn)
    spread = left_out.mean() - left_out
    # Asked of the power, which is 0 for values as small as 1e-110 though the squares are not.
    scale = float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / (6 * scale) if scale > 0 else 0.0
    # Where every draw lies on one side the correction is infinite: the plain percentiles are left.
    bias = float(ndtri(below)) if 0 < below < 1 else 0.0
    # A bootstrap of few groups is too narrow, as a normal interval in place of Student's is: its tails are widened.
    tail = float(stdtrit(len(left_out) - 1, (1 - confidence) / 2)) * math.sqrt(len(left_out) / (len(left_out) - 1))
    shares = []
    for quantile in (tail, -tail):
        shifted = bias + quantile
        shares.append(float(ndtr(bias + shifted / (1 - acceleration * shifted))))
    low, high = np.quantile(drawn, shares)
    return Interval(float(mean), float(low), float(high), n)
