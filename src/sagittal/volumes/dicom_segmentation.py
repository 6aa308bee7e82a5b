"""Label maps as DICOM Segmentation objects, binary or label map, on the planes of the source series.

    binary      one bit per voxel, a frame per segment and plane that it is in; segments may overlap
    labelmap    one number per voxel, a frame per plane; the segment's number is the label's value (PS3.3, 2024d)

Written by pydicom alone: highdicom, with which the result is read back in the tests, refers to one multi-frame file at
the most and needs the volume once per segment where segments overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Integer

from sagittal.errors import DataError
from sagittal.volumes.dicom_codes import Code, Concept, told
from sagittal.volumes.dicom_library import library
from sagittal.volumes.dicom_objects import (
    MAKER,
    RESEARCH_USE,
    Origin,
    Segment,
    coded,
    digest_of,
    item,
    lab_of,
    new_object,
    number_text,
    present,
    save,
    uid_of,
)
from sagittal.volumes.dicom_source import DicomSource, SourceFrame, planes_of
from sagittal.volumes.volume import Volume

SegKind = Literal["binary", "labelmap"]
CLASSES = {"binary": "1.2.840.10008.5.1.4.1.1.66.4", "labelmap": "1.2.840.10008.5.1.4.1.1.66.7"}
_SERIES_NUMBERS = {"binary": 9001, "labelmap": 9002}
_SEGMENTATION = Code("113076", "DCM", "Segmentation")
_SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")
_BACKGROUND = Code("125040", "DCM", "Background")
_ALGORITHM = Code("123110", "DCM", "Artificial Intelligence")
_MAX_NUMBER = 65535
_BITS = 8


def write_dicom_seg(
    labels: Volume,
    segments: Sequence[Segment],
    source: DicomSource,
    path: Path,
    *,
    kind: SegKind = "binary",
    origin: Origin = Origin(),  # noqa: B008 - frozen
    nearest: bool = False,
) -> Path:
    """Write a label map as a DICOM Segmentation.

    Segments that are nowhere are left out; where none is anywhere, all are described and have an empty frame.

    Args:
        labels: of one channel, on the source's grid in any order of axes.
        segments: what its values mean.
        source: the series that it was made from.
        path: file to write.
        kind: binary or labelmap.
        origin: what made the labels.
        nearest: resample labels of another grid.

    Raises:
        DataError: as `planes_of`; or segments overlap, which a label map can't hold.
        ResourceError: the file can't be written.
    """
    if kind == "labelmap":
        require_apart(segments, path)
    planes = planes_of(labels, source, path.name, nearest=nearest)
    values = present(planes)
    found = [segment for segment in segments if values.intersection(segment.values)]
    numbered = _numbered(found or segments, kind)
    made = new_object(
        source,
        CLASSES[kind],
        "SEG",
        digest_of(planes, segments, origin) + source.series_uid,
        f"{MAKER} segmentation, for research use",
        _SERIES_NUMBERS[kind],
    )
    _describe(made, numbered, source, kind, origin)
    made.SegmentsOverlap = "YES" if _overlap(segments) else "NO"
    if kind == "binary":
        frames = [
            (number, index)
            for number, segment in numbered.items()
            for index, plane in enumerate(planes)
            if (segment.mask(plane).any() if found else index == 0)
        ]
        _add_bits(made, (numbered[number].mask(planes[index]) for number, index in frames), source)
    else:
        frames = [(0, index) for index, plane in enumerate(planes) if plane.any()] or [(0, 0)]
        _add_numbers(made, planes, [index for _, index in frames], numbered)
    _add_places(made, frames, source, kind)
    return save(made, path)


def require_apart(segments: Sequence[Segment], what: object) -> None:
    """Refuse segments that share a value of the label map.

    Raises:
        DataError: with the two names.
    """
    both = _overlap(segments)
    if both:
        raise DataError(
            f"{what}: '{both[0].name}' and '{both[1].name}' overlap, which a label map can't hold. Ask for a binary "
            "segmentation (seg).",
            code="options",
        )


def _overlap(segments: Sequence[Segment]) -> tuple[Segment, Segment] | None:
    pairs = combinations(segments, 2)
    return next((pair for pair in pairs if set(pair[0].values) & set(pair[1].values)), None)


def _numbered(segments: Sequence[Segment], kind: SegKind) -> dict[int, Segment]:
    """Return the segments by number: 1, 2, ... or, for a label map that allows it, the labels' own values."""
    values = [segment.values[0] for segment in segments]
    own = all(len(segment.values) == 1 for segment in segments) and all(1 <= value <= _MAX_NUMBER for value in values)
    if kind == "labelmap" and own:
        return dict(sorted(zip(values, segments, strict=True)))
    return dict(enumerate(segments, start=1))


