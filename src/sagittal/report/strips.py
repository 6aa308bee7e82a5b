"""The per-class plot: one dot per case on a line per class, so that no case hides behind a mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import NamedTuple

import numpy as np

from sagittal.evaluation import Evaluation, Metric, MetricSummary
from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour
from sagittal.report.main_columns import in_words, plotted_metrics

MAX_HALF_HEIGHT_PX = 46.0
PLAIN_DOTS = 200
"""Up to so many dots of a row are elements of their own, with the case's name under the pointer."""
_RADII_PX = ((60, 4.5), (PLAIN_DOTS, 3.2))
_LEAST_RADIUS_PX = 2.0
_REMARKS = {"missed": ", missed", "false_alarm": ", false alarm"}
_PERCENT_PER_PX = 0.22
"""On a strip of about 450 px."""
_NAMED_CLASSES = 12
"""Classes whose numbers stand in the text of a plot; the table has them all."""


class Dot(NamedTuple):
    """One case: `x` in percent of the strip, `y` in pixels from its middle."""

    x: float
    y: float
    title: str
    """Empty in rows of more than `PLAIN_DOTS`, whose dots are no elements of their own."""
    empty: bool
    """Whether one of the two masks was empty: a miss or a false alarm, drawn hollow."""


class _Mark(NamedTuple):
    """One case in one class."""

    case: str
    metrics: Mapping[str, float | None]
    outcome: str


@dataclass(frozen=True)
class StripRow:
    """All cases of one class; `interval_x` are the ends of the mean's interval, where there is one.

    `mean_x` is None where there is no mean, or where it lies beyond the axis.
    """

    name: str
    colour: str
    dots: tuple[Dot, ...]
    mean_x: float | None
    mean: float | None
    interval_x: tuple[float, float] | None
    radius_px: float
    half_height_px: float

    def path(self, *, empty: bool) -> str:
        """Return all dots of a kind as one SVG path of points, x in percent and y in pixels from the top.

        Thousands of elements would make the page slow: beyond `PLAIN_DOTS` the dots of a row are one.
        """
        chosen = (dot for dot in self.dots if dot.empty == empty)
        return "".join(f"M{dot.x:.4g} {self.half_height_px + dot.y:.4g}h0" for dot in chosen)

    @property
    def compact(self) -> bool:
        """Whether there are too many dots for an element each."""
        return len(self.dots) > PLAIN_DOTS


@dataclass(frozen=True)
class Strip:
    """One metric for all classes on a common axis."""

    key: str
    title: str
    unit: str
    digits: int
    higher_is_better: bool | None
    axis: Axis
    rows: tuple[StripRow, ...]
    floor_x: float | None
    alt: str


def make_strips(evaluation: Evaluation, *, floor: float | None = None) -> tuple[Strip, ...]:
    """Lay out the main metrics: cases as dots, equal values stacked, the mean of each class; the floor is one of Dice.

    Rows of a class are equally high in all of them, so that they line up where they stand side by side. Penalties
    for empty masks do not stretch the axis (one miss at the image's diagonal would press every other case against
    zero): they lie at its end, hollow. A mean that they pull beyond the axis is told in words.
    """
    keys = plotted_metrics(evaluation.metrics)
    marks = {name: _marks(evaluation, name) for name in evaluation.classes.names}
    plain = [_strip(evaluation, key, marks, floor if key == "dice" else None) for key in keys]
    heights = [max(row.half_height_px for row in rows) for rows in zip(*(plot.rows for plot in plain), strict=True)]
    return tuple(
        replace(
            plot,
            rows=tuple(replace(row, half_height_px=height) for row, height in zip(plot.rows, heights, strict=True)),
        )
        for plot in plain
    )


def _marks(evaluation: Evaluation, name: str) -> list[_Mark]:
    return [
        _Mark(case.case, score.metrics, score.outcome) for case in evaluation.cases for score in (case.classes[name],)
    ]


