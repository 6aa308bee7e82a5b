"""A DICOM series, in a folder or a zip archive, as one volume.

Where the slices lie comes from ImagePositionPatient and ImageOrientationPatient alone: SliceThickness is how thick a
slice is, not how far it is from the next. What is no regular grid is refused with the numbers, or resampled on request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.volumes import slice_stack
from sagittal.volumes.dicom_files import Member, folder_files, is_archive, members
from sagittal.volumes.dicom_headers import ImageHeader, Slice, parse_slice, read_image_header, read_pixels
from sagittal.volumes.geometry import DIRECTION_TOLERANCE_DEG, SPACING_TOLERANCE, Geometry, affine_from_lps
from sagittal.volumes.slice_stack import Fault, SliceStack
from sagittal.volumes.stored import FileHeader, Stored

RESAMPLING = (
    "Export the series again, or have it resampled: 'sagittal convert SERIES OUT.nii.gz --resample-slices', in Python "
    "read_volume(path, resample_slices=True)."
)


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one series in order, and the grid that they make.

    Attributes:
        path: folder or archive.
        slices: sorted along their normal.
        stack: where they lie.
        is_resampled: whether the grid is one that the slices are still to be resampled to.
    """

    path: Path
    slices: tuple[Slice, ...]
    stack: SliceStack
    is_resampled: bool

    @property
    def has_one_scale(self) -> bool:
        """Whether one slope and one intercept hold for all slices."""
        return len({(piece.encoding.slope, piece.encoding.intercept) for piece in self.slices}) == 1

    def header(self) -> FileHeader:
        """Return the grid and the type of what `voxels` returns."""
        height, width = self.stack.shape
        shape = (len(self.slices), height, width)
        axes, origin = self.stack.axes, self.stack.positions_mm[0]
        if self.is_resampled:
            shape, (axes, origin) = slice_stack.resampled_shape(self.stack), slice_stack.resampled_grid(self.stack)
        geometry = Geometry(shape, affine_from_lps(axes, origin))
        if self.is_resampled or not self.has_one_scale:
            return FileHeader(self.path, geometry, np.dtype(np.float32))
        first = self.slices[0].encoding
        return FileHeader(self.path, geometry, self._stored_type(), first.slope, first.intercept)

    def voxels(self) -> NDArray[Any]:
        """Read the voxels: stored numbers, or float32 values where one slope does not hold for all."""
        height, width = self.stack.shape
        as_values = self.is_resampled or not self.has_one_scale
        voxels = np.empty((len(self.slices), height, width), np.float32 if as_values else self._stored_type())
        for piece, plane in zip(self.slices, voxels, strict=True):
            stored = read_pixels(piece, self.path)
            if as_values:
                plane[...] = stored * np.float64(piece.encoding.slope) + np.float64(piece.encoding.intercept)
            else:
                plane[...] = stored
        return slice_stack.resample(self.stack, voxels) if self.is_resampled else voxels

    def _stored_type(self) -> np.dtype[Any]:
        return np.result_type(*{piece.encoding.dtype.newbyteorder("=") for piece in self.slices})


def read_dicom(path: Path, *, resample_slices: bool = False, series_uid: str | None = None) -> Stored:
    """Read the one series of a folder (at any depth) or zip archive, slices sorted along their normal.

    Args:
        path: folder or archive.
        resample_slices: bring slices with a gap, mixed spacings or a gantry tilt onto a regular grid by linear
            interpolation, where these are refused otherwise.
        series_uid: which series to take where there are several.

    Raises:
        DataError: there is no series or more than one, slices share a place, differ in size or orientation, are
            unevenly spaced or tilted, or hold what is not read (colours, several frames, compressed voxels).
    """
    with members(path) as files:
        series = _series(path, files, resample_slices, series_uid)
        return series.header().with_voxels(series.voxels())


def read_dicom_header(path: Path, *, resample_slices: bool = False, series_uid: str | None = None) -> FileHeader:
    """Read the headers of all slices and no voxels; arguments and errors as `read_dicom`."""
    with members(path) as files:
        return _series(path, files, resample_slices, series_uid).header()


def dicom_modality(path: Path) -> str | None:
    """Return what the first slice's header calls its modality, `CT` or `MR` for example; None where it says nothing.

    Raises:
        DataError: a file is damaged, or pydicom is not installed.
    """
    with members(path) as files:
        headers = (read_image_header(member, path) for member in files)
        found = next((header for header in headers if header is not None), None)
    return None if found is None or found.modality == "unknown" else found.modality


