"""What the header of one DICOM slice says: which series, where it lies, how its numbers are stored.

Tags that name the patient are never parsed, and no message holds a tag's text: only numbers, series UIDs and names of
files.
"""

from __future__ import annotations

import importlib
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError, SagittalError
from sagittal.volumes.dicom_files import Member
from sagittal.volumes.refusals import no_scalar

IDENTITY = ("SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType", "NumberOfFrames")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
STORAGE = ("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit")
VALUES = ("PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
VARYING = ("EchoTime", "DiffusionBValue", "TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber")
"""What may tell the images at one place apart."""
WANTED = (*IDENTITY, *PLACE, *STORAGE, *VALUES, *VARYING)
WITH_UNITS = ("CT", "PT", "NM")
"""Modalities whose numbers measure something: MONOCHROME1 then only asks a screen to show them inverted."""
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Encoding:
    """How a slice's numbers are stored.

    Attributes:
        dtype: type of the numbers in the file's byte order.
        bits: how many of the type's bits count.
        high_bit: which of them is the highest.
        inverted: whether the numbers run from white to black.
        slope: what a number is multiplied with.
        intercept: what is then added.
    """

    dtype: np.dtype[Any]
    bits: int
    high_bit: int
    inverted: bool
    slope: float
    intercept: float


@dataclass(frozen=True, eq=False)
class ImageHeader:
    """The header of an image before its series is chosen.

    Attributes:
        member: its file.
        series_uid: the series that it belongs to.
        modality: CT, MR and so on.
        shape: voxels along H and W.
        frames: images in the file.
        has_place: whether it may be part of a volume: it says where it lies, or holds several frames.
        tags: pydicom's data set of the tags that are needed.
    """

    member: Member
    series_uid: str
    modality: str
    shape: tuple[int, int]
    frames: int
    has_place: bool
    tags: Any


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice: where it lies in mm (LPS), and how its numbers are stored.

    Attributes:
        member: its file.
        position_mm: (3,), centre of the first voxel.
        row: (3,), unit vector along which the column index grows.
        column: (3,), unit vector along which the row index grows.
        spacing_mm: distance of voxels along H and W.
        shape: voxels along H and W.
        encoding: how its numbers are stored.
        varying: what may tell it from another image at the same place.
    """

    member: Member
    position_mm: NDArray[np.float64]
    row: NDArray[np.float64]
    column: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    encoding: Encoding
    varying: dict[str, str]


def library(path: Path) -> Any:
    """Return pydicom.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("pydicom")
    except ImportError:
        raise DataError(
            f"{path}: reading DICOM needs pydicom, which is not installed. Run: pip install 'sagittal[dicom]'",
            code="missing_extra",
        ) from None


def read_image_header(member: Member, path: Path) -> ImageHeader | None:
    """Return the header of an image, or None for what is no slice of a scan: reports, segmentations, localizers.

    Raises:
        DataError: the file is damaged.
    """
    pydicom = library(path)
    with _quiet(member, path), member.open() as file:
        tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*WANTED])
        stored_as = tags.file_meta.get("MediaStorageSOPClassUID") or tags.get("SOPClassUID")
        if stored_as is None:
            raise _damaged(member, path, "its header ends too early: the file is truncated")
        localizer = "LOCALIZER" in [str(word).upper() for word in _words(tags.get("ImageType"))]
        if "Image Storage" not in pydicom.uid.UID(stored_as).name or localizer:
            return None
        if not all(name in tags for name in ("Rows", "Columns", "SeriesInstanceUID")):
            raise _damaged(member, path, "its header ends too early: the file is truncated")
        frames = int(tags.get("NumberOfFrames") or 1)
        return ImageHeader(
            member,
            str(tags.SeriesInstanceUID),
            str(tags.get("Modality", "unknown"))[:16],
            (int(tags.Rows), int(tags.Columns)),
            frames,
            frames > 1 or all(name in tags for name in ("ImagePositionPatient", "ImageOrientationPatient")),
            tags,
        )


def parse_slice(header: ImageHeader, path: Path) -> Slice:
    """Return what the header of one slice of the chosen series says.

    Raises:
        DataError: several frames, packed or coloured voxels, no position, or numbers that make no sense.
    """
    tags, member = header.tags, header.member
    with _quiet(member, path):
        _require_plain(header, path)
        orientation = _numbers(tags, "ImageOrientationPatient", 6, member, path)
        position = _numbers(tags, "ImagePositionPatient", 3, member, path)
        spacing = _numbers(tags, "PixelSpacing", 2, member, path)
        row, column = orientation[:3], orientation[3:]
        lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
        if np.abs(lengths - 1.0).max() > UNIT_TOLERANCE or abs(float(row @ column)) > UNIT_TOLERANCE:
            raise _damaged(member, path, "ImageOrientationPatient is not two unit vectors at right angles")
        if spacing.min() <= 0 or min(header.shape) < 1:
            raise _damaged(
                member, path, f"PixelSpacing {spacing.tolist()}, {header.shape[0]} x {header.shape[1]} voxels"
            )
        return Slice(
            member,
            position,
            row / lengths[0],
            column / lengths[1],
            (float(spacing[0]), float(spacing[1])),
            header.shape,
            _encoding(tags, member, path),
            {name: f"{tags.get(name):g}" for name in VARYING if isinstance(tags.get(name), int | float)},
        )


