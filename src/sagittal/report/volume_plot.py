"""Predicted against reference volumes, as Bland and Altman plot two measurements of one thing: a panel per class."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from sagittal.evaluation import Evaluation
from sagittal.report.axes import Axis, linear_axis
from sagittal.report.colours import class_colour
from sagittal.report.strips import PLAIN_DOTS, dot_radius

LEAST_FOR_LIMITS = 3
"""Cases from which on limits of agreement say something."""


class VolumeDot(NamedTuple):
    """One case: `x` and `y` in percent of the panel, y down."""

    x: float
    y: float
    title: str
    """Empty in panels of more than `PLAIN_DOTS`."""
    empty: bool
    """Whether it was missed or is a false alarm: drawn hollow."""


@dataclass(frozen=True)
class VolumePanel:
    """One class: across the mean of both volumes, upwards the prediction's volume minus the reference's, both in mL."""

    name: str
    colour: str
    x: Axis
    y: Axis
    dots: tuple[VolumeDot, ...]
    bias_ml: float
    limits_ml: tuple[float, float] | None
    """Between which 95 % of the differences would lie if they were normal: bias -+ 1.96 standard deviations."""
    alt: str

    @property
    def radius_px(self) -> float:
        """How large a case is drawn."""
        return dot_radius(len(self.dots))

    @property
    def compact(self) -> bool:
        """Whether there are too many dots for an element each."""
        return len(self.dots) > PLAIN_DOTS

    def path(self, *, empty: bool) -> str:
        """Return all dots of a kind as one SVG path of points in percent."""
        return "".join(f"M{dot.x:.4g} {dot.y:.4g}h0" for dot in self.dots if dot.empty == empty)


def make_volume_panels(evaluation: Evaluation) -> tuple[VolumePanel, ...]:
    """Lay out the volumes of every class that any case has; a case in which neither mask has it is left out.

    Source: J. M. Bland and D. G. Altman, Statistical methods for assessing agreement between two methods of clinical
        measurement, Lancet 327 (1986).
    """
    panels = []
    for number, name in enumerate(evaluation.classes.names):
        scores = [(case.case, case.classes[name]) for case in evaluation.cases]
        pairs = [(case, score.reference_ml, score.prediction_ml) for case, score in scores if score.outcome != "absent"]
        if pairs:
            panels.append(_panel(name, class_colour(number), pairs))
    return tuple(panels)


def _panel(name: str, colour: str, pairs: list[tuple[str, float, float]]) -> VolumePanel:
    differences = [prediction - reference for _, reference, prediction in pairs]
    bias = statistics.fmean(differences)
    limits = None
    if len(pairs) >= LEAST_FOR_LIMITS:
        reach = 1.96 * statistics.stdev(differences)
        limits = (bias - reach, bias + reach)
    means = [(reference + prediction) / 2 for _, reference, prediction in pairs]
    x = linear_axis(min(means), max(means), intervals=3)
    y = linear_axis(min(0.0, *differences, *(limits or ())), max(0.0, *differences, *(limits or ())))
    plain = len(pairs) <= PLAIN_DOTS
    dots = tuple(
        VolumeDot(
            x=x.percent(mean),
            y=100.0 - y.percent(difference),
            title=f"{case}: reference {reference:.4g} mL, prediction {prediction:.4g} mL" if plain else "",
            empty=not (reference and prediction),
        )
        for (case, reference, prediction), mean, difference in zip(pairs, means, differences, strict=True)
    )
    told = f"Volume of {name} in {len(pairs)} cases: predictions are {abs(bias):.3g} mL too "
    told += "large" if bias >= 0 else "small"
    told += " on average"
    if limits is not None:
        told += f", and 95 % of the differences are expected between {limits[0]:.3g} and {limits[1]:.3g} mL"
    return VolumePanel(name, colour, x, y, dots, bias, limits, f"{told}.")
