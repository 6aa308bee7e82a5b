"""Where the marks of a comparison's plots lie: every case in every method, differences with intervals, ranks.

x in percent and y in pixels, as everywhere on our pages, so that letters keep their size on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sagittal.evaluation import Metric
from sagittal.evaluation.comparison import Comparison
from sagittal.evaluation.contests import Contest, MetricComparison, PairScore
from sagittal.evaluation.ranking import RULES, RuleRanking
from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour
from sagittal.report.comparison_tables import columns_of, compared_title, p_equation
from sagittal.report.tables import MEAN_ROW, spread_text

HEIGHT_PX = 230.0
TOP_PX = 10.0
MAX_MARKS = 40_000
"""Dots and lines of one page: a phone still opens it; values.csv has them all."""


@dataclass(frozen=True)
class PairedDot:
    """One case in one method."""

    x: float
    y: float
    title: str
    colour: str
    beyond: bool
    """Whether it lies beyond the axis, and is drawn hollow at its end."""


@dataclass(frozen=True)
class PairedMean:
    """A method's mean and the interval around it."""

    name: str
    x: float
    y: float
    low_y: float | None
    high_y: float | None
    text: str
    colour: str
    beyond: bool
    """Whether it lies beyond the axis, and is drawn as an arrow at its end."""


@dataclass(frozen=True)
class PairedPlot:
    """Every case of one class in all methods, one line per case."""

    title: str
    axis: Axis
    ticks: tuple[tuple[float, str], ...]
    """Height in pixels and text."""
    lines: tuple[tuple[float, float, float, float], ...]
    """x1, y1, x2, y2."""
    dots: tuple[PairedDot, ...]
    means: tuple[PairedMean, ...]
    alt: str


@dataclass(frozen=True)
class ForestRow:
    """One difference with its interval."""

    name: str
    x: float
    low_x: float | None
    high_x: float | None
    text: str
    better: str | None
    is_mean: bool


@dataclass(frozen=True)
class Forest:
    """The differences of one pair of methods, on the mean over classes and in every class."""

    first: str
    second: str
    axis: Axis
    zero_x: float
    margin_x: tuple[float, float] | None
    left: str
    """The method that values left of zero speak for; empty where neither is."""
    right: str
    rows: tuple[ForestRow, ...]
    alt: str


@dataclass(frozen=True)
class RankPart:
    """The share of samples in which a method has a rank: a stretch of its bar."""

    rank: int
    x: float
    width: float
    strength: float
    """1 for the best rank, less for every worse one."""


@dataclass(frozen=True)
class RankRow:
    """One method by one rule."""

    name: str
    colour: str
    rank: int
    score: str
    parts: tuple[RankPart, ...]


@dataclass(frozen=True)
class RankPlot:
    """All methods by one rule."""

    title: str
    note: str
    tau: str
    rows: tuple[RankRow, ...]
    alt: str


