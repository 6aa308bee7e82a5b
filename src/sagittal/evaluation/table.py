"""The result of an evaluation as one value: every case and class, the means, and what failed.

Undefined is None in Python, null in JSON and an empty cell in CSV; it is never NaN and never 0.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from sagittal.errors import DataError
from sagittal.evaluation.bootstrap import Interval, Intervals, bootstrap_means
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.columns import metrics_of
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.protocols import PROTOCOLS, Means
from sagittal.evaluation.scores import DICE, CaseScore, Failure, mean_of_defined
from sagittal.evaluation.settings import SAGITTAL, EvaluationSettings
from sagittal.plan.base import Frozen

_METRICS_OF_SCHEMA_1 = ("dice", "hd95_mm")
"""What every evaluation measured before its settings were part of it."""


class MetricSummary(Frozen):
    """One metric of one class over all cases."""

    mean: float | None
    median: float | None
    minimum: float | None
    maximum: float | None
    n: int
    """Cases in which the metric is defined."""
    undefined: int
    """Cases in which it is not: reference and prediction are both empty, or a percentage of nothing is asked for."""
    std: float | None = None
    """Standard deviation over cases (n - 1); None with fewer than two."""
    low: float | None = None
    """Lower bound of the 95 % interval of the mean, over patients; None with fewer than two."""
    high: float | None = None
    """Upper bound."""


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
    """Per metric the mean over classes of the mean over cases; `mean["dice"]` is the mean foreground Dice. Of another
    protocol than "sagittal" the mean that its tool takes."""
    classes: dict[str, ClassSummary]
    low: dict[str, float | None] = Field(default_factory=dict)
    """Per metric the lower bound of the 95 % interval of `mean`, over patients."""
    high: dict[str, float | None] = Field(default_factory=dict)
    """Upper bound."""


class Evaluation(Frozen):
    """Everything that was measured when predictions were compared with references."""

    schema_version: Literal[2] = 2
    classes: ClassSet
    settings: EvaluationSettings = EvaluationSettings()
    """What was measured, and how."""
    summary: Summary
    cases: tuple[CaseScore, ...]
    """Scored cases, in the order of their names."""
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "JSON text") -> Evaluation:
        """Parse `text`, of this schema or of the first, which had no settings; raise PlanError that names `source`."""
        return super().from_json(_as_schema_2(text), source=source)

    @classmethod
    def of_cases(
        cls,
        classes: ClassSet,
        cases: Sequence[CaseScore],
        *,
        settings: EvaluationSettings | None = None,
        failures: Sequence[Failure] = (),
        warnings: Sequence[str] = (),
    ) -> Evaluation:
        """Summarise scored cases; the order in which they were finished does not matter.

        Args:
            classes: what was scored.
            cases: the scores.
            settings: those that the cases were scored with; by itself `EvaluationSettings()`.
            failures: cases that could not be scored.
            warnings: sentences for whoever reads the result.

        Raises:
            DataError: a case lacks a metric of the settings.
        """
        settings = settings or EvaluationSettings()
        ordered = tuple(sorted(cases, key=lambda score: score.case))
        return cls(
            classes=classes,
            settings=settings,
            summary=summarise(classes, ordered, settings=settings, failed=len(failures)),
            cases=ordered,
            failures=tuple(sorted(failures, key=lambda failure: failure.case)),
            warnings=tuple(warnings),
        )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of this evaluation by key, in the order of its columns."""
        return metrics_of(self.settings)

    @property
    def mean_dice(self) -> float | None:
        """Mean foreground Dice: the mean over classes of the mean over cases; None where nothing was defined."""
        return self.summary.mean.get(DICE)

    @property
    def ranked(self) -> tuple[CaseScore, ...]:
        """Cases from the lowest mean Dice to the highest; those in which no class is defined are left out."""
        defined = [score for score in self.cases if score.mean_dice is not None]
        return tuple(sorted(defined, key=lambda score: (score.mean_dice or 0.0, score.case)))

    def to_csv(self) -> str:
        """Return one row per case and class; undefined values are empty cells."""
        keys = tuple(self.metrics)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "class", *keys, "reference_ml", "prediction_ml"])
        for case in self.cases:
            for name, score in case.classes.items():
                values = [score.metrics[key] for key in keys]
                cells = ["" if value is None else repr(value) for value in values]
                writer.writerow([case.case, name, *cells, repr(score.reference_ml), repr(score.prediction_ml)])
        return text.getvalue()


