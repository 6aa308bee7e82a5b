"""`Volume`: an image and its place in the world as one value; reading and writing it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import TripleMm
from sagittal.volumes.geometry import (
    Geometry,
    axis_codes,
    describe,
    differences,
    is_usable,
    reorientation_to_ras,
    spacing_of,
)
from sagittal.volumes.header import GridHeader
from sagittal.volumes.io import read_stored, write_voxels


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D image of one or more channels on one grid.

    Attributes:
        array: (C, D, H, W), slow to fast; D, H, W are index axes in stored order, not anatomy.
        affine: float64 (4, 4), maps (d, h, w, 1) to (x, y, z, 1) in mm, RAS+. It can't be written to.
        header: how a NIfTI file stored the grid, where the volume came from one: `write` uses it to give the grid back
            bit for bit; or that the file said nothing of the grid's place.

    Raises:
        DataError: `array` has not four axes, or `affine` is not finite and invertible.
    """

    array: NDArray[Any]
    affine: NDArray[Any]
    header: GridHeader | None = None

    def __post_init__(self) -> None:
        """Check the shapes and protect the affine."""
        if self.array.ndim != 4 or 0 in self.array.shape:
            raise DataError(
                f"array of shape {self.array.shape}. Expected (C, D, H, W), each at least 1. Add the missing axis."
            )
        affine = np.array(self.affine, dtype=np.float64)
        if not is_usable(affine):
            raise DataError(
                f"affine {affine.tolist()}. Expected a finite, invertible (4, 4) matrix with last row 0 0 0 1."
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    def __repr__(self) -> str:
        """Return shape, type, spacing and axes: an array's numbers tell nothing."""
        spacing = ", ".join(f"{value:.4g}" for value in self.spacing_mm)
        return f"Volume({self.array.shape} {self.array.dtype}, spacing_mm ({spacing}), axes {axis_codes(self.affine)})"

    @classmethod
    def on(cls, geometry: Geometry, array: Shaped[np.ndarray, "*C D H W"]) -> Volume:
        """Return `array`, (D, H, W) or (C, D, H, W) of any type, on a grid.

        Raises:
            DataError: the array's D, H, W are not the grid's.
        """
        if array.ndim not in (3, 4) or array.shape[-3:] != geometry.shape:
            raise DataError(
                f"array of shape {array.shape}. Expected (D, H, W) or (C, D, H, W) on the grid {geometry.shape}. "
                "Bring it back to that grid first."
            )
        return cls(array if array.ndim == 4 else array[None], geometry.affine, geometry.header)

    @property
    def geometry(self) -> Geometry:
        """The grid without the voxels."""
        _, depth, height, width = self.array.shape
        return Geometry((depth, height, width), self.affine, self.header)

    @property
    def spacing_mm(self) -> TripleMm:
        """Voxel size along D, H, W."""
        return spacing_of(self.affine)

    def with_array(self, array: Shaped[np.ndarray, "*C D H W"]) -> Volume:
        """Return other voxels, for example a prediction, on this grid; their type is kept."""
        return Volume.on(self.geometry, array)

    def reoriented(self) -> Volume:
        """Return the same scan in RAS order: D to the head, H to the front, W to the right.

        No voxel is changed. An oblique grid goes to the closest such order and keeps its obliqueness in the affine.
        """
        change = reorientation_to_ras(self.affine)
        if change.is_identity:
            return self
        array = np.ascontiguousarray(change.apply(self.array))
        return Volume(array, change.affine(self.affine, self.geometry.shape), self.header)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the one channel in the format that the suffix names; return the path.

        The voxel type is kept and no scaling is applied. The file appears whole or not at all.

        Raises:
            DataError: more than one channel, an unknown format, or a voxel type that the format lacks.
            ResourceError: the disk is full or the folder can't be written.
        """
        if self.array.shape[0] != 1:
            raise DataError(
                f"{path}: {self.array.shape[0]} channels. Expected one per file. Write each with `with_array`."
            )
        return write_voxels(path, self.array[0], self.geometry)


def read_volume(
    path: str | os.PathLike[str], *, resample_slices: bool = False, series_uid: str | None = None
) -> Volume:
    """Read an image as float32 (1, D, H, W) in stored order; slope and intercept are applied.

    Args:
        path: a file, or the folder or zip archive of a DICOM series.
        resample_slices: bring DICOM slices with a gap, mixed spacings or a gantry tilt onto a regular grid by linear
            interpolation, where these are refused otherwise.
        series_uid: which DICOM series to take where there are several.

    Raises:
        DataError: the scan is missing, of an unknown format, damaged, or not a 3D volume of real numbers.
    """
    stored = read_stored(path, resample_slices=resample_slices, series_uid=series_uid)
    return Volume.on(stored.geometry, stored.image())


def read_channels(paths: Sequence[str | os.PathLike[str]]) -> Volume:
    """Read the channels of one case from one file each, as float32 (C, D, H, W) on the first file's grid.

    Raises:
        DataError: a file can't be read, or lies on another grid than the first.
    """
    volumes = read_scans(paths)
    first = volumes[0]
    array = np.empty((len(volumes), *first.geometry.shape), dtype=np.float32)
    for channel, volume in zip(array, volumes, strict=True):
        channel[...] = volume.array[0]
    return Volume(array, first.affine, first.header)


def read_scans(paths: Sequence[str | os.PathLike[str]]) -> tuple[Volume, ...]:
    """Read the channels of one case from one file each, as volumes (1, D, H, W) on the first file's grid.

    Integers of up to 16 bits, which float32 holds exactly, stay as they are stored: half the memory. All other values
    are float32.

    Raises:
        DataError: a file can't be read, or lies on another grid than the first.
    """
    if not paths:
        raise DataError("no image files. Expected one per channel.")
    volumes: list[Volume] = []
    for path in paths:
        stored = read_stored(path)
        if volumes:
            require_same_grid(volumes[0].geometry, stored.geometry, f"{Path(paths[0]).name} and {Path(path).name}")
        volumes.append(Volume.on(stored.geometry, stored.numbers()))
    return tuple(volumes)


def read_labels(path: str | os.PathLike[str]) -> tuple[Integer[np.ndarray, "D H W"], Geometry]:
    """Read a label map in stored order and its grid.

    Integer types are kept; whole numbers stored as floats become integers.

    Raises:
        DataError: the file can't be read, or a value is not a whole number.
    """
    stored = read_stored(path)
    return stored.labels(), stored.geometry


def require_same_grid(first: Geometry, second: Geometry, what: str) -> None:
    """Raise DataError that says by how much the grids of `what` ('image and label of case_012') differ, if they do."""
    found = differences(first, second)
    if found:
        raise DataError(
            f"{what}: grids differ ({describe(found)}). Expected the same voxels in the same place. "
            "Resample one onto the other.",
            code="other_grid",
        )
