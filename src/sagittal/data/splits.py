"""Which cases train and which validate: nnU-Net's five folds by default, so that results compare case by case.

All scans of a patient stay on one side where it is known whose they are: a network that saw a patient's other scan
knows the patient, and its score says too much.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sagittal.errors import DataError
from sagittal.plan.training import Training

MAX_FOLDS = 5


@dataclass(frozen=True)
class Fold:
    """The case ids of one fold, each list in sorted order."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def make_folds(
    case_ids: Iterable[str],
    training: Training,
    *,
    patients: Mapping[str, str] | None = None,
    splits: Sequence[Fold] | None = None,
    strata: Mapping[str, Collection[int]] | None = None,
) -> tuple[Fold, ...]:
    """Return the folds of a training; but for own splits, each case validates in exactly one.

    - `random`: patients in sorted order, dealt as scikit-learn's `KFold(folds, shuffle=True, random_state=split_seed)`
      does. Where every case is a patient of its own this is nnU-Net's split (crossval_split.py).
    - `stratified`: as scikit-learn's `StratifiedKFold(folds, shuffle=True, random_state=split_seed)` over the sorted
      patients, whose class is the set of labels that their cases have: every fold gets its share of each set. A set
      rarer than there are folds goes to as many folds as it can, and how many patients a fold has stays even.
    - `own`: `splits` as they are.

    Args:
        case_ids: every case.
        training: which split; its `patient_pattern` tells patients where `patients` does not.
        patients: the patient of each case.
        splits: for `own`.
        strata: for `stratified`, the label values that each case has.

    Raises:
        DataError: fewer patients than folds, a case without a patient, or own splits that these cases can't have.
    """
    ids = tuple(sorted(case_ids))
    if training.split == "own":
        assert splits is not None, "the caller reads the splits"
        check_splits(splits, ids)
        return tuple(Fold(tuple(sorted(fold.train)), tuple(sorted(fold.validation))) for fold in splits)
    whose = patients_of(ids, training, patients)
    names = sorted(set(whose.values()))
    if len(names) < training.folds:
        counted = f"{len(ids)} cases" if len(names) == len(ids) else f"{len(ids)} cases of {len(names)} patients"
        fewer = ", or ask for fewer folds (--set training.folds=2)" if len(names) > 1 else ""
        raise DataError(
            f"{counted} can't be split into {training.folds} folds, each with one of its own to validate. "
            f"Train on all of them (--fold none){fewer}.",
            code="too_few_cases",
        )
    if training.split == "stratified":
        assert strata is not None, "the caller reads the labels"
        labels_of: dict[str, set[int]] = {name: set() for name in names}
        for case in ids:
            labels_of[whose[case]].update(strata[case])
        number = _stratified([tuple(sorted(labels_of[name])) for name in names], training)
    else:
        number = _shuffled(len(names), training)
    fold_of = dict(zip(names, number, strict=True))
    return tuple(
        Fold(
            train=tuple(case for case in ids if fold_of[whose[case]] != fold),
            validation=tuple(case for case in ids if fold_of[whose[case]] == fold),
        )
        for fold in range(training.folds)
    )


