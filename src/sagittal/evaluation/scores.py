"""The scores of one case: values, without the rules by which they are computed or averaged.

Undefined is None in Python, null in JSON and an empty cell in CSV; it is never NaN and never 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import ClassVar, Literal

from sagittal.evaluation.calibration import CalibrationScore
from sagittal.evaluation.free_response import FreeResponse
from sagittal.evaluation.lesions import LesionScore
from sagittal.plan.base import Frozen, Triple, TripleMm

DICE = "dice"


class ClassScore(Frozen):
    """One class of one case."""

    reference_ml: float
    prediction_ml: float
    metrics: dict[str, float | None]
    """Value of every metric by its key in `metrics_of(settings)`; None where it is undefined."""
    lesions: LesionScore | None = None
    """Its lesions one by one, where the settings ask for them."""
    free_response: FreeResponse | None = None
    """Lesions found and false alarms at every threshold, where probabilities were given too."""

    later_fields: ClassVar[tuple[str, ...]] = ("lesions", "free_response")

    @property
    def outcome(self) -> Literal["present", "missed", "false_alarm", "absent"]:
        """Whether both masks have the class, only the reference, only the prediction, or neither."""
        if self.reference_ml and self.prediction_ml:
            return "present"
        if self.reference_ml:
            return "missed"
        return "false_alarm" if self.prediction_ml else "absent"


class CaseScore(Frozen):
    """One case: its grid and the score of every class."""

    case: str
    shape: Triple
    """Voxels along D, H, W."""
    spacing_mm: TripleMm
    """Voxel size along D, H, W."""
    classes: dict[str, ClassScore]
    patient: str | None = None
    """Whose scan it is, where that is known: intervals draw patients, not scans. None: a patient of its own."""
    calibration: CalibrationScore | None = None
    """How true the probabilities are, where they were given."""

    later_fields: ClassVar[tuple[str, ...]] = ("patient", "calibration")

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that are defined in this case; None also where no Dice was measured."""
        return mean_of_defined(score.metrics.get(DICE) for score in self.classes.values())


class Failure(Frozen):
    """A case that could not be scored, and why."""

    case: str
    code: str
    message: str


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None where all are."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None
