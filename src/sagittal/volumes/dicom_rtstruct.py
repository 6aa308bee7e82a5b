"""Label maps as DICOM RT Structure Sets: closed contours on the planes of the source series, for treatment planning.

Each part of a segment in a plane is one contour of type CLOSED_PLANAR; holes are joined to it by a keyhole
(`sagittal.volumes.contours`), which readers understand that know nothing of CLOSEDPLANAR_XOR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer

from sagittal.volumes.contours import outlines
from sagittal.volumes.dicom_codes import ABNORMAL, told
from sagittal.volumes.dicom_library import library
from sagittal.volumes.dicom_objects import (
    MAKER,
    RESEARCH_USE,
    Origin,
    Segment,
    coded,
    digest_of,
    item,
    new_object,
    present,
    save,
)
from sagittal.volumes.dicom_source import DicomSource, SourceFrame, planes_of
from sagittal.volumes.volume import Volume

CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_SERIES_NUMBER = 9003
_DIGITS = 3
"""Decimals of a coordinate in mm for voxels of a millimetre; finer voxels have more."""
_MAX_DIGITS = 7


def write_rtstruct(
    labels: Volume,
    segments: Sequence[Segment],
    source: DicomSource,
    path: Path,
    *,
    origin: Origin = Origin(),  # noqa: B008 - frozen
    nearest: bool = False,
) -> Path:
    """Write a label map as a DICOM RT Structure Set.

    Segments that are nowhere are left out; where none is anywhere, all are named and have no contour.

    Args:
        labels: of one channel, on the source's grid in any order of axes.
        segments: what its values mean; they may overlap.
        source: the series that it was made from.
        path: file to write.
        origin: what made the labels.
        nearest: resample labels of another grid.

    Raises:
        DataError: as `planes_of`.
        ResourceError: the file can't be written.
    """
    planes = planes_of(labels, source, path.name, nearest=nearest)
    values = present(planes)
    shown = [segment for segment in segments if values.intersection(segment.values)] or segments
    seed = digest_of(planes, segments, origin) + source.series_uid
    title = f"{MAKER} contours, for research use"
    made = new_object(source, CLASS, "RTSTRUCT", seed, title, _SERIES_NUMBER)
    made.OperatorsName = ""
    made.StructureSetLabel, made.StructureSetName = MAKER.upper(), told(origin.model, 64)
    made.StructureSetDescription = f"{RESEARCH_USE}. Model {told(origin.model, 64)} {told(origin.model_version, 64)}"
    made.StructureSetDate, made.StructureSetTime = made.SeriesDate, made.SeriesTime
    made.ApprovalStatus = "UNAPPROVED"
    made.FrameOfReferenceUID = source.frame_of_reference_uid
    made.PositionReferenceIndicator = str(source.tags.get("PositionReferenceIndicator") or "")
    made.ReferencedFrameOfReferenceSequence = [_references(source)]
    made.StructureSetROISequence = [
        item(
            path,
            ROINumber=number,
            ReferencedFrameOfReferenceUID=source.frame_of_reference_uid,
            ROIName=told(segment.name, 64),
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIDescription=RESEARCH_USE,
        )
        for number, segment in enumerate(shown, start=1)
    ]
    made.ROIContourSequence = [
        _contours(path, number, segment, planes, source) for number, segment in enumerate(shown, start=1)
    ]
    made.RTROIObservationsSequence = [
        _observation(path, number, segment) for number, segment in enumerate(shown, start=1)
    ]
    return save(made, path)


def _references(source: DicomSource) -> Any:
    path = source.path
    series = item(path, SeriesInstanceUID=source.series_uid)
    series.ContourImageSequence = [_reference(path, frame) for frame in source.frames]
    study = item(path, ReferencedSOPClassUID=_STUDY_CLASS, ReferencedSOPInstanceUID=source.study_uid)
    study.RTReferencedSeriesSequence = [series]
    return item(path, FrameOfReferenceUID=source.frame_of_reference_uid, RTReferencedStudySequence=[study])


def _reference(path: Path, frame: SourceFrame) -> Any:
    made = item(path, ReferencedSOPClassUID=frame.class_uid, ReferencedSOPInstanceUID=frame.instance_uid)
    if frame.number is not None:
        made.ReferencedFrameNumber = frame.number
    return made


def _contours(
    path: Path, number: int, segment: Segment, planes: Integer[np.ndarray, "N H W"], source: DicomSource
) -> Any:
    made = item(path, ROIDisplayColor=[*segment.colour], ReferencedROINumber=number)
    contours: list[Any] = []
    for frame, plane in zip(source.frames, planes, strict=True):
        for polygon in outlines(segment.mask(plane)):
            contour = item(
                path,
                ContourImageSequence=[_reference(path, frame)],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(polygon),
                ContourNumber=len(contours) + 1,
            )
            _add_points(path, contour, polygon, frame, source)
            contours.append(contour)
    if contours:
        made.ContourSequence = contours
    return made


def _add_points(
    path: Path, contour: Any, polygon: Float64[np.ndarray, "points 2"], frame: SourceFrame, source: DicomSource
) -> None:
    """Add the points of a polygon of (column, row), in mm."""
    height_mm, width_mm = source.stack.spacing_mm
    step = np.stack([source.stack.row * width_mm, source.stack.column * height_mm])
    points = frame.position_mm + polygon @ step
    digits = min(_MAX_DIGITS, _DIGITS - min(0, math.floor(math.log10(min(height_mm, width_mm)))))
    text = "\\".join([f"{value:.{digits}f}" for value in points.ravel().tolist()]).encode()
    text += b" " * (len(text) % 2)
    pydicom = library(path)
    tag = pydicom.tag.Tag("ContourData")
    # As it stands in the file: as numbers, millions of them would each be checked and turned into text.
    contour[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(text), text, 0, False, True)


def _observation(path: Path, number: int, segment: Segment) -> Any:
    concept = segment.concept
    kind = coded(path, concept.kind)
    if concept.side is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [coded(path, concept.side)]
    return item(
        path,
        ObservationNumber=number,
        ReferencedROINumber=number,
        ROIObservationLabel=told(segment.name, 16),
        RTROIIdentificationCodeSequence=[kind],
        # What of a tumour is to be treated is for a physician to say.
        RTROIInterpretedType="" if concept.category == ABNORMAL else "ORGAN",
        ROIInterpreter="",
    )
