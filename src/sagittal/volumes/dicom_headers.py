"""What the header of one DICOM slice says: which series, where it lies, how its numbers are stored.

Tags that name the patient are never parsed, and no message holds a tag's text: only numbers, series UIDs and names of
files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.volumes.dicom_enhanced import FRAME_TAGS, Tags, is_enhanced, tags_of_frames
from sagittal.volumes.dicom_files import Member
from sagittal.volumes.dicom_frames import BITS_ALLOCATED, Encoding, require_readable_voxels
from sagittal.volumes.dicom_library import BoundedFile, damaged, library, quiet, require_sensible_size
from sagittal.volumes.refusals import no_scalar

IDENTITY = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "NumberOfFrames",
)
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
STORAGE = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "LossyImageCompression",
)
VALUES = ("PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
VARYING = (
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "AcquisitionNumber",
)
"""What may tell the images at one place apart."""
WANTED = (*IDENTITY, "NumberOfFrames", *PLACE, *STORAGE, *VALUES, *VARYING)
WITH_UNITS = ("CT", "PT", "NM")
"""Modalities whose numbers measure something: MONOCHROME1 then only asks a screen to show them inverted."""
UNIT_TOLERANCE = 1e-3


MAX_PLANE_VOX = 1 << 26
"""Of 8192 x 8192 voxels; larger slices are forged, or no scan."""
KINDS = (
    *("MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "MIXED", "M", "P", "R", "I"),
    *("WATER", "FAT", "IN_PHASE", "OUT_PHASE", "W", "F", "IP", "OP", "ADC", "TRACEW", "FA"),
)
"""Words of ImageType and ComplexImageComponent that may tell the images at one place apart; no other text is kept."""
UNKNOWN_CLASS = "another object"
_UID = re.compile(r"[0-9.]{1,64}")
Kind = Literal["scan", "localizer", "capture"]


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
        kind: whether it is a scan's, a localizer or a secondary capture.
        tags: pydicom's data set of the tags that are needed.
    """

    member: Member
    series_uid: str
    modality: str
    shape: tuple[int, int]
    frames: int
    has_place: bool
    kind: Kind
    tags: Any


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice, a file or a frame of one: where it lies in mm (LPS), and how its numbers are stored.

    Attributes:
        member: its file.
        position_mm: (3,), centre of the first voxel.
        row: (3,), unit vector along which the column index grows.
        column: (3,), unit vector along which the row index grows.
        spacing_mm: distance of voxels along H and W.
        shape: voxels along H and W.
        encoding: how its numbers are stored.
        varying: what may tell it from another image at the same place.
        frame: which frame of its file it is, from 0.
        instance: its SOP instance UID.
    """

    member: Member
    position_mm: NDArray[np.float64]
    row: NDArray[np.float64]
    column: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    encoding: Encoding
    varying: dict[str, str]
    frame: int = 0
    instance: str = ""


def read_image_header(member: Member, path: Path) -> ImageHeader | None:
    """Return the header of an image, or None for what is no slice of a scan: reports, segmentations, localizers.

    Raises:
        DataError: the file is damaged.
    """
    header = image_header(read_tags(member, path, WANTED), member, path)
    return None if header is None or header.kind == "localizer" else header


def read_tags(member: Member, path: Path, names: tuple[str, ...]) -> Any:
    """Return pydicom's data set of the named tags, without voxels.

    Raises:
        DataError: the file is damaged.
    """
    pydicom = library(path)
    with quiet(member.name, path), BoundedFile(member.open(), member.size) as file:
        require_sensible_size(member.name, path, file)
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*names])


def image_header(tags: Any, member: Member, path: Path) -> ImageHeader | None:
    """Return the header of an image, None for other objects (reports, segmentations, plans).

    Args:
        tags: those of `WANTED`, as `read_tags` returns them.
        member: the file.
        path: of the scan.

    Raises:
        DataError: the header is cut off.
    """
    with quiet(member.name, path):
        name = class_name(tags, path)
        if name is None:
            raise damaged(member.name, path, "its header ends too early: the file is truncated")
        if "Image Storage" not in name:
            return None
        if not all(tags.get(tag) is not None for tag in ("Rows", "Columns", "SeriesInstanceUID")):
            raise damaged(member.name, path, "its header ends too early: the file is truncated")
        frames = int(tags.get("NumberOfFrames") or 1)
        localizer = "LOCALIZER" in [str(word).upper() for word in words(tags.get("ImageType"))]
        capture = "Secondary Capture" in name
        return ImageHeader(
            member,
            str(tags.SeriesInstanceUID)[:64],
            str(tags.get("Modality", "unknown"))[:16],
            (int(tags.Rows), int(tags.Columns)),
            frames,
            frames > 1 or is_enhanced(name) or all(name in tags for name in PLACE[:2]),
            "localizer" if localizer else "capture" if capture else "scan",
            tags,
        )


def class_name(tags: Any, path: Path) -> str | None:
    """Return what kind of object a file holds, `MR Image Storage` for example; None where it doesn't say."""
    stored_as = tags.file_meta.get("MediaStorageSOPClassUID") or tags.get("SOPClassUID")
    if stored_as is None:
        return None
    # With a forged length it runs on into the tags behind it, the patient's name among them.
    uid = str(stored_as)
    return str(library(path).uid.UID(uid).name) if _UID.fullmatch(uid) else UNKNOWN_CLASS


