"""Which cases train and which validate: nnU-Net's five folds, so that results compare case by case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sagittal.errors import DataError
from sagittal.plan.plan import Training


@dataclass(frozen=True)
class Fold:
    """The case ids of one fold, each list in sorted order."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def five_folds(case_ids: Iterable[str], training: Training) -> tuple[Fold, ...]:
    """Return `training.folds` folds (five by default); each case validates in exactly one.

    Equal to scikit-learn's `KFold(folds, shuffle=True, random_state=split_seed)` over the sorted ids, which is
    nnU-Net's split (crossval_split.py).

    Raises:
        DataError: fewer cases than folds.
    """
    ids = tuple(sorted(case_ids))
    if len(ids) < training.folds:
        raise DataError(
            f"{len(ids)} cases can't be split into {training.folds} folds, each with a case of its own to validate. "
            "Train on all of them (--fold none), or ask for fewer folds (--set training.folds=2).",
            code="too_few_cases",
        )
    order = np.arange(len(ids))
    np.random.RandomState(training.split_seed).shuffle(order)
    folds = []
    for validation in np.array_split(order, training.folds):
        chosen = frozenset(validation.tolist())
        folds.append(
            Fold(
                train=tuple(case for index, case in enumerate(ids) if index not in chosen),
                validation=tuple(case for index, case in enumerate(ids) if index in chosen),
            )
        )
    return tuple(folds)
