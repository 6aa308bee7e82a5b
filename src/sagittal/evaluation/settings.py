"""What an evaluation measures: part of its result, so that a number always tells how it was made."""

from __future__ import annotations

import math

from pydantic import model_validator

from sagittal.errors import did_you_mean
from sagittal.evaluation.lesions import LesionRule
from sagittal.evaluation.metrics import METRICS
from sagittal.plan.base import Frozen

SAGITTAL = "sagittal"
"""The protocol of this project: every metric as `docs/metrics.md` defines it."""

NSD = "nsd"
NSD_SURFEL = "nsd_surfel"
FAMILIES = (NSD, NSD_SURFEL)
"""Names that stand for one column per tolerance."""

DEFAULT_METRICS = (
    "dice",
    "iou",
    "precision",
    "recall",
    "volume_error_ml",
    "volume_error_percent",
    "hd95_mm",
    "assd_mm",
    NSD,
)
FAST_METRICS = ("dice", "hd95_mm")
"""Where an evaluation is a step of something else, and its cost matters."""
ALL_METRICS = (*METRICS, *FAMILIES)


class EvaluationSettings(Frozen):
    """The metrics of an evaluation and their parameters."""

    protocol: str = SAGITTAL
    """Whose definitions: "sagittal", or a name in `sagittal.evaluation.protocols.PROTOCOLS`, which brings its own
    metrics and leaves the rest of these settings unused."""
    metrics: tuple[str, ...] = DEFAULT_METRICS
    """Names of `METRICS`, and "nsd" and "nsd_surfel", which stand for one column per tolerance."""
    tolerances_mm: tuple[float, ...] = (2.0,)
    """Distances in mm up to which a surface counts as right, for the NSD of every class."""
    class_tolerances_mm: tuple[tuple[str, float], ...] = ()
    """(class, its own tolerance in mm): makes the columns `nsd_own` and `nsd_surfel_own`. A class that is not named
    here is scored there with the first of `tolerances_mm`."""
    lesions: LesionRule | None = None
    """How connected lesions are matched and counted; None: they are not."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        unknown = [name for name in self.metrics if name not in ALL_METRICS]
        if unknown:
            raise ValueError(f"metric '{unknown[0]}' is unknown.{did_you_mean(unknown[0], ALL_METRICS)}")
        _refuse_repeats("metrics", self.metrics)
        if not self.metrics:
            raise ValueError("metrics: expected at least one name")
        wanted = [*self.tolerances_mm, *(tolerance for _, tolerance in self.class_tolerances_mm)]
        if not all(math.isfinite(tolerance) and tolerance > 0 for tolerance in wanted):
            raise ValueError(f"tolerances must be positive millimetres, got {wanted}")
        if set(FAMILIES) & set(self.metrics) and not self.tolerances_mm:
            raise ValueError("tolerances_mm: an NSD needs at least one")
        _refuse_repeats("tolerances_mm", [f"{tolerance:g}" for tolerance in self.tolerances_mm])
        _refuse_repeats("class_tolerances_mm", [name for name, _ in self.class_tolerances_mm])
        return self


def _refuse_repeats(field: str, values: tuple[object, ...] | list[str]) -> None:
    repeated = sorted({str(value) for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{field}: {', '.join(repeated)} appears more than once")
