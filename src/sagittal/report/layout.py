"""Which files belong together: predictions to references, scans to both, and the dataset.json that names the labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagittal.errors import DataError
from sagittal.volumes.io import FORMATS, known_suffix

DECLARATION = "dataset.json"
LABELS_FOLDER = "labelsTr"
IMAGES_FOLDERS = {"labelsTr": "imagesTr", "labelsTs": "imagesTs"}
MAX_NAMED = 12


@dataclass(frozen=True)
class CaseFiles:
    """The two label maps of one case."""

    case: str
    reference: Path
    prediction: Path


@dataclass(frozen=True)
class Matched:
    """Cases that have both files, and what was left over."""

    cases: tuple[CaseFiles, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Declaration:
    """What a dataset.json says that an evaluation needs."""

    path: Path
    labels: Mapping[str, Any]
    first_channel: str | None
    label_map: Mapping[str, Any]


def match_cases(predictions: Path, references: Path, wanted: Collection[str] | None = None) -> Matched:
    """Match predictions to references by file name without its ending; two single files are one case, however named.

    Raises:
        DataError: a path is missing, there are no references, a name occurs twice, or references (those in `wanted`,
            where given) lack a prediction; each is named.
    """
    given = label_files(references_folder(references))
    found = label_files(predictions)
    if references.is_file() and predictions.is_file() and wanted is None:
        ((case, reference),) = given.items()
        return Matched((CaseFiles(case, reference, predictions),), ())
    if not given:
        raise DataError(
            f"{references}: no label maps. Expected a folder of files like CASE.nii.gz ({', '.join(FORMATS)}).",
            code="no_references",
        )
    if wanted is not None:
        absent = sorted(set(wanted) - set(given))
        if absent:
            raise DataError(
                f"{references}: no reference for {named(absent)}. Check the names of the cases.", code="no_references"
            )
        given = {case: path for case, path in given.items() if case in wanted}
    missing = sorted(set(given) - set(found))
    if missing:
        raise DataError(
            f"{predictions}: {len(missing)} of {len(given)} references have no prediction: {named(missing)}. "
            "Every reference needs one, or the mean would leave out what is missing. Predict them, or name the cases "
            "to score (--cases).",
            code="missing_prediction",
        )
    extra = sorted(set(found) - set(given)) if wanted is None else []
    warnings = [f"Predictions without a reference, not scored ({len(extra)}): {named(extra)}."] if extra else []
    return Matched(tuple(CaseFiles(case, given[case], found[case]) for case in sorted(given)), tuple(warnings))


def references_folder(references: Path) -> Path:
    """Return the folder of label maps; a data set's own folder stands for its labelsTr."""
    inner = references / LABELS_FOLDER
    return inner if inner.is_dir() else references


def find_declaration(references: Path, predictions: Path) -> Declaration | None:
    """Return the dataset.json in the references' folder, above it, or in the predictions' folder, or None.

    Raises:
        DataError: it is there and can't be read, or has no labels.
    """
    inner = references_folder(references)
    inner = inner.parent if inner.is_file() else inner
    outer = predictions.parent if predictions.is_file() else predictions
    for folder in (inner, inner.resolve().parent, outer):
        path = folder / DECLARATION
        if path.is_file():
            return read_declaration(path)
    return None


def find_image(case: str, references: Path, images: Path | None) -> Path | None:
    """Return the first channel of a case's scan: in `images`, or in imagesTr beside labelsTr; None where there is none.

    Raises:
        DataError: `images` was given and is not a folder.
    """
    inner = references_folder(references)
    inner = inner.parent if inner.is_file() else inner
    if images is None and inner.name in IMAGES_FOLDERS:
        images = inner.resolve().parent / IMAGES_FOLDERS[inner.name]
    elif images is not None and not images.is_dir():
        raise DataError(f"{images}: not a folder. Expected the folder of the scans, with files like CASE_0000.nii.gz.")
    if images is None:
        return None
    candidates = [images / f"{case}{channel}{suffix}" for channel in ("_0000", "") for suffix in FORMATS]
    return next((path for path in candidates if path.is_file()), None)


def read_declaration(path: Path) -> Declaration:
    """Read a dataset.json.

    Raises:
        DataError: it can't be read, or has no labels.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}). Check its permissions.") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Expected a data set's declaration.") from None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise DataError(f'{path}: no "labels". Expected an object of names and values, as in nnU-Net v2.')
    channels = content.get("channel_names")
    first = channels.get("0") if isinstance(channels, dict) else None
    replaced = content.get("label_map", {})
    if not isinstance(replaced, dict):
        raise DataError(f'{path}: "label_map" is no object. Expected values and their original values.')
    return Declaration(path, labels, first if isinstance(first, str) else None, replaced)


def label_files(path: Path) -> dict[str, Path]:
    """Return the label maps in a folder by case, which is the name without its ending; or the one file that it is.

    Raises:
        DataError: there is no such path, or two files are one case.
    """
    if path.is_file():
        return {_case_of(path): path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder. Expected label maps.", code="unreadable")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or not file.is_file() or known_suffix(file) is None:
            continue
        case = _case_of(file)
        if case in found:
            raise DataError(f"{path}: {found[case].name} and {file.name} are both case '{case}'. Remove one of them.")
        found[case] = file
    return found


def _case_of(path: Path) -> str:
    suffix = known_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def named(names: Sequence[str]) -> str:
    """Return the names with commas between, or the first of many and how many more there are."""
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
