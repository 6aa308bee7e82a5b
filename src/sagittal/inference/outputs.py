"""What is written for a case, and where: everything whole or not at all.

OUT/CASE.nii.gz             the label map, written last: where it is, the rest is too
OUT/CASE.npz                probabilities
OUT/entropy/CASE.nii.gz     entropy of each voxel; apart, so that it is not taken for a label map
OUT/previews/CASE.png       three planes
OUT/CASE.seg.dcm            DICOM objects of a DICOM series, see `dicom_outputs`
OUT/dataset.json            what the label maps mean
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sagittal.data.dataset import Case
from sagittal.errors import DataError, ResourceError
from sagittal.inference.dicom_outputs import KINDS, dicom_paths
from sagittal.inference.probabilities import SUFFIX
from sagittal.inference.run_report import JOURNAL, REPORT, Choices, FileStamp, InputStamp
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes import Volume
from sagittal.volumes.dicom_files import split_series
from sagittal.volumes.io import scan_files

DECLARATION = "dataset.json"
ENTROPY_FOLDER = "entropy"
PREVIEW_FOLDER = "previews"
_MM3_PER_ML = 1000.0
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class OutputPaths:
    """The files of one case in the output folder."""

    labels: Path
    probabilities: Path
    entropy: Path
    preview: Path
    dicom: Mapping[str, Path]
    """By kind, see `dicom_outputs.KINDS`."""

    def wanted(self, choices: Choices) -> tuple[Path, ...]:
        """Return those that were asked for, the label map first."""
        extras = {
            self.probabilities: choices.probabilities,
            self.entropy: choices.entropy,
            self.preview: choices.preview,
        }
        objects = [self.dicom[kind] for kind in choices.dicom]
        return (self.labels, *(path for path, asked in extras.items() if asked), *objects)


def paths_of(folder: Path, case: str, file_ending: str) -> OutputPaths:
    """Return where the outputs of a case are written."""
    return OutputPaths(
        labels=folder / f"{case}{file_ending}",
        probabilities=folder / f"{case}{SUFFIX}",
        entropy=folder / ENTROPY_FOLDER / f"{case}{file_ending}",
        preview=folder / PREVIEW_FOLDER / f"{case}.png",
        dicom=dicom_paths(folder, case),
    )


def volumes_ml(labels: Volume, spec: DatasetSpec) -> dict[str, float]:
    """Return the volume of each class or region of a predicted label map, in mL."""
    voxel_ml = abs(float(np.linalg.det(labels.affine[:3, :3]))) / _MM3_PER_ML
    originals = dict(spec.label_map)
    values = sorted({originals.get(value, value) for value in spec.foreground_values})
    counts = dict.fromkeys(values, 0)
    for plane in labels.array[0]:
        # Plane by plane: counting makes copies of eight bytes per voxel.
        if plane.dtype.kind == "u":
            found = np.bincount(plane.reshape(-1))
            present = {value: int(found[value]) for value in values if value < len(found)}
        else:
            present = {value: int((plane == value).sum()) for value in values}
        for value, count in present.items():
            counts[value] += count
    sizes = {label.name: sum(counts[originals.get(value, value)] for value in label.values) for label in spec.labels}
    # To a thousandth of a cubic millimetre: affines hold spacings as float32, whose last digits say nothing.
    return {name: round(float(size * voxel_ml), 6) for name, size in sizes.items()}


def declaration(spec: DatasetSpec) -> bytes:
    """Return a dataset.json with what is needed to score the label maps: nnU-Net v2's keys."""
    labels: dict[str, int | list[int]] = {"background": 0}
    for label in spec.labels:
        labels[label.name] = list(label.values) if len(label.values) > 1 else label.values[0]
    if spec.ignore_value is not None:
        labels["ignore"] = spec.ignore_value
    content: dict[str, object] = {
        "name": spec.name,
        "channel_names": {str(number): name for number, name in enumerate(spec.channel_names)},
        "labels": labels,
        "file_ending": spec.file_ending,
    }
    if spec.label_map:
        content["label_map"] = {str(value): original for value, original in spec.label_map}
    if spec.codes:
        content["codes"] = dict(spec.codes)
    if spec.regions_class_order is not None:
        content["regions_class_order"] = list(spec.regions_class_order)
    return (json.dumps(content, indent=2) + "\n").encode()