def read_pixels(piece: Slice, path: Path) -> NDArray[Any]:
    """Return the stored numbers of one slice as (H, W), in the machine's byte order.

    Raises:
        DataError: they are truncated or damaged.
    """
    encoding, count = piece.encoding, piece.shape[0] * piece.shape[1]
    pydicom = library(path)
    with _quiet(piece.member, path), piece.member.open() as file:
        content: bytes = pydicom.dcmread(file, specific_tags=["PixelData"]).get("PixelData") or b""
    expected = count * encoding.dtype.itemsize
    if len(content) < expected:
        found = f"{expected} bytes of voxels expected, {len(content)} found: it is truncated"
        raise _damaged(piece.member, path, found)
    values = np.frombuffer(content, encoding.dtype, count).reshape(piece.shape)
    values = values.astype(encoding.dtype.newbyteorder("="))
    width = 8 * encoding.dtype.itemsize
    if encoding.bits != width:
        # Other data may hide in the bits that do not count; shifting there and back also spreads the sign.
        values = (values << (width - 1 - encoding.high_bit)) >> (width - encoding.bits)
    if encoding.inverted:
        highest = -1 if values.dtype.kind == "i" else (1 << encoding.bits) - 1
        values = (highest - values).astype(values.dtype)
    return values


def _require_plain(header: ImageHeader, path: Path) -> None:
    """Refuse by name what is not read yet."""
    tags, meta = header.tags, header.tags.file_meta
    name = str(getattr(meta.get("MediaStorageSOPClassUID"), "name", "DICOM object"))
    if header.frames > 1 or "Enhanced" in name:
        raise DataError(
            f"{path}: {name}, {header.frames} frames in one file (enhanced multi-frame). Expected one slice per file. "
            "Convert it to NIfTI, for example with dcm2niix.",
            code="multi_frame",
        )
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_transfer_syntax or syntax.is_encapsulated:
        called = "an unknown transfer syntax" if syntax is None else f"compressed voxels ({syntax.name})"
        raise DataError(
            f"{path}: {called}. Expected uncompressed voxels. Unpack them (dcmdjpeg, gdcmconv --raw), or convert the "
            "series to NIfTI with dcm2niix.",
            code="compressed",
        )
    photometric = str(tags.get("PhotometricInterpretation", "MONOCHROME2"))
    if int(tags.get("SamplesPerPixel", 1)) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise no_scalar(path, f"RGB colours ({photometric[:16]})")
    if "ModalityLUTSequence" in tags:
        raise no_scalar(path, "indices into a table (Modality LUT)")


def _encoding(tags: Any, member: Member, path: Path) -> Encoding:
    allocated, signed = int(tags.BitsAllocated), int(tags.get("PixelRepresentation", 0)) == 1
    bits = int(tags.get("BitsStored", allocated))
    high = int(tags.get("HighBit", bits - 1))
    if allocated not in (8, 16, 32) or not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
        raise _damaged(member, path, f"{allocated} bits allocated, {bits} stored, highest {high}")
    order = "<" if tags.file_meta.TransferSyntaxUID.is_little_endian else ">"
    dtype = np.dtype(f"{order}{'i' if signed else 'u'}{allocated // 8}")
    # Both may be there and empty.
    slope, intercept = tags.get("RescaleSlope"), tags.get("RescaleIntercept")
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if not math.isfinite(slope) or not math.isfinite(intercept) or slope == 0.0:
        raise _damaged(member, path, f"RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}")
    inverted = tags.get("PhotometricInterpretation") == "MONOCHROME1" and tags.get("Modality") not in WITH_UNITS
    return Encoding(dtype, bits, high, inverted, slope, intercept)


def _numbers(tags: Any, name: str, count: int, member: Member, path: Path) -> NDArray[np.float64]:
    values = np.array([float(value) for value in _words(tags.get(name))])
    if len(values) != count or not np.isfinite(values).all():
        found = f"{name} is missing" if len(values) == 0 else f"{name} is not {count} finite numbers"
        raise _damaged(member, path, f"{found}, so that its place is unknown")
    return values


def _words(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str | int | float) else list(value)


def _damaged(member: Member, path: Path, cause: str) -> DataError:
    return DataError(
        f"{path}: {member.name}: {cause}. Expected a whole DICOM slice. Copy or export the series again.",
        code="unreadable",
    )


@contextmanager
def _quiet(member: Member, path: Path) -> Iterator[None]:
    """Keep pydicom's warnings and errors to itself: they may quote what names the patient."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SagittalError, OSError, MemoryError, zipfile.BadZipFile, zlib.error):
        raise
    except library(path).errors.InvalidDicomError:
        raise _damaged(member, path, "it is no DICOM file") from None
    except Exception as error:
        # On damaged tags pydicom lets through whatever its conversions raise.
        raise _damaged(member, path, f"its header makes no sense ({type(error).__name__})") from None
