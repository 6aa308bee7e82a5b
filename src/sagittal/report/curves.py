"""The training curve: records of a run -> panels of points, drawn by the page as inline SVG.

A run has thousands of steps and a screen has a few hundred columns: steps are averaged into bins, so that the line
shows the trend; the band behind it shows between which values the steps of a bin lay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour

MAX_POINTS = 120
_UNITS = (("s", 1), ("min", 60), ("h", 3600))

Record = Mapping[str, Any]
"""A line of a run's log: `kind` "step" (step, loss, learning_rate) or "validation" (step, dice by class, mean_dice)."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a panel; `points` in percent of the panel, x to the right, y down."""

    name: str
    colour: str | None
    """None for the page's own accent colour."""
    points: tuple[Point, ...]
    band: tuple[Point, ...] = ()
    """Outline of the area between lowest and highest value, where points stand for several."""
    marked: bool = False
    """Whether each point is a measurement of its own, so that it gets a dot."""

    @property
    def path(self) -> str:
        """The points as the `points` of an SVG polyline."""
        return _svg(self.points)

    @property
    def band_path(self) -> str:
        """The band as the `points` of an SVG polygon."""
        return _svg(self.band)


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    alt: str


def training_panels(records: Iterable[Record]) -> tuple[Panel, ...]:
    """Return the panels that the records have something for: loss, validation Dice, learning rate.

    Steps may come in any order (a resumed run repeats some); the last record of a step counts. Values that are missing
    or not finite are left out.
    """
    steps, validations = _last_of_each(records, "step"), _last_of_each(records, "validation")
    last = float(max([1, *steps, *validations]))
    x = Axis(0.0, last, tuple(tick for tick in linear_axis(0.0, last).ticks if tick <= last))
    panels = (
        _loss_panel(_series(steps, lambda record: record.get("loss")), x),
        _dice_panel(validations, x),
        _rate_panel(_series(steps, lambda record: record.get("learning_rate")), x),
    )
    return tuple(panel for panel in panels if panel is not None)


def progress_panels(
    series: Mapping[str, Float[np.ndarray, " n"]], validations: Sequence[Record], *, end: int
) -> tuple[Panel, ...]:
    """Return the panels of a run that is going on: Dice over steps and over time, loss, rate, step time, waiting.

    Args:
        series: of every step, in order: `step`, `loss`, `learning_rate`, `seconds` (training time so far), `step_s` and
            `waited_s`; NaN where a number is not known.
        validations: records of kind "validation", with `elapsed_s` besides.
        end: the last step, so that the curves show how far the run is.
    """
    x = Axis(0.0, float(max(end, 1)), tuple(tick for tick in linear_axis(0.0, float(max(end, 1))).ticks if tick <= end))
    steps, checked = series["step"], _last_of_each(validations, "validation")
    loss, rate = (list(zip(steps.tolist(), series[name].tolist(), strict=True)) for name in ("loss", "learning_rate"))
    panels = (
        _dice_panel(checked, x),
        _dice_over_time(checked, series["seconds"]),
        _loss_panel([point for point in loss if math.isfinite(point[1])], x),
        _rate_panel([point for point in rate if math.isfinite(point[1])], x),
        *_time_panels(series, x),
    )
    return tuple(panel for panel in panels if panel is not None)


def _dice_over_time(validations: Mapping[int, Record], seconds: Float[np.ndarray, " n"]) -> Panel | None:
    timed = [record for record in validations.values() if "elapsed_s" in record]
    if not timed:
        return None
    last_s = max([float(timed[-1]["elapsed_s"]), *seconds[-1:].tolist()])
    unit, length = next((name, size) for name, size in _UNITS if last_s <= 180 * size or name == "h")
    last = last_s / length
    x = Axis(0.0, last, tuple(tick for tick in linear_axis(0.0, last).ticks if tick <= last))
    by_time = {record["elapsed_s"] / length: record for record in timed}
    return _dice_panel(by_time, x, title=f"Validation Dice over time ({unit})")


