"""What a reader hands back: a file's header, or its voxels as they are stored and the two ways to take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, Shaped
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import Triple
from sagittal.volumes.geometry import Affine, Geometry
from sagittal.volumes.header import GridHeader

LABEL_TYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
MAX_EXACT = 2.0**53
"""Above it, floats skip whole numbers."""


@dataclass(frozen=True, eq=False)
class FileHeader:
    """What a scan's header tells without its voxels.

    Attributes:
        path: the file or folder.
        geometry: the grid.
        dtype: the type of the stored numbers, in the machine's byte order.
        slope: what a stored value is multiplied with.
        intercept: what is then added.
    """

    path: Path
    geometry: Geometry
    dtype: np.dtype[Any]
    slope: float = 1.0
    intercept: float = 0.0

    def with_voxels(self, voxels: NDArray[Any]) -> Stored:
        """Return the header together with its (D, H, W) voxels."""
        grid = self.geometry
        assert voxels.shape == grid.shape, f"{voxels.shape} voxels under a header of {grid.shape}"
        return Stored(self.path, voxels, grid.affine, self.slope, self.intercept, grid.header)


@dataclass(frozen=True, eq=False)
class Stored:
    """One file's voxels before any change of type.

    Attributes:
        path: where they came from, for messages.
        voxels: (D, H, W), integer or floating, in the machine's byte order.
        affine: float64 (4, 4), (d, h, w, 1) -> (x, y, z, 1) in mm, RAS+.
        slope: what a stored value is multiplied with.
        intercept: what is then added.
        header: NIfTI's own numbers, where the file is NIfTI, or that the file says nothing of the grid's place.
    """

    path: Path
    voxels: NDArray[Any]
    affine: Affine
    slope: float = 1.0
    intercept: float = 0.0
    header: GridHeader | None = None

    @property
    def geometry(self) -> Geometry:
        """The grid of the voxels."""
        depth, height, width = self.voxels.shape
        shape: Triple = (depth, height, width)
        return Geometry(shape, self.affine, self.header)

    @property
    def is_scaled(self) -> bool:
        """Whether the stored numbers are not yet the values."""
        return self.slope != 1.0 or self.intercept != 0.0

    def image(self) -> Float32[np.ndarray, "D H W"]:
        """Return the values as float32, rounded once: slope and intercept are applied in float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            if not self.is_scaled:
                return self.voxels.astype(np.float32, copy=False)
            values = np.empty(self.voxels.shape, dtype=np.float32)
            # Slice by slice, so that no float64 copy of the whole volume exists.
            for source, target in zip(self.voxels, values, strict=True):
                target[...] = source * np.float64(self.slope) + np.float64(self.intercept)
        return values

    def numbers(self) -> Shaped[np.ndarray, "D H W"]:
        """Return the values as stored where float32 holds them exactly in more bytes, else as float32."""
        small = self.voxels.dtype.kind in "iu" and self.voxels.dtype.itemsize <= 2
        return self.voxels if small and not self.is_scaled else self.image()

    def labels(self) -> Integer[np.ndarray, "D H W"]:
        """Return the values as integers.

        Integer types stay as stored. Whole numbers stored as floats become the smallest of uint8, uint16, int16, int32
        and int64 that holds them.

        Raises:
            DataError: a value is not a whole number; the message counts and lists them.
        """
        values = self.voxels
        if self.is_scaled:
            with np.errstate(over="ignore", invalid="ignore"):
                values = values * np.float64(self.slope) + np.float64(self.intercept)
        if values.dtype.kind in "iu":
            return values
        # NaN is unequal to its own rounding; infinity is equal and needs the second test.
        wrong = (values != np.rint(values)) | (np.abs(values) > MAX_EXACT)
        if wrong.any():
            examples = ", ".join(f"{value:.4g}" for value in np.unique(values[wrong])[:5])
            raise DataError(
                f"{self.path}: {int(wrong.sum())} voxels are not whole numbers (for example {examples}). Expected a "
                "label map of integers. Is it a probability map, or was it resampled with interpolation? "
                "Make it again with nearest-neighbour interpolation.",
                code="non_integer_label",
            )
        return values.astype(smallest_label_type(float(values.min()), float(values.max())))


def smallest_label_type(lowest: float | int, highest: float | int) -> type[np.integer[Any]]:
    """Return the smallest label type that holds both values."""
    for kind in LABEL_TYPES:
        if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max:
            return kind
    raise AssertionError(f"no integer type holds {lowest} to {highest}")
