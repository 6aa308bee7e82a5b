"""Which file formats are read and written, by suffix.

A new format is a module with a reader (and a writer, if the format is worth writing) and one entry in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sagittal.errors import DataError, did_you_mean
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.nifti import read_nifti, write_nifti
from sagittal.volumes.stored import Stored


class Format(NamedTuple):
    """How to read a file into `Stored`, and how to write (D, H, W) voxels on a grid; None where that is not offered."""

    read: Callable[[Path], Stored]
    write: Callable[[Path, NDArray[Any], Geometry], None] | None


FORMATS: dict[str, Format] = {
    ".nii": Format(read_nifti, write_nifti),
    ".nii.gz": Format(read_nifti, write_nifti),
}


def known_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the suffix among `FORMATS` that the file's name ends with, in any case, or None."""
    name = Path(path).name.lower()
    fitting = [suffix for suffix in FORMATS if name.endswith(suffix)]
    return max(fitting, key=len, default=None)


def read_stored(path: str | os.PathLike[str]) -> Stored:
    """Read a file's voxels and grid as they are stored.

    Raises:
        DataError: the file is missing, of an unknown format, damaged, or not a 3D volume of real numbers.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: a folder. Expected an image file ({_known()}).", code="unreadable")
    if not path.exists():
        raise DataError(f"{path}: no such file. Expected an image. Check the path.", code="unreadable")
    form = FORMATS[_suffix(path, "read")]
    try:
        return form.read(path)
    except OSError as error:
        cause = error.strerror or str(error)
        raise DataError(
            f"{path}: can't be read ({cause}). Check the file and its permissions.", code="unreadable"
        ) from None
    except MemoryError:
        raise DataError(f"{path}: its voxels do not fit into memory. Crop the scan or use a larger machine.") from None


def write_voxels(path: str | os.PathLike[str], voxels: NDArray[Any], geometry: Geometry) -> Path:
    """Write (D, H, W) voxels in the format that the suffix names and return the path; never leaves half a file.

    Raises:
        DataError: the format is unknown, not written by Sagittal, or can't hold the voxels' type.
        ResourceError: the disk is full or the folder can't be written.
    """
    path = Path(path)
    writer = FORMATS[_suffix(path, "written")].write
    if writer is None:
        raise DataError(f"{path}: this format is read only. Expected {_known(writable=True)}. Choose another suffix.")
    if voxels.shape != geometry.shape:
        raise DataError(f"{path}: voxels {voxels.shape} do not fit their grid {geometry.shape} (D, H, W).")
    writer(path, voxels, geometry)
    return path


def _suffix(path: Path, purpose: str) -> str:
    suffix = known_suffix(path)
    if suffix is None:
        given = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        raise DataError(
            f"{path}: files ending in '{given}' can't be {purpose}. Expected an image format that Sagittal knows."
            f"{did_you_mean(given, FORMATS)}",
            code="unknown_format",
        )
    return suffix


def _known(*, writable: bool = False) -> str:
    return ", ".join(suffix for suffix, form in FORMATS.items() if form.write is not None or not writable)