def _strip(evaluation: Evaluation, key: str, marks: Mapping[str, Sequence[_Mark]], floor: float | None) -> Strip:
    metric = evaluation.metrics[key]
    axis = _axis(metric, key, marks)
    rows = []
    for number, (name, of_class) in enumerate(marks.items()):
        summary = evaluation.summary.classes[name].metrics[key]
        dots = _stacked(of_class, key, metric, axis)
        radius = dot_radius(len(dots))
        rows.append(
            StripRow(
                name=name,
                colour=class_colour(number),
                dots=dots,
                mean_x=None if summary.mean is None or not axis.holds(summary.mean) else axis.percent(summary.mean),
                mean=summary.mean,
                interval_x=_interval(summary, axis),
                radius_px=radius,
                half_height_px=max([14.0, *(abs(dot.y) + radius + 2.5 for dot in dots)]),
            )
        )
    return Strip(
        key=key,
        title=metric.title,
        unit=metric.unit,
        digits=metric.digits,
        higher_is_better=metric.higher_is_better,
        axis=axis,
        rows=tuple(rows),
        floor_x=None if floor is None else axis.percent(floor),
        alt=_alt(evaluation, key, metric),
    )


def _interval(summary: MetricSummary, axis: Axis) -> tuple[float, float] | None:
    if summary.low is None or summary.high is None or summary.low > axis.high or summary.high < axis.low:
        return None
    return axis.percent(summary.low), axis.percent(summary.high)


def dot_radius(count: int) -> float:
    """Return how large a case is drawn among `count` of them, in px."""
    return next((radius for limit, radius in _RADII_PX if count <= limit), _LEAST_RADIUS_PX)


def _alt(evaluation: Evaluation, key: str, metric: Metric) -> str:
    told = []
    for name in evaluation.classes.names[:_NAMED_CLASSES]:
        summary = evaluation.summary.classes[name].metrics[key]
        if summary.mean is not None and summary.minimum is not None and summary.maximum is not None:
            told.append(
                f"{name}: mean {in_words(summary.mean, metric)}, from {summary.minimum:.{metric.digits}f} to "
                f"{summary.maximum:.{metric.digits}f} in {summary.n} cases"
            )
    left = len(evaluation.classes.names) - _NAMED_CLASSES
    more = f" {left} more classes are in the table." if left > 0 else ""
    return f"{metric.title} of every case by class. {'; '.join(told) or 'Nothing is defined'}.{more}"


def _axis(metric: Metric, key: str, marks: Mapping[str, Sequence[_Mark]]) -> Axis:
    found = [mark.metrics[key] or 0.0 for of_class in marks.values() for mark in of_class if mark.outcome == "present"]
    values = [0.0, *found]
    low, high = min(values), max(values)
    if metric.higher_is_better and not metric.unit and low >= 0 and high <= 1:
        return linear_axis(0.0, 1.0)
    return linear_axis(low, high)


def _stacked(marks: Sequence[_Mark], key: str, metric: Metric, axis: Axis) -> tuple[Dot, ...]:
    """Return a dot for every case that has a value, in the order of the values; equal ones lie on top of each other."""
    known = [(value, mark) for mark in marks if (value := mark.metrics[key]) is not None]
    if not known:
        return ()
    radius = dot_radius(len(known))
    titles = [""] * len(known)
    if len(known) <= PLAIN_DOTS:
        titles = [f"{mark.case}: {in_words(value, metric)}{_REMARKS.get(mark.outcome, '')}" for value, mark in known]
    empty = np.array([mark.outcome in _REMARKS for _, mark in known])
    x = axis.percents(np.array([value for value, _ in known], np.float64))
    order = np.lexsort((np.array(titles), empty, x))
    columns = np.rint(x[order] / (2 * radius * _PERCENT_PER_PX)).astype(np.intp)
    # Values are in order, so that the dots of a column are neighbours: its place is how far each is from the first.
    _, first, sizes = np.unique(columns, return_index=True, return_counts=True)
    place = np.arange(len(columns)) - np.repeat(first, sizes)
    # 0, +1, -1, +2, -2: a stack grows to both sides of the line.
    level = (place + 1) // 2 * np.where(place % 2, 1, -1)
    y = level * _step(int(sizes.max()), radius)
    shown = zip(x[order].tolist(), y.tolist(), [titles[number] for number in order], empty[order].tolist(), strict=True)
    return tuple(starmap(Dot, shown))


def _step(highest: int, radius: float) -> float:
    """Return how far the dots of a stack are apart, by the number of dots in the highest one."""
    return min(1.6 * radius, MAX_HALF_HEIGHT_PX / max(1, highest // 2))