def _as_schema_2(text: str | bytes) -> str | bytes:
    try:
        tree = json.loads(text)
    except ValueError:
        return text  # It is refused, with the place, by whoever validates it.
    if not isinstance(tree, dict) or tree.get("schema_version") != 1 or "settings" in tree:
        return text
    return json.dumps({**tree, "schema_version": 2, "settings": {"metrics": _METRICS_OF_SCHEMA_1}})


def summarise(
    classes: ClassSet, cases: Sequence[CaseScore], *, settings: EvaluationSettings | None = None, failed: int = 0
) -> Summary:
    """Take means over cases, then over classes, each with its interval over patients.

    Raises:
        DataError: a case lacks a metric of the settings.
    """
    settings = settings or EvaluationSettings()
    keys = tuple(metrics_of(settings))
    for case in cases:
        _require(case, classes, keys)
    patients = [("case", case.case) if case.patient is None else ("patient", case.patient) for case in cases]
    scores = {name: [case.classes[name].metrics for case in cases] for name in classes.names}
    columns = {key: {name: [found[key] for found in scores[name]] for name in classes.names} for key in keys}
    means = {key: _means(settings, key, columns[key], cases) for key in keys}
    intervals = {key: _intervals(list(columns[key].values()), patients) for key in keys}
    summaries = {}
    for place, name in enumerate(classes.names):
        outcomes = [case.classes[name].outcome for case in cases]
        summaries[name] = ClassSummary(
            metrics={
                key: _summarise_metric(columns[key][name], means[key].classes[name], intervals[key].columns[place])
                for key in keys
            },
            missed=outcomes.count("missed"),
            false_alarms=outcomes.count("false_alarm"),
        )
    return Summary(
        cases=len(cases),
        failed=failed,
        mean={key: means[key].overall for key in keys},
        classes=summaries,
        low={key: _around(means[key].overall, intervals[key].overall).low for key in keys},
        high={key: _around(means[key].overall, intervals[key].overall).high for key in keys},
    )


def _means(
    settings: EvaluationSettings, key: str, columns: Mapping[str, Sequence[float | None]], cases: Sequence[CaseScore]
) -> Means:
    if settings.protocol != SAGITTAL:
        return PROTOCOLS[settings.protocol].means(key, tuple(columns), cases)
    of_classes = {name: mean_of_defined(values) for name, values in columns.items()}
    return Means(mean_of_defined(of_classes.values()), of_classes)


def _around(mean: float | None, interval: Interval) -> Interval:
    """Return the interval, without bounds where another tool takes another mean than the one that they enclose."""
    same = mean is not None and interval.mean is not None and math.isclose(mean, interval.mean, rel_tol=1e-9)
    return interval if same else Interval(mean, None, None, interval.n)


def _require(case: CaseScore, classes: ClassSet, keys: Sequence[str]) -> None:
    for name in classes.names:
        lacking = [key for key in keys if key not in case.classes[name].metrics]
        if lacking:
            raise DataError(
                f"{case.case}: class '{name}' has no value for {', '.join(lacking)}, which the settings of this "
                "evaluation ask for. Give the settings that the case was scored with, or score it again.",
                code="metric_missing",
            )


def _intervals(columns: Sequence[Sequence[float | None]], patients: Sequence[tuple[str, str]]) -> Intervals:
    table = np.array([[math.nan if value is None else value for value in column] for column in columns], np.float64)
    return bootstrap_means(table.reshape(len(columns), len(patients)).T, patients)


def _summarise_metric(values: Sequence[float | None], mean: float | None, interval: Interval) -> MetricSummary:
    defined = [value for value in values if value is not None]
    return MetricSummary(
        mean=mean,
        median=statistics.median(defined) if defined else None,
        minimum=min(defined, default=None),
        maximum=max(defined, default=None),
        n=len(defined),
        undefined=len(values) - len(defined),
        std=statistics.stdev(defined) if len(defined) > 1 else None,
        low=_around(mean, interval).low,
        high=_around(mean, interval).high,
    )