def paired_plots(comparison: Comparison, key: str, metric: Metric) -> tuple[tuple[PairedPlot, ...], int]:
    """Return the plots of a metric, the mean over classes first, and how many classes were left out for their size."""
    found = comparison.metrics[key]
    tables = _tables(comparison, found)
    most = max(1, MAX_MARKS // max(1, 2 * len(comparison.cases) * len(comparison.methods)))
    shown = list(tables)[:most]
    return tuple(_paired(comparison, name, tables[name], metric) for name in shown), len(tables) - len(shown)


def _tables(
    comparison: Comparison, found: MetricComparison
) -> dict[str, tuple[Contest, dict[str, tuple[float | None, ...]]]]:
    """Return contest and values by method: of the mean over classes where there are several, then of every class."""
    tables = {name: (contest, found.values[name]) for name, contest in found.classes.items()}
    if len(tables) == 1:
        return tables
    means = {
        method: tuple(
            _mean([found.values[name][method][place] for name in found.classes])
            for place in range(len(comparison.cases))
        )
        for method in comparison.methods
    }
    return {MEAN_ROW: (found.mean, means), **tables}


def _paired(
    comparison: Comparison, name: str, table: tuple[Contest, dict[str, tuple[float | None, ...]]], metric: Metric
) -> PairedPlot:
    contest, values = table
    known = [value for row in values.values() for value in row if value is not None]
    bounded = metric.unit == "" and bool(metric.higher_is_better)
    axis = linear_axis(*_range(known, bounded=bounded))
    share = 100 / len(comparison.methods)
    places = {method: share * (number + 0.5) for number, method in enumerate(comparison.methods)}
    dots, lines = [], []
    for row, case in enumerate(comparison.cases):
        points = []
        for number, method in enumerate(comparison.methods):
            value = values[method][row]
            if value is None:
                continue
            told = f"{case}, {method}: {value:.{metric.digits}f} {metric.unit}".rstrip()
            beyond = not axis.holds(value)
            dots.append(PairedDot(places[method], _height(axis, value), told, class_colour(number), beyond))
            points.append((places[method], _height(axis, value)))
        lines += [(x1, y1, x2, y2) for (x1, y1), (x2, y2) in pairwise(points)]
    means = tuple(
        PairedMean(
            name=method,
            x=places[method],
            y=_height(axis, score.mean),
            low_y=None if score.low is None else _height(axis, score.low),
            high_y=None if score.high is None else _height(axis, score.high),
            text=spread_text(score.mean, None, score.low, score.high, metric.digits),
            colour=class_colour(number),
            beyond=not axis.holds(score.mean),
        )
        for number, (method, score) in enumerate(contest.methods.items())
        if score.mean is not None
    )
    told = "; ".join(f"{mean.name} {mean.text}" for mean in means) or "undefined in every case"
    return PairedPlot(
        title=name,
        axis=axis,
        ticks=tuple((_height(axis, tick), axis.label(tick)) for tick in axis.ticks),
        lines=tuple(lines),
        dots=tuple(dots),
        means=means,
        alt=f"{compared_title(metric)}, {name}: every case in every method. Means and 95 % intervals: {told}.",
    )


def forests(comparison: Comparison, key: str, metric: Metric) -> tuple[Forest, ...]:
    """Return the differences of every pair by a metric, the mean over classes first."""
    contests = columns_of(comparison, key)
    columns = sorted(contests.items(), key=lambda item: item[0] != MEAN_ROW)
    return tuple(
        _forest([(name, contest.pairs[place]) for name, contest in columns], metric)
        for place in range(len(columns[0][1].pairs))
    )


def _forest(pairs: Sequence[tuple[str, PairScore]], metric: Metric) -> Forest:
    first, second = pairs[0][1].first, pairs[0][1].second
    ends = [value for _, pair in pairs for value in (pair.mean, pair.low, pair.high) if value is not None]
    margin = next((pair.equivalence.margin for _, pair in pairs if pair.equivalence), None)
    # Zero in the middle and the margin within: how far a difference is from either is what a reader looks for.
    reach = max([abs(value) for value in ends] + [2 * (margin or 0.0)]) or 1.0
    axis = linear_axis(-reach, reach)
    rows = tuple(
        ForestRow(
            name=name,
            x=axis.percent(pair.mean),
            low_x=None if pair.low is None else axis.percent(pair.low),
            high_x=None if pair.high is None else axis.percent(pair.high),
            text=f"{spread_text(pair.mean, None, pair.low, pair.high, metric.digits + 1)}, "
            f"{p_equation(pair.wilcoxon_holm)}",
            better=pair.better,
            is_mean=name == MEAN_ROW,
        )
        for name, pair in pairs
        if pair.mean is not None
    )
    told = "; ".join(f"{row.name} {row.text}" for row in rows) or "undefined"
    return Forest(
        first=first,
        second=second,
        axis=axis,
        zero_x=axis.percent(0.0),
        margin_x=None if margin is None else (axis.percent(-margin), axis.percent(margin)),
        left=second if metric.higher_is_better else first,
        right=first if metric.higher_is_better else second,
        rows=rows,
        alt=f"{compared_title(metric)}: {first} minus {second} with 95 % intervals. {told}.",
    )


def rank_plots(comparison: Comparison, contest: Contest, metric: Metric) -> tuple[RankPlot, ...]:
    """Return the ranks by every rule with their stability."""
    return tuple(_rank_plot(comparison, ranking, metric) for ranking in contest.rankings)


def _rank_plot(comparison: Comparison, ranking: RuleRanking, metric: Metric) -> RankPlot:
    digits = {"mean": metric.digits, "mean_rank": 2, "significance": 0}[ranking.rule]
    words = {"mean": "mean", "mean_rank": "mean rank", "significance": "won"}[ranking.rule]
    rows = []
    for number, method in enumerate(comparison.methods):
        parts, x = [], 0.0
        for rank, share in enumerate(ranking.shares[method], 1):
            if share > 0:
                strength = 1.0 - 0.75 * (rank - 1) / max(1, len(comparison.methods) - 1)
                parts.append(RankPart(rank, x, 100 * share, strength))
            x += 100 * share
        score = f"{words} {ranking.scores[method]:.{digits}f}"
        rows.append(RankRow(method, class_colour(number), ranking.ranks[method], score, tuple(parts)))
    rows.sort(key=lambda row: row.rank)
    title, note = RULES[ranking.rule]
    tau = "all methods are equal" if ranking.kendall_tau is None else f"Kendall's tau {ranking.kendall_tau:.2f}"
    if ranking.kendall_tau_low is not None:
        tau += f" (5 % of the samples below {ranking.kendall_tau_low:.2f})"
    told = "; ".join(f"{row.name} rank {row.rank}, in samples {_shares(row)}" for row in rows)
    return RankPlot(title, note, tau, tuple(rows), f"{title}: {told}. {tau}.")


def _range(known: Sequence[float], *, bounded: bool) -> tuple[float, float]:
    """Return the ends of an axis: without a few far outliers, which would press all other cases together."""
    if not known:
        return 0.0, 1.0
    ordered = sorted(known)
    low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    reach = 2 * (high - low) if high > low else ordered[-1] - ordered[0]
    return (max(ordered[0], low - reach) if bounded else 0.0), min(ordered[-1], high + reach)


def _height(axis: Axis, value: float) -> float:
    return TOP_PX + (HEIGHT_PX - 2 * TOP_PX) * (1 - axis.percent(value) / 100)


def _shares(row: RankRow) -> str:
    return ", ".join(f"rank {part.rank} {part.width:.0f} %" for part in row.parts) or "no rank"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