def dicom_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the scan: the archive, or the DICOM files of the folder."""
    return (path,) if is_archive(path) and not path.is_dir() else folder_files(path)


def _series(path: Path, files: Sequence[Member], resample_slices: bool, series_uid: str | None) -> Series:
    if not files:
        raise DataError(
            f"{path}: no DICOM file in it. Expected the slices of one series. Check the path.", code="unreadable"
        )
    found: dict[str, list[ImageHeader]] = {}
    for member in files:
        header = read_image_header(member, path)
        if header is not None:
            found.setdefault(header.series_uid, []).append(header)
    if not found:
        raise DataError(
            f"{path}: {len(files)} DICOM files, but no slice of a scan (localizers, reports and segmentations do not "
            "count). Give the folder of a series.",
            code="unreadable",
        )
    slices = [parse_slice(header, path) for header in found[_chosen(path, found, series_uid)]]
    if len(slices) < 2:
        raise DataError(
            f"{path}: a series of one slice. Expected at least two: their distance is known from their positions only. "
            "Check that the series is whole.",
            code="not_3d",
        )
    _require_alike(path, slices)
    return _sorted(path, slices, resample_slices)


def _chosen(path: Path, found: dict[str, list[ImageHeader]], series_uid: str | None) -> str:
    if series_uid is not None:
        if series_uid in found:
            return series_uid
        raise DataError(
            f"{path}: no series {series_uid}. There are: {_listed(found)}. Name one of them.", code="several_series"
        )
    # Screenshots and the like say nothing of a place, and are no reason to refuse the scan beside them.
    placed = {uid for uid, images in found.items() if any(header.has_place for header in images)}
    candidates = placed or set(found)
    if len(candidates) > 1:
        raise DataError(
            f"{path}: {len(candidates)} series: {_listed({uid: found[uid] for uid in sorted(candidates)})}. Expected "
            "one. Give the folder of one, or its UID: --series-uid, in Python read_volume(path, series_uid=...).",
            code="several_series",
        )
    return candidates.pop()


def _listed(found: dict[str, list[ImageHeader]]) -> str:
    texts = []
    for uid, images in found.items():
        (height, width), modality = images[0].shape, images[0].modality
        texts.append(f"{modality}, {len(images)} images of {height} x {width} ({uid})")
    return "; ".join(texts[:8]) + (f"; and {len(texts) - 8} more" if len(texts) > 8 else "")


def _require_alike(path: Path, slices: Sequence[Slice]) -> None:
    """Refuse slices of several sizes, voxel sizes or orientations: several scans under one series."""
    sizes = Counter(piece.shape for piece in slices)
    if len(sizes) > 1:
        listed = ", ".join(f"{count} of {height} x {width}" for (height, width), count in sizes.most_common())
        raise _mixed(path, f"slices of several sizes: {listed} voxels")
    first = slices[0]
    spacings = np.array([piece.spacing_mm for piece in slices])
    apart = float((np.abs(spacings - spacings[0]) / spacings[0]).max())
    if apart > SPACING_TOLERANCE:
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        raise _mixed(path, f"voxels of {low[0]:.4g} x {low[1]:.4g} to {high[0]:.4g} x {high[1]:.4g} mm in the plane")
    angles = [_angle_deg(piece, first) for piece in slices]
    if max(angles) > DIRECTION_TOLERANCE_DEG:
        raise _mixed(
            path,
            f"slices of several orientations, {max(angles):.3g} degrees apart (tolerance {DIRECTION_TOLERANCE_DEG:g})",
        )


def _mixed(path: Path, what: str) -> DataError:
    text = f"{path}: {what}. Expected parallel slices of one size. Remove the files that do not belong to the scan."
    return DataError(text, code="mixed_slices")


def _angle_deg(first: Slice, second: Slice) -> float:
    # The chord keeps small angles that the cosine rounds away.
    chords = [float(np.linalg.norm(first.row - second.row)), float(np.linalg.norm(first.column - second.column))]
    return float(np.degrees(2.0 * np.arcsin(min(1.0, max(chords) / 2.0))))


def _sorted(path: Path, slices: Sequence[Slice], resample_slices: bool) -> Series:
    first = slices[0]
    positions = np.stack([piece.position_mm for piece in slices])
    normal = slice_stack.normal_of(first.row, first.column)
    order = np.argsort(positions @ normal, kind="stable")
    ordered = tuple(slices[index] for index in order)
    stack = SliceStack(positions[order], first.row, first.column, first.spacing_mm, first.shape)
    same = slice_stack.repeated(stack)
    if same is not None:
        raise DataError(
            f"{path}: {same.message}{_what_varies(slices)}. Expected one slice per place: this is a time series, "
            "several images under one series, or copies of files. Keep the files of one.",
            code=same.code,
        )
    found = slice_stack.faults(stack)
    if found and not resample_slices:
        raise _refused(path, found)
    if found:
        _require_sensible(path, stack, found)
    return Series(path, ordered, stack, is_resampled=bool(found))


def _what_varies(slices: Sequence[Slice]) -> str:
    texts = []
    for name in slices[0].varying:
        values = list(dict.fromkeys(piece.varying.get(name, "none") for piece in slices))
        if len(values) > 1:
            texts.append(f"{name} {', '.join(values[:4])}{', ...' if len(values) > 4 else ''}")
    return f" (they differ in {'; '.join(texts)})" if texts else ""


def _refused(path: Path, found: Sequence[Fault]) -> DataError:
    numbers = "; ".join(fault.message for fault in found)
    return DataError(
        f"{path}: {numbers}. Expected even steps straight above each other. {RESAMPLING}", code=found[0].code
    )


def _require_sensible(path: Path, stack: SliceStack, found: Sequence[Fault]) -> None:
    depth, height, width = slice_stack.resampled_shape(stack)
    before = len(stack.positions_mm) * stack.shape[0] * stack.shape[1]
    if depth * height * width > slice_stack.MAX_GROWTH * before:
        raise DataError(
            f"{path}: {'; '.join(fault.message for fault in found)}. A regular grid would need {depth} x {height} x "
            f"{width} voxels, more than {slice_stack.MAX_GROWTH} times as many. Remove the slices that do not belong.",
            code=found[0].code,
        )
