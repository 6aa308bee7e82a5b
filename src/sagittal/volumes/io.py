"""Which file formats are read and written, by suffix; DICOM by folder, zip archive or content.

A new format is a module with a reader (and a writer, if the format is worth writing) and one entry in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sagittal.errors import DataError, did_you_mean
from sagittal.volumes.dicom import dicom_files, read_dicom, read_dicom_header
from sagittal.volumes.dicom_files import (
    ARCHIVE_SUFFIX,
    SLICE_SUFFIXES,
    holds_dicom,
    is_archive,
    is_dicom_file,
    split_series,
)
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.metaimage import metaimage_files, read_metaimage, read_metaimage_header, write_metaimage
from sagittal.volumes.mgh import read_mgh, read_mgh_header, write_mgh
from sagittal.volumes.nifti import nifti_files, read_nifti, read_nifti_header, write_nifti
from sagittal.volumes.nrrd import nrrd_files, read_nrrd, read_nrrd_header, write_nrrd
from sagittal.volumes.stored import FileHeader, Stored


def _itself(path: Path) -> tuple[Path, ...]:
    return (path,)


class Format(NamedTuple):
    """How to read a file into `Stored`, its header alone, and how to write (D, H, W) voxels on a grid.

    `write` is None where that is not offered. `files` lists what a scan consists of; `beside` are the suffixes of the
    voxels where the file is only their header.
    """

    read: Callable[[Path], Stored]
    read_header: Callable[[Path], FileHeader]
    write: Callable[[Path, NDArray[Any], Geometry], None] | None
    files: Callable[[Path], tuple[Path, ...]] = _itself
    beside: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    ".nii": Format(read_nifti, read_nifti_header, write_nifti),
    ".nii.gz": Format(read_nifti, read_nifti_header, write_nifti),
    ".hdr": Format(read_nifti, read_nifti_header, write_nifti, nifti_files, (".img", ".img.gz")),
    ".mgh": Format(read_mgh, read_mgh_header, write_mgh),
    ".mgz": Format(read_mgh, read_mgh_header, write_mgh),
    ".nrrd": Format(read_nrrd, read_nrrd_header, write_nrrd, nrrd_files),
    ".nhdr": Format(read_nrrd, read_nrrd_header, write_nrrd, nrrd_files, (".raw", ".raw.gz")),
    ".mha": Format(read_metaimage, read_metaimage_header, write_metaimage, metaimage_files),
    ".mhd": Format(read_metaimage, read_metaimage_header, write_metaimage, metaimage_files, (".raw", ".zraw")),
}
DICOM = Format(read_dicom, read_dicom_header, None, dicom_files)
"""For folders and zip archives; not in `FORMATS`, whose suffixes each stand for one file of a data set."""
HALVES = {
    ".dcm": "one slice of a series: give the folder that holds the series, or a zip archive of it",
    ".img": "the voxels of a pair: give the .hdr file beside it",
    ".raw": "voxels without a header: give the .mhd or .nhdr file beside it",
    ".zraw": "voxels without a header: give the .mhd file beside it",
}


def known_suffix(path: str | os.PathLike[str]) -> str | None:
    """Return the suffix among `FORMATS` that the file's name ends with, in any case, or None."""
    name = Path(path).name.lower()
    fitting = [suffix for suffix in FORMATS if name.endswith(suffix)]
    return max(fitting, key=len, default=None)


