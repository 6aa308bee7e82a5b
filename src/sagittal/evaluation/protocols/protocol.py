"""What a protocol is made of: whose metrics, of which classes, and how they become means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.scores import CaseScore, ClassScore
from sagittal.evaluation.settings import EvaluationSettings

Columns = Callable[[EvaluationSettings], Mapping[str, Metric]]
Averaging = Callable[[Float64[np.ndarray, "cases classes"]], tuple[float, Float64[np.ndarray, " classes"]]]
"""Table of one metric, NaN where undefined -> the overall mean, and the mean of each class."""


class Means(NamedTuple):
    """What the tool would report as means of one metric; None where that is NaN or infinite."""

    overall: float | None
    classes: dict[str, float | None]


def as_given(classes: ClassSet) -> ClassSet:
    """Score what the data set declares: the choice of tools that know no classes of their own."""
    return classes


def unchanged(settings: EvaluationSettings, classes: ClassSet) -> EvaluationSettings:
    """Leave the settings: the protocol has no parameter that depends on the data set."""
    return settings


def always(metrics: Mapping[str, Metric]) -> Columns:
    """Return the columns of a tool whose table no setting changes."""
    return lambda settings: metrics


@dataclass(frozen=True)
class Protocol:
    """How one tool or challenge scores, so that its numbers can be reproduced.

    A value that the tool calls NaN or infinite is None here, as in every result; `infinite` tells the two apart.
    """

    name: str
    title: str
    columns: Columns
    """Settings -> its metrics by key, in the order of its own table."""
    headline: tuple[str, ...]
    """Keys of the metrics that the tool reports as its result."""
    averaging: Averaging
    mean_rule: str
    """How `averaging` takes means, in a sentence."""
    peculiar: tuple[str, ...]
    """Sentences: what to know before its numbers are compared with others."""
    source: str
    choose: Callable[[ClassSet], ClassSet] = as_given
    """Classes of a data set -> what is scored; raises DataError where they do not fit."""
    settle: Callable[[EvaluationSettings, ClassSet], EvaluationSettings] = unchanged
    """Fills in what depends on the data set, such as tolerances; what is scored is given."""
    tolerances: Literal["none", "shared", "by_class"] = "none"
    """Which of the settings' tolerances it looks at: none, those of all classes, or those of single classes too."""
    infinite: frozenset[str] = frozenset()
    """Keys of metrics that are infinite, not NaN, where exactly one mask is empty."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Its metrics by key where the settings say nothing else."""
        return self.columns(EvaluationSettings(protocol=self.name))

    @property
    def rules(self) -> tuple[tuple[str, str], ...]:
        """(name, rule) of what a reader has to know beside its metrics."""
        return (
            ("Protocol", f"{self.title}: {self.source}"),
            ("Means", self.mean_rule),
            ("What to know", " ".join(self.peculiar)),
        )

    def classes(self, given: ClassSet | Sequence[int]) -> ClassSet:
        """Return what this protocol scores.

        Args:
            given: classes and regions of a data set, or the values that its label maps have.

        Raises:
            DataError: the protocol has classes of its own, and these can't be told among the given ones.
        """
        return self.choose(given if isinstance(given, ClassSet) else ClassSet.of_values(given))

    def settings(self, given: EvaluationSettings, classes: ClassSet) -> EvaluationSettings:
        """Return the settings with everything that depends on the data set filled in.

        Args:
            given: settings of this protocol.
            classes: what is scored, as `classes` returns it.

        Raises:
            DataError: a parameter can't be told from the classes, and `given` lacks it.
        """
        # `replace` would make every field one that was given, and what was left open couldn't be told any more.
        own = {name: getattr(given, name) for name in given.model_fields_set if name != "protocol"}
        return self.settle(EvaluationSettings(protocol=self.name, **own), classes)

    def means(self, key: str, names: Sequence[str], cases: Sequence[CaseScore]) -> Means:
        """Take the means of one metric as the tool does.

        Args:
            key: of the metric.
            names: classes, in the order of the result.
            cases: their scores by this protocol.
        """
        rows = [[self._raw(key, case.classes[name]) for name in names] for case in cases]
        table = np.array(rows, dtype=np.float64).reshape(len(cases), len(names))
        overall, columns = self.averaging(table)
        return Means(_finite(overall), {name: _finite(value) for name, value in zip(names, columns, strict=True)})

    def _raw(self, key: str, score: ClassScore) -> float:
        value = score.metrics[key]
        if value is not None:
            return value
        return math.inf if key in self.infinite and score.outcome in ("missed", "false_alarm") else math.nan


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
