"""A DICOM series, in a folder, a zip archive, a DICOMDIR or one file of many frames, as one volume.

Where the slices lie comes from ImagePositionPatient and ImageOrientationPatient alone: SliceThickness is how thick a
slice is, not how far it is from the next. What is no regular grid is refused with the numbers, or resampled on request.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.volumes import slice_stack
from sagittal.volumes.dicom_directory import is_directory_file, referenced_files
from sagittal.volumes.dicom_files import MAX_UNPACKED_BYTES, Member, folder_files, members, split_series
from sagittal.volumes.dicom_frames import read_frames
from sagittal.volumes.dicom_headers import ImageHeader, Slice, parse_slices, read_image_header
from sagittal.volumes.dicom_parts import Part, listed, parts_of, split_part
from sagittal.volumes.geometry import DIRECTION_TOLERANCE_DEG, SPACING_TOLERANCE, Geometry, affine_from_lps
from sagittal.volumes.slice_stack import Fault, SliceStack
from sagittal.volumes.stored import FileHeader, Stored

_BLOCK_BYTES = 1 << 20
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
        dtype = np.dtype(np.float32) if as_values else self._stored_type()
        voxels: NDArray[Any] | None = None
        for index, stored in self._planes():
            if voxels is None:  # not before there is a first slice of that size: sizes may be forged
                voxels = np.empty((len(self.slices), height, width), dtype)
            if as_values:
                encoding = self.slices[index].encoding
                with np.errstate(over="ignore", invalid="ignore"):
                    voxels[index] = stored * np.float64(encoding.slope) + np.float64(encoding.intercept)
            else:
                voxels[index] = stored
        assert voxels is not None
        return slice_stack.resample(self.stack, voxels) if self.is_resampled else voxels

    def _planes(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield each slice's place in the stack and stored numbers, file by file, so that each is opened once."""
        files: dict[str, list[int]] = {}
        for index, piece in enumerate(self.slices):
            files.setdefault(piece.member.name, []).append(index)
        for indices in files.values():
            indices.sort(key=lambda index: self.slices[index].frame)
            first = self.slices[indices[0]]
            frames = [self.slices[index].frame for index in indices]
            found = read_frames(first.member, self.path, first.shape, frames, first.encoding)
            yield from zip(indices, found, strict=True)

    def _stored_type(self) -> np.dtype[Any]:
        return np.result_type(*{piece.encoding.dtype.newbyteorder("=") for piece in self.slices})


def read_dicom(path: Path, *, resample_slices: bool = False, series_uid: str | None = None) -> Stored:
    """Read one series of a study, slices sorted along their normal.

    Args:
        path: a folder (searched to any depth), zip archive, DICOMDIR or file of many frames; `STUDY#UID` names one of
            its series.
        resample_slices: bring slices with a gap, mixed spacings or a gantry tilt onto a regular grid by linear
            interpolation, where these are refused otherwise.
        series_uid: which series to take where there are several: its UID or its number; `UID@2` is the second of the
            volumes (echoes, b-values) that share a series.

    Raises:
        DataError: there is no series or more than one, slices share a place, differ in size or orientation, are
            unevenly spaced or tilted, or hold what is not read (colours, unknown compressions).
    """
    with opened_series(path, resample_slices=resample_slices, series_uid=series_uid) as series:
        return series.header().with_voxels(series.voxels())


def read_dicom_header(path: Path, *, resample_slices: bool = False, series_uid: str | None = None) -> FileHeader:
    """Read the headers of all slices and no voxels; arguments and errors as `read_dicom`."""
    with opened_series(path, resample_slices=resample_slices, series_uid=series_uid) as series:
        return series.header()


@contextmanager
def opened_series(path: Path, *, resample_slices: bool = False, series_uid: str | None = None) -> Iterator[Series]:
    """Find the series that `read_dicom` reads; its files can be opened within the block. Arguments and errors alike."""
    study, named = split_series(path)
    with members(study) as files:
        yield _series(study, files, resample_slices, series_uid or named)