def _time_panels(series: Mapping[str, Float[np.ndarray, " n"]], x: Axis) -> Iterable[Panel]:
    known = np.isfinite(series["step_s"]) & np.isfinite(series["waited_s"])
    steps, step_s, waited_s = (series[name][known] for name in ("step", "step_s", "waited_s"))
    if not steps.size:
        return
    size = math.ceil(len(steps) / MAX_POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    middle, took, waited = (np.add.reduceat(values, starts) / counts for values in (steps, step_s, waited_s))
    # The first step allocates and compiles: it would press all others against zero.
    usual = took[1:] if len(took) > 1 else took
    y = linear_axis(0.0, float(usual.max()))
    points = list(zip(middle.tolist(), took.tolist(), strict=True))
    alt = f"Seconds per step, {np.median(step_s):.3g} in the median."
    yield Panel("Seconds per step", x, y, (Line("Seconds per step", None, _place(points, x, y)),), alt)
    share = 100 * waited / np.maximum(took, 1e-9)
    y = linear_axis(0.0, max(1.0, float(share.max())))
    alt = f"Share of the time spent waiting for data: {100 * waited_s.sum() / max(step_s.sum(), 1e-9):.1f} % in all."
    points = list(zip(middle.tolist(), share.tolist(), strict=True))
    yield Panel("Waiting for data (% of the time)", x, y, (Line("Waiting", None, _place(points, x, y)),), alt)


def _last_of_each(records: Iterable[Record], kind: str) -> dict[int, Record]:
    found = {int(record["step"]): record for record in records if record.get("kind") == kind and "step" in record}
    return dict(sorted(found.items()))


def _series(records: Mapping[Any, Record], value: Callable[[Record], Any]) -> list[Point]:
    points = []
    for step, record in records.items():
        given = value(record)
        if isinstance(given, int | float) and math.isfinite(given):
            points.append((float(step), float(given)))
    return points


def _loss_panel(points: Sequence[Point], x: Axis) -> Panel | None:
    if not points:
        return None
    binned, lows, highs = _binned(points)
    y = linear_axis(min(low for _, low in lows), max(high for _, high in highs))
    line = Line("Loss", None, _place(binned, x, y), band=_place([*highs, *reversed(lows)], x, y))
    alt = f"Training loss over {len(points)} steps, from {binned[0][1]:.3g} at first to {binned[-1][1]:.3g} at last."
    return Panel("Training loss", x, y, (line,), alt)


def _rate_panel(points: Sequence[Point], x: Axis) -> Panel | None:
    if not points:
        return None
    binned, _, _ = _binned(points)
    peak = max(value for _, value in binned)
    y = linear_axis(0.0, peak)
    alt = f"Learning rate over {len(points)} steps, at most {peak:.3g}, {binned[-1][1]:.3g} at last."
    return Panel("Learning rate", x, y, (Line("Learning rate", None, _place(binned, x, y)),), alt)


def _dice_panel(validations: Mapping[Any, Record], x: Axis, title: str = "Validation Dice") -> Panel | None:
    mean = _series(validations, lambda record: record.get("mean_dice"))
    if not mean:
        return None
    y = linear_axis(0.0, 1.0)
    names = list(dict.fromkeys(name for record in validations.values() for name in record.get("dice", {})))
    lines = []
    for number, name in enumerate(names if len(names) > 1 else ()):
        points = _series(validations, lambda record, name=name: record.get("dice", {}).get(name))  # type: ignore[misc]
        lines.append(Line(name, class_colour(number), _place(points, x, y)))
    lines.append(Line("Mean", None, _place(mean, x, y), marked=True))
    best_at, best = max(mean, key=lambda point: point[1])
    best_step = next(record["step"] for at, record in validations.items() if float(at) == best_at)
    alt = f"{title} at {len(mean)} checks: {mean[-1][1]:.3f} at last, best {best:.3f} at step {best_step}."
    return Panel(title, x, y, tuple(lines), alt)


def _binned(points: Sequence[Point]) -> tuple[list[Point], list[Point], list[Point]]:
    """Return mean, lowest and highest value of at most `MAX_POINTS` runs of neighbouring steps."""
    size = math.ceil(len(points) / MAX_POINTS)
    means, lows, highs = [], [], []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        step = sum(x for x, _ in part) / len(part)
        values = [value for _, value in part]
        means.append((step, sum(values) / len(values)))
        lows.append((step, min(values)))
        highs.append((step, max(values)))
    return means, lows, highs


def _place(points: Sequence[Point], x: Axis, y: Axis) -> tuple[Point, ...]:
    return tuple((x.percent(step), 100.0 - y.percent(value)) for step, value in points)


def _svg(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