def is_scan(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name, or a folder's DICOM files, promise one scan; STUDY#UID is one of a study's."""
    path, _ = split_series(Path(path))
    if path.is_dir():
        return holds_dicom(path)
    return known_suffix(path) is not None or is_archive(path) or is_dicom_file(path)


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a scan is read as a DICOM series: a folder, a zip archive, a DICOMDIR or a file by its content."""
    path, _ = split_series(Path(path))
    return path.is_dir() or is_archive(path) or (known_suffix(path) is None and is_dicom_file(path))


def scan_name(path: str | os.PathLike[str]) -> str:
    """Return the name of the file or folder without the suffix of its format."""
    path, _ = split_series(Path(path))
    suffix = "" if path.is_dir() else ARCHIVE_SUFFIX if is_archive(path) else known_suffix(path) or ""
    if not suffix and path.name.lower().endswith(SLICE_SUFFIXES) and not path.is_dir():
        suffix = path.suffix
    return path.name[: len(path.name) - len(suffix)]


def scan_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the files that the scan at `path` consists of, `path` itself or what lies in it first.

    Raises:
        DataError: the scan or a part of it is missing, of an unknown format or damaged.
    """
    path = Path(path)
    with _explained(path):
        return _format_of(path).files(path)


def read_stored(
    path: str | os.PathLike[str], *, resample_slices: bool = False, series_uid: str | None = None
) -> Stored:
    """Read a scan's voxels and grid as they are stored.

    Args:
        path: a file, or the folder or zip archive of a DICOM series.
        resample_slices: bring DICOM slices with a gap, mixed spacings or a gantry tilt onto a regular grid.
        series_uid: which DICOM series to take where there are several.

    Raises:
        DataError: the scan is missing, of an unknown format, damaged, or not a 3D volume of real numbers.
    """
    path = Path(path)
    with _explained(path):
        form = _format_of(path)
        if form is DICOM:
            return read_dicom(path, resample_slices=resample_slices, series_uid=series_uid)
        return form.read(path)


def read_header(path: str | os.PathLike[str]) -> FileHeader:
    """Read a scan's grid and voxel type without its voxels.

    Raises:
        DataError: as `read_stored`, save for what only the voxels tell.
    """
    path = Path(path)
    with _explained(path):
        return _format_of(path).read_header(path)


def write_voxels(path: str | os.PathLike[str], voxels: NDArray[Any], geometry: Geometry) -> Path:
    """Write (D, H, W) voxels in the format that the suffix names and return the path; never leaves half a file.

    Raises:
        DataError: the format is unknown, not written by Sagittal, or can't hold the voxels' type.
        ResourceError: the disk is full or the folder can't be written.
    """
    path = Path(path)
    if is_archive(path) or path.name.lower().endswith(".dcm"):
        raise DataError(f"{path}: DICOM is read only. Expected {_known(writable=True)}. Choose another suffix.")
    writer = FORMATS[_suffix(path, "written")].write
    if writer is None:
        raise DataError(f"{path}: this format is read only. Expected {_known(writable=True)}. Choose another suffix.")
    if voxels.shape != geometry.shape:
        raise DataError(f"{path}: voxels {voxels.shape} do not fit their grid {geometry.shape} (D, H, W).")
    writer(path, voxels, geometry)
    return path


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise DataError(
            f"{path}: can't be read ({cause}). Check the file and its permissions.", code="unreadable"
        ) from None
    except MemoryError:
        raise DataError(f"{path}: its voxels do not fit into memory. Crop the scan or use a larger machine.") from None


def _format_of(path: Path) -> Format:
    path, series = split_series(path)
    if path.is_dir():
        if holds_dicom(path):
            return DICOM
        raise DataError(
            f"{path}: a folder without DICOM files. Expected an image file ({_known()}), or the folder or zip archive "
            "of a DICOM series.",
            code="unreadable",
        )
    if not path.exists():
        raise DataError(f"{path}: no such file. Expected an image. Check the path.", code="unreadable")
    if is_dicom(path):
        return DICOM
    if series is not None:
        raise DataError(
            f"{path}: no DICOM, so that there is no series {series} in it. Leave that out.", code="unreadable"
        )
    return FORMATS[_suffix(path, "read")]


def _suffix(path: Path, purpose: str) -> str:
    suffix = known_suffix(path)
    if suffix is None:
        given = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        half = HALVES.get(given.lower())
        if half is not None and purpose == "read":
            raise DataError(f"{path}: {half}.", code="unknown_format")
        raise DataError(
            f"{path}: files ending in '{given}' can't be {purpose}. Expected an image format that Sagittal knows."
            f"{did_you_mean(given, FORMATS)}",
            code="unknown_format",
        )
    return suffix


def _known(*, writable: bool = False) -> str:
    return ", ".join(suffix for suffix, form in FORMATS.items() if form.write is not None or not writable)
