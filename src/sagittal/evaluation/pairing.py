"""Several evaluations of the same cases -> one table of values that can be compared, nothing dropped unseen.

A case or class that only some of the methods have a value for would, left out, hide exactly what went wrong in the
others. Where that happens the value is set by a stated rule, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sagittal.errors import DataError
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.scores import CaseScore
from sagittal.evaluation.surface import diagonal_mm
from sagittal.evaluation.table import Evaluation

Missing = Literal["refuse", "worst"]
MAX_NAMED = 12

PAIRING_RULES: tuple[tuple[str, str], ...] = (
    (
        "Missing cases",
        "A case that one of the methods has no score for is either refused or counted as the worst result in every "
        "class: 0 where higher is better, the image's diagonal for distances, otherwise the largest value that any "
        "method has in the class, and at least what an empty prediction would have.",
    ),
    (
        "Absent classes",
        "Where the reference lacks a class and some methods falsely find it, those that rightly find nothing get the "
        "perfect value (1, or 0 where lower is better); left out, the false alarm would cost nothing. Where no method "
        "has a value the case says nothing about the class and is left out for all of them.",
    ),
    ("Signed errors", "Volume errors are compared by their size, whatever their sign."),
)
"""How values are paired, for the report."""


@dataclass(frozen=True)
class Paired:
    """Values of all methods on the same cases."""

    cases: tuple[str, ...]
    values: dict[str, np.ndarray]
    """Per metric float64 (cases, classes, methods); NaN where undefined, for all methods or for none."""
    missing: dict[str, tuple[str, ...]]
    """Per method the cases that were counted as worst."""
    perfect: int
    """Dice-like or other values that were set because the reference lacks the class and only others found it."""


def pair_evaluations(evaluations: Mapping[str, Evaluation], missing: Missing = "refuse") -> Paired:
    """Align evaluations by case.

    Cases that no method has a score for are in none of the tables.

    Raises:
        DataError: fewer than two methods, classes or metrics that differ, no case that all methods have, references
            that differ, or a method without some cases where `missing` is "refuse"; each is named.
    """
    require_comparable(evaluations)
    scores = {name: {case.case: case for case in item.cases} for name, item in evaluations.items()}
    cases = sorted({case for found in scores.values() for case in found})
    common = [case for case in cases if all(case in found for found in scores.values())]
    if not common:
        told = "; ".join(f"{name}: {_named(sorted(found)) or 'none'}" for name, found in scores.items())
        raise DataError(
            f"the methods have no case in common. Expected predictions of the same cases, under the same names. "
            f"Scored are {told}.",
            code="no_common_cases",
        )
    for case in cases:
        _require_same_reference(case, {name: found[case] for name, found in scores.items() if case in found})
    absent = {name: tuple(case for case in cases if case not in found) for name, found in scores.items()}
    absent = {name: names for name, names in absent.items() if names}
    if absent and missing == "refuse":
        raise _refusal(evaluations, absent, len(cases))
    first = next(iter(evaluations.values()))
    names = first.classes.names
    values, perfect = {}, 0
    for key, metric in first.metrics.items():
        table = _raw_values(scores, cases, names, key)
        # Of a metric that is best at 0, methods are compared by its size.
        table = np.abs(table) if metric.higher_is_better is None else table
        values[key], filled = _complete(table, metric, [_any_score(scores, case) for case in cases], scores)
        perfect += filled
    return Paired(tuple(cases), values, absent, perfect)


def require_comparable(evaluations: Mapping[str, Evaluation]) -> None:
    """Refuse evaluations of other classes or other settings.

    Raises:
        DataError: fewer than two, or they differ; says in what.
    """
    if len(evaluations) < 2:
        raise DataError(
            f"one method ({', '.join(evaluations) or 'none'}) can't be compared. Expected two or more.", code="usage"
        )
    (name, first), *others = evaluations.items()
    for other, evaluation in others:
        if evaluation.classes.labels != first.classes.labels:
            told = [
                ", ".join(f"{label.name} {list(label.values)}" for label in item.classes.labels)
                for item in (first, evaluation)
            ]
            raise DataError(
                f"the classes differ: {name} has {told[0]}; {other} has {told[1]}. "
                "Score both with the same dataset.json (--labels).",
                code="classes_differ",
            )
        if evaluation.settings != first.settings:
            raise DataError(
                f"{name} and {other} were scored with other settings "
                f"({first.settings.model_dump_json()} against {evaluation.settings.model_dump_json()}). "
                "Score both in the same way.",
                code="settings_differ",
            )


def _require_same_reference(case: str, found: Mapping[str, CaseScore]) -> None:
    (name, first), *others = found.items()
    for other, score in others:
        same_grid = score.shape == first.shape and np.allclose(score.spacing_mm, first.spacing_mm, rtol=1e-3)
        volumes = [
            (label, first.classes[label].reference_ml, score.classes[label].reference_ml) for label in first.classes
        ]
        unlike = [item for item in volumes if not math.isclose(item[1], item[2], rel_tol=1e-3, abs_tol=1e-9)]
        if not same_grid or unlike:
            told = f"shape {first.shape}, spacing_mm {first.spacing_mm} against {score.shape}, {score.spacing_mm}"
            if unlike:
                told = f"'{unlike[0][0]}' has {unlike[0][1]:.4g} ml against {unlike[0][2]:.4g} ml"
            raise DataError(
                f"{case}: {name} and {other} were scored against different references ({told}). "
                "Expected one reference for all methods. Score them again with the same --reference.",
                code="references_differ",
            )


def _refusal(evaluations: Mapping[str, Evaluation], absent: Mapping[str, tuple[str, ...]], total: int) -> DataError:
    lines = []
    for name, cases in absent.items():
        reasons = {failure.case: failure.message for failure in evaluations[name].failures}
        why = next((f" ({case}: {reasons[case]})" for case in cases if case in reasons), "")
        lines.append(f"{name} lacks {len(cases)} of {total} cases: {_named(cases)}{why}")
    return DataError(
        f"{'; '.join(lines)}. Every method needs a score for every case, or the comparison is of different cases. "
        "Predict them, or count them as the worst result with --missing worst.",
        code="missing_cases",
    )


def _raw_values(
    scores: Mapping[str, Mapping[str, CaseScore]], cases: list[str], names: tuple[str, ...], key: str
) -> np.ndarray:
    """Return the values as they were measured: (cases, classes, methods), NaN where undefined or missing."""
    table = np.full((len(cases), len(names), len(scores)), np.nan)
    for place, found in enumerate(scores.values()):
        for row, case in enumerate(cases):
            if case in found:
                measured = (found[case].classes[name].metrics[key] for name in names)
                table[row, :, place] = [np.nan if value is None else value for value in measured]
    return table


def _any_score(scores: Mapping[str, Mapping[str, CaseScore]], case: str) -> CaseScore:
    return next(found[case] for found in scores.values() if case in found)


def _complete(
    table: np.ndarray, metric: Metric, known: list[CaseScore], scores: Mapping[str, Mapping[str, CaseScore]]
) -> tuple[np.ndarray, int]:
    """Set values where only some of the methods have one; return also how many were set to perfect."""
    undefined = np.isnan(table)
    partly = undefined & ~undefined.all(2, keepdims=True)
    # Of values without a natural worst one, the worst that was seen: never kinder than a method that tried.
    largest = np.nanmax(np.where(undefined, 0.0, table), axis=(0, 2)) if table.size else np.zeros(table.shape[1])
    table, perfect = table.copy(), 0
    methods = list(scores.values())
    for row, column, place in zip(*np.nonzero(partly), strict=True):
        case = known[row]
        name = list(case.classes)[column]
        own = methods[place].get(case.case)
        if own is not None and own.classes[name].outcome == "absent":
            table[row, column, place] = 1.0 if metric.higher_is_better else 0.0
            perfect += 1
        else:
            table[row, column, place] = _worst(metric, case, name, float(largest[column]))
    return table, perfect


def _worst(metric: Metric, case: CaseScore, name: str, largest: float) -> float:
    if metric.higher_is_better:
        return 0.0
    if metric.unit == "mm":
        return diagonal_mm(case.shape, case.spacing_mm)
    of_empty = {"mL": case.classes[name].reference_ml, "%": 100.0}
    return max(largest, of_empty.get(metric.unit, 0.0))


def _named(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
