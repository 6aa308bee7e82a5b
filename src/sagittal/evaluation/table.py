"""The result of an evaluation as one value: every case and class, the means, and what failed.

Undefined is None in Python, null in JSON and an empty cell in CSV; it is never NaN and never 0.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.metrics import METRICS
from sagittal.plan.base import Frozen, Triple, TripleMm


class ClassScore(Frozen):
    """One class of one case."""

    reference_ml: float
    prediction_ml: float
    metrics: dict[str, float | None]
    """Value of every metric by its key in `METRICS`; None where it is undefined."""

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

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that are defined in this case."""
        return _mean(score.metrics["dice"] for score in self.classes.values())


class MetricSummary(Frozen):
    """One metric of one class over all cases."""

    mean: float | None
    median: float | None
    minimum: float | None
    maximum: float | None
    n: int
    """Cases in which the metric is defined."""
    undefined: int
    """Cases in which it is not: reference and prediction are both empty."""


class ClassSummary(Frozen):
    """One class over all cases."""

    metrics: dict[str, MetricSummary]
    missed: int
    """Cases whose reference has the class and whose prediction does not."""
    false_alarms: int
    """Cases whose prediction has the class and whose reference does not."""


class Summary(Frozen):
    """All cases in a few numbers."""

    cases: int
    """Cases that were scored."""
    failed: int
    """Cases that could not be scored; they are in no mean."""
    mean: dict[str, float | None]
    """Per metric the mean over classes of the mean over cases; `mean["dice"]` is the mean foreground Dice."""
    classes: dict[str, ClassSummary]


class Failure(Frozen):
    """A case that could not be scored, and why."""

    case: str
    code: str
    message: str


class Evaluation(Frozen):
    """Everything that was measured when predictions were compared with references."""

    schema_version: Literal[1] = 1
    classes: ClassSet
    summary: Summary
    cases: tuple[CaseScore, ...]
    """Scored cases, in the order of their names."""
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_cases(
        cls,
        classes: ClassSet,
        cases: Sequence[CaseScore],
        *,
        failures: Sequence[Failure] = (),
        warnings: Sequence[str] = (),
    ) -> Evaluation:
        """Summarise scored cases; the order in which they were finished does not matter."""
        ordered = tuple(sorted(cases, key=lambda score: score.case))
        return cls(
            classes=classes,
            summary=summarise(classes, ordered, failed=len(failures)),
            cases=ordered,
            failures=tuple(sorted(failures, key=lambda failure: failure.case)),
            warnings=tuple(warnings),
        )

    @property
    def mean_dice(self) -> float | None:
        """Mean foreground Dice: the mean over classes of the mean over cases; None where nothing was defined."""
        return self.summary.mean["dice"]

    @property
    def ranked(self) -> tuple[CaseScore, ...]:
        """Cases from the lowest mean Dice to the highest; those in which no class is defined are left out."""
        defined = [score for score in self.cases if score.mean_dice is not None]
        return tuple(sorted(defined, key=lambda score: (score.mean_dice or 0.0, score.case)))

    def to_csv(self) -> str:
        """Return one row per case and class; undefined values are empty cells."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "class", *METRICS, "reference_ml", "prediction_ml"])
        for case in self.cases:
            for name, score in case.classes.items():
                values = [score.metrics[key] for key in METRICS]
                cells = ["" if value is None else repr(value) for value in values]
                writer.writerow([case.case, name, *cells, repr(score.reference_ml), repr(score.prediction_ml)])
        return text.getvalue()


def summarise(classes: ClassSet, cases: Sequence[CaseScore], *, failed: int = 0) -> Summary:
    """Take means over cases, then over classes."""
    per_class = {name: _summarise_class([case.classes[name] for case in cases]) for name in classes.names}
    return Summary(
        cases=len(cases),
        failed=failed,
        mean={key: _mean(per_class[name].metrics[key].mean for name in classes.names) for key in METRICS},
        classes=per_class,
    )


def _summarise_class(scores: Sequence[ClassScore]) -> ClassSummary:
    return ClassSummary(
        metrics={key: _summarise_metric([score.metrics[key] for score in scores]) for key in METRICS},
        missed=sum(score.outcome == "missed" for score in scores),
        false_alarms=sum(score.outcome == "false_alarm" for score in scores),
    )


def _summarise_metric(values: Sequence[float | None]) -> MetricSummary:
    defined = [value for value in values if value is not None]
    return MetricSummary(
        mean=_mean(defined),
        median=statistics.median(defined) if defined else None,
        minimum=min(defined, default=None),
        maximum=max(defined, default=None),
        n=len(defined),
        undefined=len(values) - len(defined),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None
