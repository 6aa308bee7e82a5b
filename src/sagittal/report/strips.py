"""The per-class plot: one dot per case on a line per class, so that no case hides behind a mean."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from sagittal.evaluation import Evaluation
from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour

DOT_STEP_PX = 7.0
BIN_PERCENT = 2.0
MAX_HALF_HEIGHT_PX = 46.0


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
    """All cases of one class."""

    name: str
    colour: str
    dots: tuple[Dot, ...]
    mean_x: float | None
    mean: float | None
    half_height_px: float


@dataclass(frozen=True)
class Strip:
    """One metric for all classes on a common axis."""

    key: str
    title: str
    unit: str
    digits: int
    axis: Axis
    rows: tuple[StripRow, ...]
    floor_x: float | None
    alt: str


def make_strips(evaluation: Evaluation, *, floor: float | None = None) -> tuple[Strip, ...]:
    """Lay out every metric: cases as dots, equal values stacked, the mean of each class; the floor is one of Dice.

    Rows of a class are equally high in all of them, so that they line up where they stand side by side. Penalties
    for empty masks do not stretch the axis (one miss at the image's diagonal would press every other case against
    zero): they lie at its end, hollow. Means do stretch it.
    """
    plain = [_strip(evaluation, key, floor if key == "dice" else None) for key in evaluation.metrics]
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
        dots = _dots(evaluation, key, name, axis)
        rows.append(
            StripRow(
                name=name,
                colour=class_colour(number),
                dots=dots,
                mean_x=None if summary.mean is None else axis.percent(summary.mean),
                mean=summary.mean,
                half_height_px=max([14.0, *(abs(dot.y) + 7.0 for dot in dots)]),
            )
        )
    means = ", ".join(f"{row.name} {row.mean:.{metric.digits}f}" for row in rows if row.mean is not None)
    return Strip(
        key=key,
        title=metric.title,
        unit=metric.unit,
        digits=metric.digits,
        axis=axis,
        rows=tuple(rows),
        floor_x=None if floor is None else axis.percent(floor),
        alt=f"{metric.title} of every case by class. Means: {means or 'none'}.",
    )


def _axis(evaluation: Evaluation, key: str) -> Axis:
    if key == "dice":
        return linear_axis(0.0, 1.0)
    highest = [0.0]
    for name in evaluation.classes.names:
        highest.append(evaluation.summary.classes[name].metrics[key].mean or 0.0)
        for case in evaluation.cases:
            score = case.classes[name]
            if score.outcome == "present":
                highest.append(score.metrics[key] or 0.0)
    return linear_axis(0.0, max(highest))


def _dots(evaluation: Evaluation, key: str, name: str, axis: Axis) -> tuple[Dot, ...]:
    metric = evaluation.metrics[key]
    found = []
    for case in evaluation.cases:
        score = case.classes[name]
        value = score.metrics[key]
        if value is not None:
            told = f"{value:.{metric.digits}f} {metric.unit}".rstrip()
            remark = {"missed": ", missed", "false_alarm": ", false alarm"}.get(score.outcome, "")
            found.append((axis.percent(value), f"{case.case}: {told}{remark}", bool(remark)))
    stacked = Counter(round(x / BIN_PERCENT) for x, _, _ in found)
    deepest = max(stacked.values(), default=1)
    step = min(DOT_STEP_PX, MAX_HALF_HEIGHT_PX / max(1, deepest // 2))
    filled: Counter[int] = Counter()
    dots = []
    for x, title, empty in sorted(found):
        column = round(x / BIN_PERCENT)
        place = filled[column]
        filled[column] += 1
        # 0, +1, -1, +2, -2: a stack grows to both sides of the line.
        level = (place + 1) // 2 * (1 if place % 2 else -1)
        dots.append(Dot(x=x, y=level * step, title=title, empty=empty))
    return tuple(dots)