def _describe(made: Any, numbered: dict[int, Segment], source: DicomSource, kind: SegKind, origin: Origin) -> None:
    path = source.path
    made.FrameOfReferenceUID = source.frame_of_reference_uid
    made.PositionReferenceIndicator = str(source.tags.get("PositionReferenceIndicator") or "")
    made.DeviceSerialNumber = told(origin.model_version, 64)
    made.ImageType = ["DERIVED", "PRIMARY"]
    made.ContentDate, made.ContentTime = made.SeriesDate, made.SeriesTime
    made.ContentLabel, made.ContentDescription = "SEGMENTATION", RESEARCH_USE
    made.ContentCreatorName = f"{MAKER}^"
    made.LossyImageCompression = "00"
    if str(source.tags.get("LossyImageCompression") or "") == "01":
        made.LossyImageCompression = "01"
        for name in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if source.tags.get(name) is not None:
                setattr(made, name, source.tags.get(name))
    made.SegmentationType = kind.upper()
    items = [_segment_item(path, number, segment, origin) for number, segment in numbered.items()]
    if kind == "labelmap":
        background = Concept(_BACKGROUND, _BACKGROUND)
        items.insert(0, _segment_item(path, 0, Segment("Background", (0,), background, (0, 0, 0)), origin))
        made.PixelPaddingValue = 0
    made.SegmentSequence = items
    referenced = item(path, SeriesInstanceUID=source.series_uid)
    referenced.ReferencedInstanceSequence = [
        item(path, ReferencedSOPClassUID=frames[0].class_uid, ReferencedSOPInstanceUID=uid)
        for uid, frames in source.instances.items()
    ]
    made.ReferencedSeriesSequence = [referenced]


def _segment_item(path: Path, number: int, segment: Segment, origin: Origin) -> Any:
    concept = segment.concept
    made = item(
        path,
        SegmentNumber=number,
        SegmentLabel=told(segment.name, 64),
        SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=told(origin.model, 64),
        SegmentedPropertyCategoryCodeSequence=[coded(path, concept.category)],
        SegmentedPropertyTypeCodeSequence=[coded(path, concept.kind)],
        RecommendedDisplayCIELabValue=lab_of(segment.colour),
    )
    if number:
        algorithm = item(path, AlgorithmFamilyCodeSequence=[coded(path, _ALGORITHM)])
        algorithm.AlgorithmName, algorithm.AlgorithmVersion = told(origin.model, 64), told(origin.model_version, 64)
        made.SegmentationAlgorithmIdentificationSequence = [algorithm]
    if concept.place is not None:
        made.AnatomicRegionSequence = [coded(path, concept.place)]
    if concept.side is not None:
        side = [coded(path, concept.side)]
        if concept.place is None:
            made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = side
        else:
            made.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = side
    return made


def _add_bits(made: Any, masks: Iterator[Bool[np.ndarray, "H W"]], source: DicomSource) -> None:
    made.BitsAllocated = made.BitsStored = 1
    made.HighBit = 0
    # Frames follow each other without a gap; eight of them fill whole bytes whatever their size.
    parts, waiting = [], []
    for mask in masks:
        waiting.append(mask)
        if len(waiting) == _BITS:
            parts.append(np.packbits(np.stack(waiting), bitorder="little").tobytes())
            waiting = []
    if waiting:
        parts.append(np.packbits(np.stack(waiting), bitorder="little").tobytes())
    _add_pixels(made, b"".join(parts), source.stack.shape)


