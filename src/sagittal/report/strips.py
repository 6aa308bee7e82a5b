"""The per-class plot: one dot per case on a line per class, so that no case hides behind a mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sagittal.evaluation import Evaluation, Metric, MetricSummary
from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour
from sagittal.report.main_columns import in_words, plotted_metrics

MAX_HALF_HEIGHT_PX = 46.0
PLAIN_DOTS = 200
"""Up to so many dots of a row are elements of their own, with the case's name under the pointer."""
_RADII_PX = ((60, 4.5), (PLAIN_DOTS, 3.2))
_LEAST_RADIUS_PX = 2.0
_PERCENT_PER_PX = 0.22
"""On a strip of about 450 px."""
_NAMED_CLASSES = 12
"""Classes whose numbers stand in the text of a plot; the table has them all."""


@dataclass(frozen=True)
class Dot:
    """One case: `x` in percent of the strip, `y` in pixels from its middle."""

    x: float
    y: float
    title: str
    empty: bool
    """Whether one of the two masks was empty: a miss or a false alarm, drawn hollow."""


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
    plain = [_strip(evaluation, key, floor if key == "dice" else None) for key in keys]
    heights = [max(row.half_height_px for row in rows) for rows in zip(*(plot.rows for plot in plain), strict=True)]
    return tuple(
        replace(
            plot,
            rows=tuple(replace(row, half_height_px=height) for row, height in zip(plot.rows, heights, strict=True)),
        )
        for plot in plain
    )


def _strip(evaluation: Evaluation, key: str, floor: float | None) -> Strip:
    metric = evaluation.metrics[key]
    axis = _axis(evaluation, key)
    rows = []
    for number, name in enumerate(evaluation.classes.names):
        summary = evaluation.summary.classes[name].metrics[key]
        found = _values(evaluation, key, name, axis)
        radius = dot_radius(len(found))
        dots = _stacked(found, radius)
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


def _axis(evaluation: Evaluation, key: str) -> Axis:
    metric = evaluation.metrics[key]
    scores = [case.classes[name] for case in evaluation.cases for name in evaluation.classes.names]
    values = [0.0, *(score.metrics[key] or 0.0 for score in scores if score.outcome == "present")]
    low, high = min(values), max(values)
    if metric.higher_is_better and not metric.unit and low >= 0 and high <= 1:
        return linear_axis(0.0, 1.0)
    return linear_axis(low, high)


def _values(evaluation: Evaluation, key: str, name: str, axis: Axis) -> list[tuple[float, str, bool]]:
    metric = evaluation.metrics[key]
    found = []
    for case in evaluation.cases:
        score = case.classes[name]
        value = score.metrics[key]
        if value is not None:
            remark = {"missed": ", missed", "false_alarm": ", false alarm"}.get(score.outcome, "")
            found.append((axis.percent(value), f"{case.case}: {in_words(value, metric)}{remark}", bool(remark)))
    return found


def _stacked(found: Sequence[tuple[float, str, bool]], radius: float) -> tuple[Dot, ...]:
    width = 2 * radius * _PERCENT_PER_PX
    step = _step(Counter(round(x / width) for x, _, _ in found).values(), radius)
    filled: Counter[int] = Counter()
    dots = []
    for x, title, empty in sorted(found, key=lambda item: (item[0], item[2], item[1])):
        column = round(x / width)
        place = filled[column]
        filled[column] += 1
        # 0, +1, -1, +2, -2: a stack grows to both sides of the line.
        level = (place + 1) // 2 * (1 if place % 2 else -1)
        dots.append(Dot(x=x, y=level * step, title=title, empty=empty))
    return tuple(dots)


def _step(stacks: Iterable[int], radius: float) -> float:
    return min(1.6 * radius, MAX_HALF_HEIGHT_PX / max(1, max(stacks, default=1) // 2))
