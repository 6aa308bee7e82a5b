"""The files of one case, read, put right and written, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.data.dataset import Case
from sagittal.data.doctor.case import relabelled
from sagittal.errors import DataError
from sagittal.volumes import Volume, read_header, read_labels
from sagittal.volumes.geometry import Geometry, axis_codes, differences
from sagittal.volumes.header import NiftiHeader
from sagittal.volumes.io import read_stored
from sagittal.volumes.stored import Stored, smallest_label_type

ENDING = ".nii.gz"
ROUNDING = 1e-3
"""A label value this close to a whole number is that number, written by a tool that scales in float32."""
_UNIT_MM = 2


@dataclass(frozen=True)
class Change:
    """What was changed in one file of the copy; `file` is relative to it."""

    case: str
    file: str
    what: str


@dataclass(frozen=True)
class Values:
    """What becomes of label values.

    Attributes:
        replaced: values as the label files have them, and the value that stands for each in the copy.
        declared: the values that the copy declares.
    """

    replaced: Mapping[int, int]
    declared: frozenset[int]

    @property
    def allowed(self) -> frozenset[int]:
        """What a label file may hold before its repair."""
        return (self.declared - frozenset(self.replaced.values())) | frozenset(self.replaced)


def present_values(case: Case) -> frozenset[int]:
    """Return the values of a case's label map; none where it can't be read."""
    if case.labels is None:
        return frozenset()
    try:
        labels, _ = read_labels(case.labels)
    except DataError:
        return frozenset()
    return frozenset(np.unique(labels).tolist())


def repair_case(case: Case, out: Path, values: Values) -> list[Change]:
    """Write the files of a case into the data set `out` and return what was changed in them."""
    placing = _placing([*case.images, *([] if case.labels is None else [case.labels])])
    first: Geometry | None = None
    changes = []
    for file, path, is_label in _files(case):
        try:
            stored = read_stored(path) if path.exists() else None
        except DataError as error:
            changes.append(Change(case.id, file, f"left out: {error.message}"))
            continue
        if stored is None:
            continue
        voxels, told = _whole_labels(stored, values) if is_label else _intensities(stored)
        volume, how = _placed(Volume.on(stored.geometry, voxels), placing.donors.get(path), turn=placing.turn)
        told += how
        if first is not None and not differences(first, volume.geometry):
            apart_mm = float(np.abs(first.affine - volume.affine).max())
            told += [f"header made equal to the first channel's, {apart_mm:.2g} mm away at most"] if apart_mm else []
            volume = Volume.on(first, volume.array)
        first = first or volume.geometry
        if not path.name.endswith(ENDING):
            told.append(f"{path.name} converted to {ENDING}")
        volume.write(out / file)
        if told:
            changes.append(Change(case.id, file, "; ".join(told)))
    return changes


def _files(case: Case) -> Iterator[tuple[str, Path, bool]]:
    for channel, path in enumerate(case.images):
        yield f"imagesTr/{case.id}_{channel:04d}{ENDING}", path, False
    if case.labels is not None:
        yield f"labelsTr/{case.id}{ENDING}", case.labels, True


@dataclass(frozen=True)
class _Placing:
    """Whether the case's files can be brought into RAS order together, and whose grid a file without one takes."""

    turn: bool
    donors: Mapping[Path, Geometry]


def _placing(paths: list[Path]) -> _Placing:
    grids: dict[Path, Geometry] = {}
    for path in paths:
        try:
            grids[path] = read_header(path).geometry
        except DataError:
            continue  # It is told when the file is read.
    placed = [grid for grid in grids.values() if grid.has_world]
    donors: dict[Path, Geometry] = {}
    unplaced = [path for path, grid in grids.items() if not grid.has_world]
    for path in unplaced:
        donor = next((grid for grid in placed if not differences(grid, grids[path])), None)
        if donor is not None:
            donors[path] = donor
    # Turning some files of a case and not the others would part what belongs together.
    return _Placing(turn=len(donors) == len(unplaced), donors=donors)


def _intensities(stored: Stored) -> tuple[NDArray[Any], list[str]]:
    if stored.is_scaled:
        return stored.image(), ["slope and intercept applied, stored as float32"]
    return stored.voxels, []


def _whole_labels(stored: Stored, values: Values) -> tuple[NDArray[Any], list[str]]:
    """Return the label map as it will be written, and what was changed in it."""
    told = []
    try:
        labels: NDArray[Any] = stored.labels()
    except DataError:
        given = stored.image() if stored.is_scaled else stored.voxels
        whole = np.rint(given)
        with np.errstate(invalid="ignore"):
            apart = float(np.abs(given - whole).max())  # NaN where a value is not finite
        if not apart <= ROUNDING:
            return given, []
        labels = whole.astype(smallest_label_type(float(whole.min()), float(whole.max())))
        told.append(f"values rounded to whole numbers, at most {apart:.2g} away")
    if stored.voxels.dtype.kind == "f" or stored.is_scaled:
        told.append(f"{stored.voxels.dtype} to {labels.dtype}")
    if not frozenset(np.unique(labels).tolist()) <= values.allowed:
        # Values without a name are an error that stays; replacing the others could make two values one.
        return labels, told
    present = [old for old in values.replaced if (labels == old).any()]
    if present:
        told.append("values " + ", ".join(f"{old} to {values.replaced[old]}" for old in present))
    return relabelled(labels, values.replaced), told


def _placed(volume: Volume, donor: Geometry | None, *, turn: bool) -> tuple[Volume, list[str]]:
    """Return the volume in RAS order where that is known, and what was changed."""
    told = []
    if donor is not None:
        volume = Volume.on(donor, volume.array)
        told.append("orientation taken from the case's other files, whose grid is the same")
    if turn and volume.geometry.has_world:
        turned = volume.reoriented()
        if turned is not volume:
            told.append(f"axes (D, H, W) {axis_codes(volume.affine)} to {axis_codes(turned.affine)}")
        return turned, told
    if not volume.geometry.has_world and not isinstance(volume.header, NiftiHeader):
        return Volume.on(_without_world(volume.geometry), volume.array), told
    return volume, told


def _without_world(grid: Geometry) -> Geometry:
    """Return the grid as a NIfTI file states it that says nothing of its place: voxel sizes alone, both codes 0.

    Its affine is then the standard's guess: x runs to the left, the origin is in the middle (nifti1.h, method 1).
    """
    d, h, w = (float(np.float32(length)) for length in grid.spacing_mm)
    affine = np.zeros((4, 4))
    for axis, (length, size) in enumerate(zip((d, h, -w), grid.shape, strict=True)):
        affine[2 - axis, axis] = length
        affine[2 - axis, 3] = -(size - 1) / 2 * length
    affine[3, 3] = 1.0
    header = NiftiHeader(
        version=1,
        qform_code=0,
        sform_code=0,
        xyzt_units=_UNIT_MM,
        pixdim=(1.0, w, h, d, 0.0, 0.0, 0.0, 0.0),
        quaternion=(0.0, 0.0, 0.0),
        qform_offset=(0.0, 0.0, 0.0),
        sform_rows=(0.0,) * 12,
    )
    return Geometry(grid.shape, affine, header)