def _add_numbers(
    made: Any, planes: Integer[np.ndarray, "N H W"], indices: Sequence[int], numbered: dict[int, Segment]
) -> None:
    dtype = np.dtype("u1") if max(numbered) < 1 << 8 else np.dtype("<u2")
    made.BitsAllocated = made.BitsStored = 8 * dtype.itemsize
    made.HighBit = made.BitsStored - 1
    parts = []
    for index in indices:
        numbers = np.zeros(planes.shape[1:], dtype)
        for number, segment in numbered.items():
            numbers[segment.mask(planes[index])] = number
        parts.append(numbers.tobytes())
    _add_pixels(made, b"".join(parts), (planes.shape[1], planes.shape[2]))


def _add_pixels(made: Any, content: bytes, shape: tuple[int, int]) -> None:
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.Rows, made.Columns = shape
    made.PixelData = content + b"\0" * (len(content) % 2)
    made["PixelData"].VR = "OW" if made.BitsAllocated > _BITS else "OB"


def _add_places(made: Any, frames: Sequence[tuple[int, int]], source: DicomSource, kind: SegKind) -> None:
    """Add the functional groups and dimensions: which segment each frame is of, where it lies, and what it is from."""
    path, stack = source.path, source.stack
    tag_of = library(path).tag.Tag
    made.NumberOfFrames = len(frames)
    steps = np.diff(stack.heights_mm)
    step = number_text(float(stack.heights_mm[-1]) / len(steps))
    measures = item(path, PixelSpacing=[number_text(value) for value in stack.spacing_mm], SliceThickness=step)
    if source.is_even:
        measures.SpacingBetweenSlices = step
    directions = [number_text(value) for value in (*stack.row, *stack.column)]
    orientation = item(path, ImageOrientationPatient=directions)
    made.SharedFunctionalGroupsSequence = [
        item(path, PixelMeasuresSequence=[measures], PlaneOrientationSequence=[orientation])
    ]
    organization = uid_of(made.SOPInstanceUID, "dimensions")
    made.DimensionOrganizationSequence = [item(path, DimensionOrganizationUID=organization)]
    pointers = [("ImagePositionPatient", "PlanePositionSequence")]
    if kind == "binary":
        pointers.insert(0, ("ReferencedSegmentNumber", "SegmentIdentificationSequence"))
    made.DimensionIndexSequence = [
        item(
            path,
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=tag_of(tag),
            FunctionalGroupPointer=tag_of(group),
            DimensionDescriptionLabel=tag,
        )
        for tag, group in pointers
    ]
    places = {index: place for place, index in enumerate(sorted({index for _, index in frames}), start=1)}
    own = []
    for number, index in frames:
        frame = source.frames[index]
        group = item(
            path,
            FrameContentSequence=[item(path, DimensionIndexValues=_index(number, places[index], kind))],
            PlanePositionSequence=[
                item(path, ImagePositionPatient=[number_text(value) for value in frame.position_mm])
            ],
            DerivationImageSequence=[_derivation(path, frame)],
        )
        if kind == "binary":
            group.SegmentIdentificationSequence = [item(path, ReferencedSegmentNumber=number)]
        own.append(group)
    made.PerFrameFunctionalGroupsSequence = own


def _index(number: int, place: int, kind: SegKind) -> list[int] | int:
    return [number, place] if kind == "binary" else place


def _derivation(path: Path, frame: SourceFrame) -> Any:
    reference = item(path, ReferencedSOPClassUID=frame.class_uid, ReferencedSOPInstanceUID=frame.instance_uid)
    if frame.number is not None:
        reference.ReferencedFrameNumber = frame.number
    reference.SpatialLocationsPreserved = "YES"
    reference.PurposeOfReferenceCodeSequence = [coded(path, _SOURCE_IMAGE)]
    return item(path, SourceImageSequence=[reference], DerivationCodeSequence=[coded(path, _SEGMENTATION)])
