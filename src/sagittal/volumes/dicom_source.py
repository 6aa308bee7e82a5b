"""The series that new DICOM objects refer to: whose it is, what its images are called and where each of them lies.

    frames     the images in the order that `read_dicom` has them, however the files are named or numbered
    planes     a label map as one plane per frame; which plane belongs to which frame is found by geometry alone

Tags that name the patient pass through here into objects of the same patient, and into no message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.volumes import slice_stack
from sagittal.volumes.dicom import opened_series
from sagittal.volumes.dicom_enhanced import is_enhanced
from sagittal.volumes.dicom_headers import Slice, class_name, read_tags
from sagittal.volumes.dicom_library import quiet
from sagittal.volumes.geometry import (
    Geometry,
    Reorientation,
    affine_from_lps,
    describe,
    differences,
    lps_to_ras,
)
from sagittal.volumes.slice_stack import SliceStack
from sagittal.volumes.volume import Volume

REFERENCES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
PATIENT = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "EthnicGroup"),
    *("PatientSpeciesDescription", "PatientIdentityRemoved", "DeidentificationMethod"),
    "DeidentificationMethodCodeSequence",
)
STUDY = (
    *("StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName"),
    *("PatientAge", "PatientSize", "PatientWeight"),
)
_OF_SERIES = (
    *("SpecificCharacterSet", "Modality", "SeriesNumber", "SeriesDate", "SeriesTime", "PositionReferenceIndicator"),
    *("SliceThickness", "PatientPosition", "BodyPartExamined"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
_WANTED = (*REFERENCES, "NumberOfFrames", *PATIENT, *STUDY, *_OF_SERIES)
_WHOLE_VOX = 0.02
"""How far the steps between two grids may be from whole ones before one is no turned copy of the other."""


@dataclass(frozen=True, eq=False)
class SourceFrame:
    """One image of the series.

    Attributes:
        class_uid: kind of its file.
        instance_uid: its file.
        number: of the frame in its file, from 1; None where the file holds one image.
        position_mm: (3,), centre of the first voxel, LPS.
    """

    class_uid: str
    instance_uid: str
    number: int | None
    position_mm: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DicomSource:
    """One volume of a study, without its voxels.

    Attributes:
        path: where it was read from.
        frames: its images, sorted along their normal.
        stack: where they lie; row, column and spacing are those of every frame.
        is_even: whether they make a regular grid; False: a gap, mixed spacings or a gantry tilt.
        tags: pydicom's data set of what the first image says of patient, study and series.
    """

    path: Path
    frames: tuple[SourceFrame, ...]
    stack: SliceStack
    is_even: bool
    tags: Any = field(repr=False)

    @property
    def study_uid(self) -> str:
        """The study's UID."""
        return str(self.tags.StudyInstanceUID)

    @property
    def series_uid(self) -> str:
        """The series' UID."""
        return str(self.tags.SeriesInstanceUID)

    @property
    def frame_of_reference_uid(self) -> str:
        """UID of the coordinates that positions are in."""
        return str(self.tags.FrameOfReferenceUID)

    @property
    def modality(self) -> str:
        """CT, MR and so on."""
        return str(self.tags.get("Modality") or "OT")[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return len(self.frames), *self.stack.shape

    @property
    def geometry(self) -> Geometry:
        """The grid that the frames make; only where they are even."""
        return Geometry(self.shape, affine_from_lps(self.stack.axes, self.stack.positions_mm[0]))

    @property
    def instances(self) -> dict[str, tuple[SourceFrame, ...]]:
        """The frames by the file that they stand in."""
        found: dict[str, list[SourceFrame]] = {}
        for frame in self.frames:
            found.setdefault(frame.instance_uid, []).append(frame)
        return {uid: tuple(frames) for uid, frames in found.items()}


def read_source(path: Path, series_uid: str | None = None) -> DicomSource:
    """Read the headers of a series that new objects are to refer to; slices with a gap or a tilt are taken too.

    Args:
        path: a folder, zip archive, DICOMDIR or file of many frames; `STUDY#UID` names one of its series.
        series_uid: as for `read_dicom`.

    Raises:
        DataError: as `read_dicom`, save for gaps, mixed spacings and tilts; or the headers lack a UID that has to be
            referred to, or name several studies or frames of reference.
    """
    with opened_series(path, resample_slices=True, series_uid=series_uid) as series:
        headers: dict[str, Any] = {}
        for piece in series.slices:
            if piece.member.name not in headers:
                headers[piece.member.name] = read_tags(piece.member, series.path, _WANTED)
        with quiet(series.slices[0].member.name, series.path):
            _require_whole(series.path, list(headers.values()))
            frames = tuple(_frame(piece, headers[piece.member.name], series.path) for piece in series.slices)
            first = headers[series.slices[0].member.name]
            for element in first:
                # Now, not when it is written: what can't be decoded is the source's fault, and is told without a quote.
                str(element.value)
            return DicomSource(series.path, frames, series.stack, not series.is_resampled, first)


def planes_of(
    labels: Volume, source: DicomSource, what: str = "the label map", *, nearest: bool = False
) -> Integer[np.ndarray, "N H W"]:
    """Return a label map as one plane per frame of the source, in the order of its frames.

    Axes may be permuted and reversed: where a voxel lies decides. No voxel is copied where the grids are the same.

    Args:
        labels: of one channel.
        source: the series.
        what: what the labels are called in messages.
        nearest: take the nearest voxel's label where the grids differ, 0 outside of the label map.

    Raises:
        DataError: the grids differ, and `nearest` was not asked for; or the label map says nothing of its place.
    """
    if labels.array.shape[0] != 1 or labels.array.dtype.kind not in "iu":
        raise DataError(f"{what}: {labels.array.shape[0]} channels of {labels.array.dtype}. Expected one of integers.")
    if not labels.geometry.has_world:
        raise DataError(
            f"{what}: says nothing of where it lies (a NIfTI without qform and sform). Expected the place of "
            f"{source.path}. Predict from the DICOM series itself.",
            code="no_world",
        )
    turned = _turn(labels.geometry, source) if source.is_even else None
    if turned is not None:
        shape, affine = labels.geometry.shape, labels.affine
        moved = Geometry(turned.shape(shape), turned.affine(affine, shape))
        found = differences(moved, source.geometry)
        if not found:
            return turned.apply(labels.array[0])
    if nearest:
        return _nearest(labels, source)
    if not source.is_even:
        told = "; ".join(fault.message for fault in slice_stack.faults(source.stack))
        why = f"the series' slices are no regular grid ({told}), so that no label map can lie on it"
    else:
        told = describe(differences(labels.geometry, source.geometry) if turned is None else found)
        why = f"lies on another grid than the series ({told})"
    raise DataError(
        f"{what}: {why}. Expected the grid of {source.path}. Segment this series, or have the nearest voxels taken: "
        "'sagittal dicom --nearest'.",
        code="other_grid",
    )


def _require_whole(path: Path, headers: Sequence[Any]) -> None:
    for name in REFERENCES:
        values = [str(header.get(name) or "") for header in headers]
        if not all(values):
            raise DataError(
                f"{path}: {values.count('')} of {len(values)} files have no {name}. Expected it: new objects have to "
                "refer to it. Export the series again from the scanner or archive.",
                code="not_referable",
            )
        if name not in REFERENCES[:2] and len(set(values)) > 1:
            raise DataError(
                f"{path}: {len(set(values))} values of {name} in one series. Expected one. Keep the files of one scan.",
                code="mixed_slices",
            )


def _frame(piece: Slice, header: Any, path: Path) -> SourceFrame:
    many = is_enhanced(class_name(header, path) or "") or int(header.get("NumberOfFrames") or 1) > 1
    number = piece.frame + 1 if many else None
    return SourceFrame(str(header.SOPClassUID), str(header.SOPInstanceUID), number, piece.position_mm)


def _turn(labels: Geometry, source: DicomSource) -> Reorientation | None:
    """Return the change of axes that brings the labels' order into that of the frames; None where there is none."""
    steps = np.linalg.inv(labels.affine[:3, :3]) @ source.geometry.affine[:3, :3]
    whole = np.rint(steps)
    if np.abs(steps - whole).max() > _WHOLE_VOX or not np.array_equal(np.abs(whole).sum(axis=0), (1, 1, 1)):
        return None
    axes = np.abs(whole).argmax(axis=0)
    if sorted(axes.tolist()) != [0, 1, 2]:
        return None
    flips = [bool(whole[axis, target] < 0) for target, axis in enumerate(axes)]
    return Reorientation((int(axes[0]), int(axes[1]), int(axes[2])), (flips[0], flips[1], flips[2]))


def _nearest(labels: Volume, source: DicomSource) -> Integer[np.ndarray, "N H W"]:
    """Return at each voxel of the frames the label of the voxel that it lies in."""
    voxels, stack = labels.array[0], source.stack
    to_index = np.linalg.inv(labels.affine)
    rows = to_index[:3, :3] @ lps_to_ras(stack.column * stack.spacing_mm[0])
    columns = to_index[:3, :3] @ lps_to_ras(stack.row * stack.spacing_mm[1])
    height, width = stack.shape
    planes = np.zeros(source.shape, voxels.dtype)
    for plane, frame in zip(planes, source.frames, strict=True):
        first = to_index[:3, :3] @ lps_to_ras(frame.position_mm) + to_index[:3, 3]
        inside, places = np.ones((height, width), bool), []
        for axis, length in enumerate(voxels.shape):
            along = first[axis] + rows[axis] * np.arange(height)[:, None] + columns[axis] * np.arange(width)[None]
            index = np.floor(along + 0.5).astype(np.int64)
            inside &= (index >= 0) & (index < length)
            places.append(np.clip(index, 0, length - 1))
        plane[inside] = voxels[places[0][inside], places[1][inside], places[2][inside]]
    return planes
