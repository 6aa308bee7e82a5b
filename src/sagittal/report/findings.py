"""What an evaluation may hold beside metrics of masks: lesions counted one by one, and how true probabilities are."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from sagittal.evaluation import Evaluation
from sagittal.evaluation.free_response import LUNA16_RATES, FreeResponse, FreeResponsePoint, add_free_responses
from sagittal.evaluation.lesions import LesionScore, pool_lesions

_LEAST_RATE, _GREATEST_RATE = LUNA16_RATES[0], LUNA16_RATES[-1]
"""Ends of the axis of a free-response curve, false alarms per case."""
_STEPS = 48
"""Straight pieces in which such a curve is drawn: on an axis of logarithms its own lines are bent."""


@dataclass(frozen=True)
class LesionRow:
    """The lesions of one class in all cases together.

    Attributes:
        name: of the class.
        pooled: all lesions as if they were of one case.
        cases: cases in which they were counted.
        missed_ml: median volume of those that were missed; None where none was.
        false_ml: median volume of the false alarms; None where there is none.
    """

    name: str
    pooled: LesionScore
    cases: int
    missed_ml: float | None
    false_ml: float | None

    @property
    def false_per_case(self) -> float:
        """False alarms per case."""
        return self.pooled.false_positives / self.cases


@dataclass(frozen=True)
class Reliability:
    """How often something was true that was believed with a probability, over all cases.

    Attributes:
        name: of the class.
        where: the voxels that are counted.
        points: (mean probability, share that was true, voxels) of each bin that has any.
        ece: expected calibration error, the mean distance of both, weighed by voxels.
        brier: mean squared difference of probability and truth.
    """

    name: str
    where: str
    points: tuple[tuple[float, float, int], ...]
    ece: float
    brier: float

    @property
    def path(self) -> str:
        """The points as an SVG polyline in percent, y down."""
        return " ".join(f"{100 * believed:.2f},{100 - 100 * true:.2f}" for believed, true, _ in self.points)

    @property
    def alt(self) -> str:
        """The panel in words."""
        lowest, highest = self.points[0], self.points[-1]
        return (
            f"Reliability of {self.name}, {self.where}: believed with {lowest[0]:.2f} it was true in {lowest[1]:.2f}, "
            f"with {highest[0]:.2f} in {highest[1]:.2f}. Expected calibration error {self.ece:.3f}."
        )


@dataclass(frozen=True)
class DetectionTick:
    """A number of false alarms per case below its axis: `x` in percent."""

    x: float
    label: str


@dataclass(frozen=True)
class DetectionDot:
    """One threshold: `x` and `y` in percent of the panel, y down."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Detection:
    """Lesions of one class found against false alarms per case as the threshold moves, over all cases.

    The axis is that of LUNA16: 1/8 to 8 false alarms per case, each step twice the one before. Thresholds with fewer
    lie at its left end, those with more are beyond it.

    Attributes:
        name: of the class.
        response: the counts of all cases together; it has a lesion at least.
        mean_sensitivity: over the seven rates of LUNA16.
    """

    name: str
    response: FreeResponse
    mean_sensitivity: float

    @property
    def path(self) -> str:
        """The sensitivity that is reached as an SVG polyline in percent, y down."""
        rates = [_LEAST_RATE * (_GREATEST_RATE / _LEAST_RATE) ** (step / _STEPS) for step in range(_STEPS + 1)]
        return " ".join(f"{_rate_percent(rate):.2f},{100 - 100 * self._at(rate):.2f}" for rate in rates)

    @property
    def dots(self) -> tuple[DetectionDot, ...]:
        """Every threshold that lies on the axis."""
        places = zip(reversed(self.response.points), self.response.curve, strict=True)
        return tuple(self._dot(point, rate, found) for point, (rate, found) in places if rate <= _GREATEST_RATE)

    @property
    def ticks(self) -> tuple[DetectionTick, ...]:
        """Every other rate of LUNA16."""
        return tuple(DetectionTick(_rate_percent(rate), _fraction(rate)) for rate in LUNA16_RATES[::2])

    @property
    def alt(self) -> str:
        """The panel in words."""
        told = ", ".join(f"{self._at(rate):.2f} with {_fraction(rate)}" for rate in LUNA16_RATES[::2])
        return (
            f"Sensitivity for lesions of {self.name} by false alarms per case: {told}. "
            f"Mean sensitivity {self.mean_sensitivity:.3f}."
        )

    def _at(self, rate: float) -> float:
        return self.response.sensitivity_at(rate) or 0.0

    def _dot(self, point: FreeResponsePoint, rate: float, sensitivity: float) -> DetectionDot:
        title = (
            f"threshold {point.threshold:g}: {point.detected} of {self.response.lesions} lesions found, "
            f"{rate:.3g} false alarms per case"
        )
        return DetectionDot(_rate_percent(rate), 100 - 100 * sensitivity, title)


def lesion_rows(evaluation: Evaluation) -> tuple[LesionRow, ...]:
    """Return a row per class whose lesions were counted; none where the settings did not ask for them."""
    rows = []
    for name in evaluation.classes.names:
        scores = [lesions for case in evaluation.cases if (lesions := case.classes[name].lesions) is not None]
        if scores:
            pooled = pool_lesions(scores)
            missed, false = pooled.false_negatives_ml, pooled.false_positives_ml
            rows.append(LesionRow(name, pooled, len(scores), _median(missed), _median(false)))
    return tuple(rows)


def calibration_panels(evaluation: Evaluation) -> tuple[Reliability, ...]:
    """Return the reliability of every class near the foreground, over all cases; none without probabilities.

    Far from everything nobody doubts the background: counted over the whole scan every model looks calibrated.
    """
    scores = [case.calibration for case in evaluation.cases if case.calibration is not None]
    if not scores:
        return ()
    total = reduce(operator.add, scores)
    where = f"within {total.margin_mm:g} mm of the foreground"
    panels = []
    for name in evaluation.classes.names:
        near = total.near_foreground
        if name in near.classes and (error := near.classes[name].expected_error) is not None:
            brier = near.class_brier(name) or 0.0
            panels.append(Reliability(name, where, near.classes[name].curve, error, brier))
    return tuple(panels)


def detection_panels(evaluation: Evaluation) -> tuple[Detection, ...]:
    """Return the free-response curve of every class with any lesion, over all cases; none without probabilities."""
    panels = []
    for name in evaluation.classes.names:
        found = [curve for case in evaluation.cases if (curve := case.classes[name].free_response) is not None]
        if found:
            total = add_free_responses(found)
            if (mean := total.mean_sensitivity) is not None:
                panels.append(Detection(name, total, mean))
    return tuple(panels)


def _rate_percent(rate: float) -> float:
    if rate <= _LEAST_RATE:
        return 0.0
    return 100 * math.log(rate / _LEAST_RATE) / math.log(_GREATEST_RATE / _LEAST_RATE)


def _fraction(rate: float) -> str:
    return f"{rate:g}" if rate >= 1 else f"1/{1 / rate:g}"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