def protect(cases: Iterable[Case], folder: Path, file_ending: str) -> None:
    """Refuse to write over a scan or over a data set's own declaration.

    Raises:
        DataError: an output would overwrite something that is no prediction.
    """
    cases = list(cases)
    scans = {path.resolve() for case in cases for path in case.images}
    for case in cases:
        for target in paths_of(folder, case.id, file_ending).wanted(Choices(entropy=True, dicom=tuple(KINDS))):
            if target.resolve() in scans:
                raise DataError(
                    f"{target}: the output would overwrite a scan. Choose another folder.", code="overwrites"
                )
    if (folder / DECLARATION).exists() and not any((folder / name).exists() for name in (REPORT, JOURNAL)):
        raise DataError(
            f"{folder}: holds a {DECLARATION} that no prediction wrote, so it looks like a data set. "
            "Choose another folder.",
            code="overwrites",
        )


def tidy(cases: Iterable[Case], folder: Path, file_ending: str) -> None:
    """Take away what a killed run left half-written of these cases."""
    names: dict[Path, set[str]] = {}
    for case in cases:
        for path in paths_of(folder, case.id, file_ending).wanted(
            Choices(probabilities=True, entropy=True, preview=True, dicom=tuple(KINDS))
        ):
            names.setdefault(path.parent, set()).add(path.name)
    for place, expected in names.items():
        for part in place.glob(".*.part") if place.is_dir() else ():
            if part.name[1:].removesuffix(".part").rpartition(".")[0] in expected:
                part.unlink(missing_ok=True)


def stamp_output(folder: Path, path: Path) -> FileStamp:
    """Return size and hash of a file that was just written."""
    try:
        size = path.stat().st_size
        digest = _sha256([path])
    except OSError as error:
        raise ResourceError(
            f"{path}: was just written and can't be read ({error.strerror}). Check the disk.", code="disk"
        ) from None
    return FileStamp(path=path.relative_to(folder).as_posix(), size_bytes=size, sha256=digest)


def is_as_written(folder: Path, stamp: FileStamp) -> bool:
    """Whether a file still has the size and contents that it was written with."""
    path = folder / stamp.path
    try:
        return path.stat().st_size == stamp.size_bytes and stamp.sha256 in (None, _sha256([path]))
    except OSError:
        return False


def stamp_input(case: Case) -> InputStamp:
    """Return the hash of a case's files.

    Raises:
        DataError: one of them can't be read.
    """
    try:
        return InputStamp(sha256=_contents(case), state=input_state(case))
    except OSError as error:
        raise DataError(f"{case.id}: {error.filename} can't be read ({error.strerror}).", code="unreadable") from None


def is_same_input(case: Case, stamp: InputStamp) -> bool:
    """Whether a case's files are those that were read; their contents are read only where their dates differ."""
    try:
        return input_state(case) == stamp.state or _contents(case) == stamp.sha256
    except (OSError, DataError):
        return False


def input_state(case: Case) -> str:
    """Return a hash over the names, sizes and times of change of a case's files."""
    entries: list[object] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(case)]
    entries.extend(_series(case))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _contents(case: Case) -> str:
    digest, series = _sha256(_files(case)), _series(case)
    return hashlib.sha256(json.dumps([digest, *series]).encode()).hexdigest() if series else digest


def _series(case: Case) -> list[str]:
    """Return the series that are named of DICOM studies: another one of the same files is another input."""
    return [series for series in (split_series(image)[1] for image in case.images) if series is not None]


def _files(case: Case) -> list[Path]:
    return [file for image in case.images for file in scan_files(image)]


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
