"""The same patient, or the same scan, on both sides of a split: scores that look better than they are.

Read are `patients.csv` (columns case and patient) and nnU-Net's `splits_final.json`, both beside dataset.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sagittal.data.doctor.findings import Finding, counted, named
from sagittal.data.split_files import PATIENTS_NAME, SPLITS_NAME, read_patients, read_splits
from sagittal.data.splits import Fold
from sagittal.errors import DataError

_KEEP_TOGETHER = "Put all of them on the same side of every fold, or remove all but one."


def split_faults(folder: Path, cases: frozenset[str], copied: Sequence[Sequence[str]]) -> Iterator[Finding]:
    """Yield what is wrong with patients.csv and splits_final.json, and who is on both sides of a fold.

    Args:
        folder: the data set.
        cases: its case ids.
        copied: groups of cases that share an image.
    """
    patients: Mapping[str, str] = {}
    folds: Sequence[Fold] = ()
    try:
        if (folder / PATIENTS_NAME).is_file():
            patients = read_patients(folder / PATIENTS_NAME)
            yield from _other_cases(PATIENTS_NAME, "patients_file", frozenset(patients), cases)
    except DataError as error:
        yield Finding("warning", "patients_file", "", error.message, "Correct the file, or remove it.")
    try:
        if (folder / SPLITS_NAME).is_file():
            folds = read_splits(folder / SPLITS_NAME)
            listed = frozenset(case for fold in folds for case in (*fold.train, *fold.validation))
            yield from _other_cases(SPLITS_NAME, "splits_file", listed, cases)
    except DataError as error:
        yield Finding("warning", "splits_file", "", error.message, "Correct the file, or remove it.")
    yield from leaks(patients, copied, folds)


def _other_cases(file: str, code: str, listed: frozenset[str], cases: frozenset[str]) -> Iterator[Finding]:
    for what, names in (("names cases that the data set lacks", listed - cases), ("lacks cases", cases - listed)):
        if names:
            message = f"{file} {what}: {len(names)} ({named(sorted(names))})."
            yield Finding("warning", code, "", message, "Correct the file, or check that no case is missing.")


def leaks(patients: Mapping[str, str], copied: Sequence[Sequence[str]], folds: Sequence[Fold]) -> Iterator[Finding]:
    """Yield a warning for every case, patient and copied image that is on both sides of a fold.

    Args:
        patients: the patient of each case, where known.
        copied: groups of cases that share an image.
        folds: the split.
    """
    for number, fold in enumerate(folds):
        both = sorted(set(fold.train) & set(fold.validation))
        if both:
            message = f"fold {number}: {counted(len(both), 'case')} in both training and validation ({named(both)})."
            yield Finding("warning", "leak", both[0], message, "Remove each from one side.")
    by_patient: dict[str, list[str]] = defaultdict(list)
    for case, patient in patients.items():
        by_patient[patient].append(case)
    for patient, cases in by_patient.items():
        yield from _shared(f"patient {patient}", sorted(cases), folds)
    for group in copied:
        yield from _shared("the same image", sorted(group), folds)


def _shared(what: str, cases: Sequence[str], folds: Sequence[Fold]) -> Iterator[Finding]:
    told, involved = [], []
    for number, fold in enumerate(folds):
        train = [case for case in cases if case in fold.train]
        # A case that is on both sides by itself has a finding of its own.
        held_out = [case for case in cases if case in fold.validation and case not in fold.train]
        if train and held_out:
            told.append(f"in fold {number} {named(train)} trains and {named(held_out)} validates")
            involved += [held_out[0], train[0]]
    if told:
        more = f"; and in {len(told) - 3} more folds" if len(told) > 3 else ""
        message = f"{what} is in both training and validation: {'; '.join(told[:3])}{more}."
        look_at = tuple(dict.fromkeys(involved))[:2]
        yield Finding("warning", "leak", look_at[0], message, _KEEP_TOGETHER, look_at=look_at)
