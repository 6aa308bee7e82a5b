"""What an evaluation may hold beside metrics of masks: lesions counted one by one, and how true probabilities are."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from sagittal.evaluation import Evaluation
from sagittal.evaluation.lesions import LesionScore


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


def lesion_rows(evaluation: Evaluation) -> tuple[LesionRow, ...]:
    """Return a row per class whose lesions were counted; none where the settings did not ask for them."""
    rows = []
    for name in evaluation.classes.names:
        scores = [lesions for case in evaluation.cases if (lesions := case.classes[name].lesions) is not None]
        if scores:
            pooled = LesionScore(
                rule=scores[0].rule,
                reference=tuple(lesion for score in scores for lesion in score.reference),
                predicted=tuple(lesion for score in scores for lesion in score.predicted),
            )
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


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
