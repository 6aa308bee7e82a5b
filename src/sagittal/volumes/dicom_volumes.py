"""The volumes of segments as a DICOM structured report (TID 1500), each with its code and what was measured.

A measurement group refers to the segment of a DICOM Segmentation where one is given, else to the source series.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagittal.volumes.dicom_codes import Code, Concept, told
from sagittal.volumes.dicom_library import library
from sagittal.volumes.dicom_objects import (
    MAKER,
    RESEARCH_USE,
    Origin,
    Segment,
    copy_identity,
    save,
    software_version,
    uid_of,
    writing_library,
)
from sagittal.volumes.dicom_source import DicomSource

CLASS = "1.2.840.10008.5.1.4.1.1.88.33"
_SERIES_NUMBER = 9005
_VOLUME = Code("118565006", "SCT", "Volume")
_MILLILITRE = Code("mL", "UCUM", "mL")
_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")
_DIGITS = 6
"""Of a volume: to a thousandth of a cubic millimetre."""


def write_volumes_sr(
    volumes_ml: Mapping[str, float],
    segments: Sequence[Segment],
    source: DicomSource,
    path: Path,
    *,
    origin: Origin = Origin(),  # noqa: B008 - frozen
    segmentation: Path | None = None,
) -> Path:
    """Write the volume of each segment in mL, those that were not found with 0, as a Comprehensive SR.

    Args:
        volumes_ml: by the segment's name.
        segments: what was segmented; those without a volume are left out.
        source: the series that was measured.
        path: file to write.
        origin: what made the labels.
        segmentation: a DICOM Segmentation with these segments, which is then referred to.

    Raises:
        DataError: highdicom is not installed.
        ResourceError: the file can't be written.
    """
    highdicom = writing_library(path)
    referenced = None if segmentation is None else library(path).dcmread(segmentation, stop_before_pixels=True)
    listed = [segment for segment in segments if segment.name in volumes_ml]
    seed = hashlib.sha256(repr((sorted(volumes_ml.items()), listed, origin)).encode()).hexdigest() + source.series_uid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = [
            _group(highdicom, segment, volumes_ml[segment.name], source, referenced, origin, seed) for segment in listed
        ]
        report = highdicom.sr.MeasurementReport(
            observation_context=_observer(highdicom, origin),
            procedure_reported=_coded(highdicom, _PROCEDURE),
            imaging_measurements=groups,
            title=highdicom.sr.CodedConcept("126000", "DCM", "Imaging Measurement Report"),
        )
        made = highdicom.sr.ComprehensiveSR(
            evidence=_evidence(source, referenced),
            content=report[0],
            series_instance_uid=uid_of(seed, CLASS, "series"),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=uid_of(seed, CLASS, "instance"),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=software_version(),
            series_description=f"{MAKER} volumes, for research use",
            is_complete=True,
        )
    made.PreliminaryFlag = "PRELIMINARY"
    made.SeriesDate, made.SeriesTime = made.ContentDate, made.ContentTime
    copy_identity(source, made)
    return save(made, path)


def _observer(highdicom: Any, origin: Origin) -> Any:
    device = highdicom.sr.DeviceObserverIdentifyingAttributes(
        uid=uid_of(MAKER, origin.model, origin.model_version),
        name=told(origin.model, 64),
        manufacturer_name=MAKER,
        model_name=MAKER,
        serial_number=told(origin.model_version, 64),
    )
    context = highdicom.sr.ObserverContext(
        observer_type=highdicom.sr.CodedConcept("121007", "DCM", "Device"), observer_identifying_attributes=device
    )
    return highdicom.sr.ObservationContext(observer_device_context=context)


def _group(
    highdicom: Any,
    segment: Segment,
    volume_ml: float,
    source: DicomSource,
    referenced: Any,
    origin: Origin,
    seed: str,
) -> Any:
    sr, concept = highdicom.sr, segment.concept
    measured = sr.Measurement(
        name=_coded(highdicom, _VOLUME),
        value=round(float(volume_ml), _DIGITS),
        unit=_coded(highdicom, _MILLILITRE),
    )
    common: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=uid_of(seed, "tracking", segment.name), identifier=told(segment.name, 64)
        ),
        "finding_type": _coded(highdicom, concept.kind),
        "finding_category": _coded(highdicom, concept.category),
        "finding_sites": _sites(highdicom, concept),
        "algorithm_id": sr.AlgorithmIdentification(
            name=told(origin.model, 64), version=told(origin.model_version, 64), parameters=[RESEARCH_USE]
        ),
        "measurements": [measured],
    }
    number = _number_of(segment, referenced)
    if number is None:
        first = source.frames[len(source.frames) // 2]
        image = sr.SourceImageForMeasurementGroup(
            first.class_uid, first.instance_uid, None if first.number is None else [first.number]
        )
        return sr.MeasurementsAndQualitativeEvaluations(source_images=[image], **common)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            referenced.SOPClassUID,
            referenced.SOPInstanceUID,
            number,
            source_series=sr.SourceSeriesForSegmentation(source.series_uid),
        ),
        **common,
    )


def _number_of(segment: Segment, referenced: Any) -> int | None:
    """Return the segment's number in the DICOM Segmentation, None where it has none."""
    items = [] if referenced is None else referenced.SegmentSequence
    label = told(segment.name, 64)
    return next((int(each.SegmentNumber) for each in items if each.SegmentLabel == label and each.SegmentNumber), None)


def _sites(highdicom: Any, concept: Concept) -> list[Any] | None:
    """Return where a finding is: the organ of an abnormality, or what has a side."""
    if concept.place is None and concept.side is None:
        return None
    place = concept.place or concept.kind
    side = None if concept.side is None else _coded(highdicom, concept.side)
    return [highdicom.sr.FindingSite(_coded(highdicom, place), laterality=side)]


def _coded(highdicom: Any, code: Code) -> Any:
    return highdicom.sr.CodedConcept(code.value, code.scheme, told(code.meaning, 64))


def _evidence(source: DicomSource, referenced: Any) -> list[Any]:
    """Return what highdicom asks of the objects that a report refers to, without a word of the patient."""
    dataset = library(source.path).dataset.Dataset
    uids = [(frames[0].class_uid, uid, source.series_uid) for uid, frames in source.instances.items()]
    if referenced is not None:
        uids.append((str(referenced.SOPClassUID), str(referenced.SOPInstanceUID), str(referenced.SeriesInstanceUID)))
    found = []
    for class_uid, uid, series_uid in uids:
        made = dataset()
        made.SOPClassUID, made.SOPInstanceUID = class_uid, uid
        made.StudyInstanceUID, made.SeriesInstanceUID = source.study_uid, series_uid
        made.PatientID = made.PatientName = made.PatientBirthDate = made.PatientSex = ""
        made.StudyDate = made.StudyTime = made.StudyID = made.AccessionNumber = made.ReferringPhysicianName = ""
        found.append(made)
    return found