def parse_slices(header: ImageHeader, path: Path) -> list[Slice]:
    """Return what the header of one file of the chosen series says of its slice, or of each of its frames.

    Raises:
        DataError: frames without a place of their own, coloured voxels, a compression that is not read, no position, or
            numbers that make no sense.
    """
    with quiet(header.member.name, path):
        _require_plain(header, path)
        name = class_name(header.tags, path) or ""
        if header.frames == 1 and not is_enhanced(name):
            return [_slice(header, header.tags, 0, path)]
        if not is_enhanced(name):
            raise DataError(
                f"{path}: {name}, {header.frames} frames in one file that say not where each lies. Expected one slice "
                "per file, or an enhanced CT, MR or PET. Convert it to NIfTI with a tool that knows its maker.",
                code="multi_frame",
            )
        groups = read_tags(header.member, path, FRAME_TAGS)
        found = tags_of_frames(groups, header.frames)
        if found is None:
            text = f"{header.frames} frames, but not as many functional groups"
            raise damaged(header.member.name, path, text)
        plain = {tag: header.tags.get(tag) for tag in WANTED if tag in header.tags}
        return [_slice(header, plain | frame, index, path) for index, frame in enumerate(found)]


def _slice(header: ImageHeader, tags: Tags, frame: int, path: Path) -> Slice:
    member = header.member
    orientation = _numbers(tags, "ImageOrientationPatient", 6, member, path)
    position = _numbers(tags, "ImagePositionPatient", 3, member, path)
    spacing = _numbers(tags, "PixelSpacing", 2, member, path)
    row, column = orientation[:3], orientation[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1.0).max() > UNIT_TOLERANCE or abs(float(row @ column)) > UNIT_TOLERANCE:
        raise damaged(member.name, path, "ImageOrientationPatient is not two unit vectors at right angles")
    height, width = header.shape
    if spacing.min() <= 0 or min(height, width) < 1 or height * width > MAX_PLANE_VOX:
        raise damaged(member.name, path, f"PixelSpacing {spacing.tolist()}, {height} x {width} voxels")
    return Slice(
        member,
        position,
        row / lengths[0],
        column / lengths[1],
        (float(spacing[0]), float(spacing[1])),
        header.shape,
        _encoding(header, tags, path),
        _varying(tags),
        frame,
        str(tags.get("SOPInstanceUID", ""))[:64],
    )


def _varying(tags: Tags) -> dict[str, str]:
    found = {name: tags.get(name) for name in (*VARYING, *tags.get("FrameNames", ()))}
    texts = {name: f"{value:g}" for name, value in found.items() if isinstance(value, int | float)}
    kinds = [str(word).upper() for word in (*words(tags.get("ComplexImageComponent")), *words(tags.get("ImageType")))]
    known = [word for word in dict.fromkeys(kinds) if word in KINDS]
    return texts | ({"kind": " ".join(known)} if known else {})


def _require_plain(header: ImageHeader, path: Path) -> None:
    """Refuse by name what is not read."""
    tags = header.tags
    photometric = str(tags.get("PhotometricInterpretation", "MONOCHROME2"))
    if int(tags.get("SamplesPerPixel", 1)) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise no_scalar(path, f"RGB colours ({photometric[:16]})")
    if "ModalityLUTSequence" in tags:
        raise no_scalar(path, "indices into a table (Modality LUT)")
    require_readable_voxels(tags, path)


def _encoding(header: ImageHeader, tags: Tags, path: Path) -> Encoding:
    plain, name = header.tags, header.member.name
    allocated, signed = int(plain.get("BitsAllocated") or 0), int(plain.get("PixelRepresentation") or 0) == 1
    bits = int(plain.get("BitsStored") or allocated)
    high = int(plain.get("HighBit", bits - 1))
    if allocated not in BITS_ALLOCATED or not 1 <= bits <= allocated or not bits - 1 <= high < allocated:
        raise damaged(name, path, f"{allocated} bits allocated, {bits} stored, highest {high}")
    order = "<" if plain.file_meta.TransferSyntaxUID.is_little_endian else ">"
    dtype = np.dtype(f"{order}{'i' if signed else 'u'}{allocated // 8}")
    # Both may be there and empty.
    slope, intercept = tags.get("RescaleSlope"), tags.get("RescaleIntercept")
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    if not math.isfinite(slope) or not math.isfinite(intercept) or slope == 0.0:
        raise damaged(name, path, f"RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}")
    inverted = plain.get("PhotometricInterpretation") == "MONOCHROME1" and header.modality not in WITH_UNITS
    return Encoding(dtype, bits, high, inverted, slope, intercept)


def _numbers(tags: Tags, name: str, count: int, member: Member, path: Path) -> NDArray[np.float64]:
    values = np.array([float(value) for value in words(tags.get(name))])
    if len(values) != count or not np.isfinite(values).all():
        found = f"{name} is missing" if len(values) == 0 else f"{name} is not {count} finite numbers"
        raise damaged(member.name, path, f"{found}, so that its place is unknown")
    return values


def words(value: Any) -> list[Any]:
    """Return the values of a tag, none, one or several, as a list."""
    return [] if value is None else [value] if isinstance(value, str | int | float) else list(value)