def patients_of(
    case_ids: Sequence[str], training: Training, patients: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the patient of each case: as `patients` says, else by `training.patient_pattern`, else the case itself.

    Raises:
        DataError: a case is not in `patients`, or its id does not fit the pattern.
    """
    if patients is not None:
        absent = [case for case in case_ids if case not in patients]
        if absent:
            raise DataError(
                f"{_some(absent)}: no patient in patients.csv. Expected a row for each of the {len(case_ids)} cases. "
                "Add it, or leave the file out of account (--set training.patients_listed=false).",
                code="unknown_patient",
            )
        return {case: patients[case] for case in case_ids}
    if training.patient_pattern is None:
        return {case: case for case in case_ids}
    pattern = re.compile(training.patient_pattern)
    matches = {case: pattern.fullmatch(case) for case in case_ids}
    # An optional group may be missing in a match, and then names no patient.
    found = {case: match[1] for case, match in matches.items() if match is not None and match[1]}
    absent = [case for case in case_ids if case not in found]
    if absent:
        raise DataError(
            f"{_some(absent)}: the id does not fit training.patient_pattern '{training.patient_pattern}', so its "
            "patient is unknown. Expected the whole id to match and the first group to be the patient. Change the "
            "pattern, or list the patients in patients.csv.",
            code="unknown_patient",
        )
    return found


def check_splits(splits: Sequence[Fold], case_ids: Sequence[str]) -> None:
    """Make sure that own splits can be used with these cases.

    Raises:
        DataError: none or too many folds, an empty side, an unknown case, or one that is on both sides or twice on one.
    """
    if not 1 <= len(splits) <= MAX_FOLDS:
        raise _wrong(f"{len(splits)} folds", f"1 to {MAX_FOLDS}", "Keep those that you want to train")
    known = frozenset(case_ids)
    for number, fold in enumerate(splits):
        for side, cases in (("train", fold.train), ("val", fold.validation)):
            if not cases:
                raise _wrong(f"fold {number} has an empty '{side}'", "at least one case", "Add a case")
            unknown = sorted(set(cases) - known)
            if unknown:
                raise _wrong(
                    f"fold {number}, '{side}': {_some(unknown)} not in the data set",
                    f"ids of its {len(known)} cases, such as {min(known)}",
                    "Correct the ids, or remove them",
                )
            twice = sorted(case for case in set(cases) if cases.count(case) > 1)
            if twice:
                raise _wrong(f"fold {number}, '{side}': {_some(twice)} listed twice", "each case once", "Remove one")
        both = sorted(set(fold.train) & set(fold.validation))
        if both:
            raise _wrong(
                f"fold {number}: {_some(both)} in 'train' and in 'val'",
                "each case on one side: a score on a case that was trained on means nothing",
                "Remove it from one",
            )


def split_warnings(
    folds: Sequence[Fold], case_ids: Iterable[str], patients: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return what a person should know of own splits: cases left out, and patients on both sides."""
    ids = sorted(case_ids)
    lines = []
    for number, fold in enumerate(folds):
        left_out = sorted(set(ids) - set(fold.train) - set(fold.validation))
        if left_out:
            lines.append(f"fold {number} leaves out {len(left_out)} of {len(ids)} cases: {_some(left_out)}")
        whose = patients or {}
        both = {whose[case] for case in fold.train if case in whose} & {
            whose[case] for case in fold.validation if case in whose
        }
        if both:
            lines.append(
                f"fold {number} trains and validates on scans of the same patients ({_some(sorted(both))}), so its "
                "score says too much"
            )
    return tuple(lines)


def folds_sha256(folds: Sequence[Fold]) -> str:
    """Return the hash by which a plan knows its folds again without naming a case."""
    text = json.dumps(splits_tree(folds), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def splits_tree(folds: Sequence[Fold]) -> list[dict[str, list[str]]]:
    """Return folds as nnU-Net's splits_final.json has them."""
    return [{"train": sorted(fold.train), "val": sorted(fold.validation)} for fold in folds]


def _shuffled(count: int, training: Training) -> list[int]:
    """Return the fold of each of `count` patients."""
    order = np.arange(count)
    np.random.RandomState(training.split_seed).shuffle(order)
    number = np.empty(count, dtype=np.int64)
    for fold, members in enumerate(np.array_split(order, training.folds)):
        number[members] = fold
    return [int(fold) for fold in number]


def _stratified(classes: Sequence[tuple[int, ...]], training: Training) -> list[int]:
    """Return the fold of each patient, given the class of each."""
    first_seen = {kind: place for place, kind in enumerate(dict.fromkeys(classes))}
    kinds = np.array([first_seen[kind] for kind in classes])
    # Dealt out in the order of their classes, every fold gets its share of each; a class's patients are then shuffled.
    dealt = np.sort(kinds)
    shares = [np.bincount(dealt[fold :: training.folds], minlength=len(first_seen)) for fold in range(training.folds)]
    random = np.random.RandomState(training.split_seed)
    number = np.empty(len(kinds), dtype=np.int64)
    for kind in range(len(first_seen)):
        folds = np.repeat(np.arange(training.folds), [share[kind] for share in shares])
        random.shuffle(folds)
        number[kinds == kind] = folds
    return [int(fold) for fold in number]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _wrong(what: str, expected: str, remedy: str) -> DataError:
    return DataError(f"own splits: {what}. Expected {expected}. {remedy}.", code="bad_splits")
