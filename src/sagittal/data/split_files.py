"""What tells how a data set is split: patients.csv, splits_final.json, and the labels that each case has."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sagittal.data.dataset import Case, Dataset
from sagittal.data.splits import Fold, splits_tree
from sagittal.errors import DataError
from sagittal.plan.base import write_atomically
from sagittal.volumes import read_labels

PATIENTS_NAME = "patients.csv"
SPLITS_NAME = "splits_final.json"
"""nnU-Net's name: a list of {"train": [case, ...], "val": [case, ...]}, one entry per fold."""


def read_patients(path: Path) -> dict[str, str]:
    """Return the patient of each case from a table with the columns `case` and `patient`; further ones are left alone.

    Raises:
        DataError: the file can't be read, a column is missing, a field is empty, or a case has two patients.
    """
    rows = csv.DictReader(io.StringIO(_text(path)), skipinitialspace=True)
    if not {"case", "patient"} <= set(rows.fieldnames or ()):
        raise _wrong_table(path, f"columns {', '.join(rows.fieldnames or ()) or 'none'}")
    patients: dict[str, str] = {}
    for row in rows:
        case, patient = ((row[column] or "").strip() for column in ("case", "patient"))
        if not case or not patient:
            raise _wrong_table(path, f"line {rows.line_num} has an empty case or patient")
        if patients.setdefault(case, patient) != patient:
            raise _wrong_table(path, f"line {rows.line_num}: {case} is {patient} here and {patients[case]} above")
    return patients


def read_splits(path: Path) -> tuple[Fold, ...]:
    """Return own splits from a file as nnU-Net's splits_final.json; whether they fit a data set is not checked here.

    Raises:
        DataError: the file can't be read or has another form.
    """
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise _wrong_splits(path, f"no JSON ({error})") from None
    if not isinstance(content, list) or not content:
        raise _wrong_splits(path, f"a JSON {type(content).__name__}{'' if content else ' without entries'}")
    return tuple(_fold(entry, number, path) for number, entry in enumerate(content))


def write_splits(path: Path, folds: Sequence[Fold]) -> Path:
    """Write folds as nnU-Net's splits_final.json and return the path.

    Raises:
        ResourceError: the disk is full or the folder can't be written.
    """
    return write_atomically(path, (json.dumps(splits_tree(folds), indent=2) + "\n").encode())


def label_sets(dataset: Dataset, *, workers: int) -> dict[str, frozenset[int]]:
    """Return which of the declared label values each case has; label maps are read one per worker at a time.

    Raises:
        DataError: a label map can't be read.
    """
    values = sorted(dataset.spec.foreground_values)

    def look(case: Case) -> frozenset[int]:
        assert case.labels is not None, "a training case"
        labels, _ = read_labels(case.labels)
        return frozenset(value for value in values if bool((labels == value).any()))

    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="labels") as pool:
        return dict(zip((case.id for case in dataset.cases), pool.map(look, dataset.cases), strict=True))


def _fold(entry: Any, number: int, path: Path) -> Fold:
    sides = [entry.get(name) if isinstance(entry, dict) else None for name in ("train", "val")]
    lists = [side for side in sides if isinstance(side, list) and all(isinstance(one, str) for one in side)]
    if len(lists) != len(sides):
        raise _wrong_splits(path, f"entry {number} has not the lists 'train' and 'val' of case ids")
    train, validation = lists
    return Fold(tuple(train), tuple(validation))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}). Check the path and its permissions.", code="missing"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file. Expected UTF-8. Save it again.", code="bad_splits") from None


def _wrong_table(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}. Expected a table 'case,patient' with one row per case. Correct it.", code="bad_patients"
    )


def _wrong_splits(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}. Expected nnU-Net's splits_final.json: "
        '[{"train": ["case", ...], "val": ["case", ...]}, ...]. Correct it.',
        code="bad_splits",
    )
