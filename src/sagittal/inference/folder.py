"""Predict every case of a folder: each output appears whole or not at all, and a bad case does not stop the others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from sagittal.data.dataset import Case, read_cases
from sagittal.errors import DataError, SagittalError
from sagittal.inference.memory import budget_bytes
from sagittal.inference.predictor import Predictor
from sagittal.plan import DatasetSpec, Frozen
from sagittal.plan.base import write_atomically
from sagittal.volumes import Volume

DECLARATION = "dataset.json"
REPORT = "prediction.json"
_MM3_PER_ML = 1000.0


class CasePrediction(Frozen):
    """What became of one case."""

    case: str
    status: Literal["done", "failed"]
    seconds: float
    """From the first byte read to the last one written."""
    output: str | None = None
    """Name of the label map in the folder, None where the case failed."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    """Volume of each class or region."""
    message: str | None = None
    """Why the case failed."""
    code: str | None = None
    """The same for machines."""

    def __str__(self) -> str:
        """Return one line for a person."""
        if self.status == "failed":
            return f"{self.case}: failed, {self.message}"
        volumes = ", ".join(f"{name} {volume:.4g} mL" for name, volume in self.volumes_ml.items())
        return f"{self.case}: done in {self.seconds:.1f} s, {volumes}"


class FolderResult(Frozen):
    """The run report, `prediction.json`."""

    schema_version: Literal[1] = 1
    network: str
    device: str
    mirror: bool
    cases: tuple[CasePrediction, ...]

    @property
    def failures(self) -> tuple[CasePrediction, ...]:
        """The cases that failed."""
        return tuple(case for case in self.cases if case.status == "failed")


def predict_folder(
    predictor: Predictor,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    mirror: bool = True,
    memory_gib: float | None = None,
    on_case: Callable[[CasePrediction], None] | None = None,
) -> FolderResult:
    """Write a label map for every case to OUT/CASE.nii.gz, and beside them `dataset.json` and `prediction.json`.

    Args:
        predictor: the model.
        inputs: a file, the channel files of a case, or a folder of them; see `data.dataset.read_cases`.
        out: folder for the outputs; it is made.
        mirror, memory_gib: see `Predictor.predict`.
        on_case: called after each case.

    Returns:
        What became of each case, failed ones included; the same is in `prediction.json`, kept up to date case by case.

    Raises:
        DataError: the inputs make no case, or an output would overwrite something that is no prediction.
        PlanError: `memory_gib` is not a positive number.
        ResourceError: the folder can't be written or the disk is full; what was finished stays.
    """
    folder, spec = Path(out), predictor.plan.dataset
    if memory_gib is not None:
        budget_bytes(memory_gib)
    cases = read_cases(inputs, spec.channel_names)
    _protect(cases, folder, spec.file_ending)
    write_atomically(folder / DECLARATION, _declaration(spec))
    done: list[CasePrediction] = []
    for case in cases:
        done.append(_predict_case(predictor, case, folder, mirror, memory_gib))
        result = FolderResult(
            network=predictor.plan.network_name, device=str(predictor.device), mirror=mirror, cases=tuple(done)
        )
        result.write(folder / REPORT)
        if on_case is not None:
            on_case(done[-1])
    return result


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
    return {
        label.name: float(sum(counts[originals.get(value, value)] for value in label.values) * voxel_ml)
        for label in spec.labels
    }


def _predict_case(
    predictor: Predictor, case: Case, folder: Path, mirror: bool, memory_gib: float | None
) -> CasePrediction:
    began = time.monotonic()
    try:
        labels = predictor.predict(case.images, mirror=mirror, memory_gib=memory_gib)
    except SagittalError as error:
        seconds = round(time.monotonic() - began, 3)
        return CasePrediction(case=case.id, status="failed", seconds=seconds, message=error.message, code=error.code)
    name = f"{case.id}{predictor.plan.dataset.file_ending}"
    # Outside of the `try`: a disk that is full fails every further case too, and ends the run.
    labels.write(folder / name)
    return CasePrediction(
        case=case.id,
        status="done",
        seconds=round(time.monotonic() - began, 3),
        output=name,
        volumes_ml=volumes_ml(labels, predictor.plan.dataset),
    )


def _protect(cases: Sequence[Case], folder: Path, file_ending: str) -> None:
    """Refuse to write over a scan or over a data set's own declaration."""
    scans = {path.resolve() for case in cases for path in case.images}
    for case in cases:
        target = folder / f"{case.id}{file_ending}"
        if target.resolve() in scans:
            raise DataError(f"{target}: the output would overwrite a scan. Choose another folder.", code="overwrites")
    if (folder / DECLARATION).exists() and not (folder / REPORT).exists():
        raise DataError(
            f"{folder}: holds a {DECLARATION} that no prediction wrote, so it looks like a data set. "
            "Choose another folder.",
            code="overwrites",
        )


def _declaration(spec: DatasetSpec) -> bytes:
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
    if spec.regions_class_order is not None:
        content["regions_class_order"] = list(spec.regions_class_order)
    return (json.dumps(content, indent=2) + "\n").encode()
