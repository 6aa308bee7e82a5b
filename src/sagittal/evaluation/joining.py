"""Evaluations of disjoint cases -> one evaluation: the held-out cases of all folds, each scored once."""

from __future__ import annotations

from collections.abc import Mapping

from sagittal.errors import DataError
from sagittal.evaluation.table import Evaluation


def join_evaluations(parts: Mapping[str, Evaluation]) -> Evaluation:
    """Return one evaluation over the cases of all parts; means are taken anew over cases, not over parts.

    A mean over folds weighs a case of a small fold more than one of a large fold; a mean over cases does not.

    Args:
        parts: evaluations by what messages call them, for example the fold.

    Raises:
        DataError: no parts, a case in two of them, or classes or settings that differ.
    """
    if not parts:
        raise DataError("no evaluations to join. Expected one per fold.", code="no_folds")
    first_name, first = next(iter(parts.items()))
    owner: dict[str, str] = {}
    for name, part in parts.items():
        if part.classes != first.classes or part.settings != first.settings:
            raise DataError(
                f"{first_name} and {name} can't be joined: their classes or settings differ. "
                "Score all folds in the same way.",
                code="classes_differ",
            )
        for case in (*(score.case for score in part.cases), *(failure.case for failure in part.failures)):
            if case in owner:
                raise DataError(
                    f"{case} is in {owner[case]} and in {name}. Expected every case in one fold only, or it would "
                    "count twice. Join folds of one split.",
                    code="repeated_case",
                )
            owner[case] = name
    return Evaluation.of_cases(
        first.classes,
        [case for part in parts.values() for case in part.cases],
        failures=[failure for part in parts.values() for failure in part.failures],
        warnings=list(dict.fromkeys(warning for part in parts.values() for warning in part.warnings)),
        settings=first.settings,
    )