def dicom_modality(path: Path) -> str | None:
    """Return what the first slice's header calls its modality, `CT` or `MR` for example; None where it says nothing.

    Raises:
        DataError: a file is damaged, or pydicom is not installed.
    """
    study, named = split_series(path)
    uid = None if named is None else split_part(named)[0]
    with members(study) as files:
        headers = (read_image_header(member, study) for member in files)
        found = next((each for each in headers if each is not None and (uid is None or _is_series(each, uid))), None)
    return None if found is None or found.modality == "unknown" else found.modality


def dicom_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the scan: the archive or file, or the DICOM files of the folder or DICOMDIR."""
    study, _ = split_series(path)
    if study.is_dir():
        return folder_files(study)
    return (study, *referenced_files(study)) if is_directory_file(study) else (study,)


def _series(path: Path, files: Sequence[Member], resample_slices: bool, series_uid: str | None) -> Series:
    if not files:
        raise DataError(
            f"{path}: no DICOM file in it. Expected the slices of one series. Check the path.", code="unreadable"
        )
    found: dict[str, list[ImageHeader]] = {}
    broken: dict[str, DataError] = {}
    for member in files:
        try:
            header = read_image_header(member, path)
        except DataError as error:
            if error.code != "unreadable":
                raise
            broken[member.name] = error
        else:
            if header is not None:
                found.setdefault(header.series_uid, []).append(header)
    if not found and broken:
        raise next(iter(broken.values()))
    if not found:
        raise DataError(
            f"{path}: {len(files)} DICOM files, but no slice of a scan (localizers, reports and segmentations do not "
            "count). Give the folder of a series.",
            code="unreadable",
        )
    uid, number = (None, None) if series_uid is None else split_part(series_uid)
    uid = _chosen(path, found, uid)
    headers = scans_first(found[uid])
    beside = damaged_beside(headers, broken)
    if beside is not None:
        raise beside
    return assembled(path, _part(path, slices_of(path, headers), uid, number).slices, resample_slices)


def scans_first(headers: Sequence[ImageHeader]) -> list[ImageHeader]:
    """Return the headers without secondary captures, unless there is nothing else."""
    return [header for header in headers if header.kind == "scan"] or list(headers)


def damaged_beside(headers: Sequence[ImageHeader], broken: Mapping[str, DataError]) -> DataError | None:
    """Return what is wrong with a damaged file in a folder of the series: it may be one of its slices.

    Args:
        headers: of the series' files.
        broken: by the name of the file within the study.
    """
    folders = {PurePosixPath(header.member.name).parent for header in headers}
    return next((error for name, error in broken.items() if PurePosixPath(name).parent in folders), None)


def slices_of(path: Path, headers: Sequence[ImageHeader]) -> list[Slice]:
    """Return the slices of a series' files; copies of a file count once.

    Raises:
        DataError: as `parse_slices`.
    """
    return without_copies([piece for header in headers for piece in parse_slices(header, path)])


def assembled(path: Path, slices: Sequence[Slice], resample_slices: bool = False) -> Series:
    """Return the slices of one volume, sorted, and their grid.

    Raises:
        DataError: they make no grid, or too large a one.
    """
    if len(slices) < 2:
        where = "give the folder that holds the series, if there is more of it" if path.is_file() else ""
        raise DataError(
            f"{path}: a series of one slice. Expected at least two: their distance is known from their positions only. "
            f"Check that the series is whole{where and '; ' + where}.",
            code="not_3d",
        )
    _require_alike(path, slices)
    height, width = slices[0].shape
    count = len(slices) * height * width * slices[0].encoding.dtype.itemsize
    if count > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{path}: {len(slices)} slices of {height} x {width} voxels, {count / 2**30:.0f} GiB. Expected at most "
            f"{MAX_UNPACKED_BYTES >> 30} GiB. Is the header damaged?",
            code="too_large",
        )
    return _sorted(path, slices, resample_slices)


def _part(path: Path, slices: Sequence[Slice], uid: str, number: int | None) -> Part:
    parts = parts_of(slices)
    if number is not None:
        if 1 <= number <= len(parts):
            return parts[number - 1]
        raise DataError(
            f"{path}: no volume {number} in series {uid}. There are {len(parts)}: {listed(parts, uid)}. Name one of "
            "them.",
            code="several_series",
        )
    if len(parts) < 2:
        return parts[0]
    same = None if "stack" in parts[0].name else slice_stack.repeated(_ordered(slices)[1])
    what = f"{len(parts)} volumes under one series" if same is None else same.message
    raise DataError(
        f"{path}: {what}{_what_varies(slices)}. Expected one slice per place. Name one of the volumes: "
        f"{listed(parts, uid)}: --series-uid, in Python read_volume(path, series_uid=...).",
        code="several_series" if same is None else same.code,
    )


def _chosen(path: Path, found: dict[str, list[ImageHeader]], series_uid: str | None) -> str:
    if series_uid is not None:
        numbered = [uid for uid, images in found.items() if _is_series(images[0], series_uid)]
        if series_uid in found or len(numbered) == 1:
            return series_uid if series_uid in found else numbered[0]
        raise DataError(
            f"{path}: {'several' if numbered else 'no'} series {series_uid}. There are: {_listed(found)}. Name one of "
            "them.",
            code="several_series",
        )
    # Screenshots and the like say nothing of a place, and are no reason to refuse the scan beside them.
    placed = {uid for uid, images in found.items() if any(header.has_place for header in images)}
    scans = {uid for uid in placed if any(header.kind == "scan" for header in found[uid])}
    candidates = scans or placed or set(found)
    if len(candidates) > 1:
        raise DataError(
            f"{path}: {len(candidates)} series: {_listed({uid: found[uid] for uid in sorted(candidates)})}. Expected "
            "one. Give the folder of one, or its UID: --series-uid, in Python read_volume(path, series_uid=...).",
            code="several_series",
        )
    return candidates.pop()


def _is_series(header: ImageHeader, asked: str) -> bool:
    return asked in (header.series_uid, str(header.tags.get("SeriesNumber")))


def _listed(found: dict[str, list[ImageHeader]]) -> str:
    texts = []
    for uid, images in found.items():
        (height, width), modality = images[0].shape, images[0].modality
        count = sum(header.frames for header in images)
        texts.append(f"{modality}, {count} images of {height} x {width} ({uid})")
    return "; ".join(texts[:8]) + (f"; and {len(texts) - 8} more" if len(texts) > 8 else "")


def without_copies(slices: Sequence[Slice]) -> list[Slice]:
    """Return the slices without those whose file is, byte for byte, a copy of another's."""
    places: dict[tuple[str, int], list[Slice]] = {}
    for piece in slices:
        places.setdefault((piece.instance, piece.frame), []).append(piece)
    kept: set[str] = set()
    digests: dict[str, str] = {}
    result = []
    for piece in slices:
        alike = places[piece.instance, piece.frame]
        if len(alike) > 1 and piece.instance:
            name = piece.member.name
            if name not in digests:
                digests[name] = _digest(piece.member)
            key = f"{digests[name]} {piece.frame}"
            if key in kept:
                continue
            kept.add(key)
        result.append(piece)
    return result


def _digest(member: Member) -> str:
    digest = hashlib.sha256()
    with member.open() as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


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


def _ordered(slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], SliceStack]:
    first = slices[0]
    positions = np.stack([piece.position_mm for piece in slices])
    normal = slice_stack.normal_of(first.row, first.column)
    order = np.argsort(positions @ normal, kind="stable")
    stack = SliceStack(positions[order], first.row, first.column, first.spacing_mm, first.shape)
    return tuple(slices[index] for index in order), stack


def _sorted(path: Path, slices: Sequence[Slice], resample_slices: bool) -> Series:
    ordered, stack = _ordered(slices)
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
