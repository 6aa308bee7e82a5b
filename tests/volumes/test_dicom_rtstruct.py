from __future__ import annotations

import numpy as np
import pydicom
import pytest
from dicom_scans import LPS, SERIES, write_enhanced
from dicom_targets import (
    FRAME_OF_REFERENCE,
    ORIENTATIONS,
    REGIONS,
    SPEC,
    labels_of,
    require_valid,
    scan_of,
    whole,
    written_series,
)

from sagittal.volumes import Volume, read_volume
from sagittal.volumes.dicom_objects import Origin, segments_of
from sagittal.volumes.dicom_rtstruct import write_rtstruct
from sagittal.volumes.dicom_source import read_source

SEGMENTS = segments_of(SPEC)


def rasterised(path, labels: Volume) -> dict[str, np.ndarray]:
    """Return each structure as a mask on the labels' grid: which voxel centres lie in its contours, in mm and LPS."""
    data = pydicom.dcmread(path)
    names = {int(item.ROINumber): item.ROIName for item in data.StructureSetROISequence}
    shape = labels.geometry.shape
    indices = np.stack(np.indices(shape), axis=-1).reshape(-1, 3)
    centres = (indices @ labels.affine[:3, :3].T + labels.affine[:3, 3]) * LPS
    found = {}
    for item in data.ROIContourSequence:
        mask = np.zeros(len(centres), bool)
        for contour in item.get("ContourSequence", ()):
            points = np.array([float(value) for value in contour.ContourData]).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints and contour.ContourGeometricType == "CLOSED_PLANAR"
            origin = points[0]
            _, _, axes = np.linalg.svd(points - points.mean(axis=0))
            assert np.abs((points - origin) @ axes[2]).max() < 0.01
            near = np.abs((centres - origin) @ axes[2]) < 0.1
            flat, places = (points - origin) @ axes[:2].T, (centres[near] - origin) @ axes[:2].T
            x, y = places.T
            inside = np.zeros(len(places), bool)
            for (x0, y0), (x1, y1) in zip(flat, np.roll(flat, -1, axis=0), strict=True):
                if y0 != y1:
                    inside ^= (min(y0, y1) <= y) & (y < max(y0, y1)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
            mask[near] |= inside
        found[names[int(item.ReferencedROINumber)]] = mask.reshape(shape)
    return found


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_voxel_lies_inside_its_contours(tmp_path, orientation):
    scan = scan_of(orientation)
    series, labels = written_series(tmp_path / "series", scan), labels_of(scan)
    path = write_rtstruct(labels, SEGMENTS, read_source(series), tmp_path / "rt.dcm")
    found = rasterised(path, labels)
    assert list(found) == ["liver", "liver tumor", "kidney_left"]
    for label in SPEC.labels[:3]:
        assert np.array_equal(found[label.name], labels.array[0] == label.values[0]), label.name
    headers = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, series.iterdir())}
    data = pydicom.dcmread(path)
    for item in data.ROIContourSequence:
        for contour in item.ContourSequence:
            header = headers[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            row, column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            first = np.array(contour.ContourData[:3], float) - np.array(header.ImagePositionPatient, float)
            assert abs(first @ np.cross(row, column)) < 0.01
    (reference,) = data.ReferencedFrameOfReferenceSequence
    assert reference.FrameOfReferenceUID == data.FrameOfReferenceUID == FRAME_OF_REFERENCE
    images = reference.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0].ContourImageSequence
    assert {item.ReferencedSOPInstanceUID for item in images} == set(headers)


def test_the_standard_has_nothing_against_it(tmp_path):
    scan = scan_of("oblique")
    source = read_source(written_series(tmp_path / "series", scan))
    for name, labels in (("some", labels_of(scan)), ("none", scan.with_array(np.zeros((1, 6, 11, 9), np.uint8)))):
        path = write_rtstruct(labels, SEGMENTS, source, tmp_path / f"{name}.dcm", origin=Origin("a model", "4f2a"))
        require_valid(path)
    names = [item.ROIName for item in pydicom.dcmread(tmp_path / "none.dcm").StructureSetROISequence]
    assert names == ["liver", "liver tumor", "kidney_left", "Knöchel"]


def test_structures_say_what_they_are(tmp_path):
    scan = scan_of("axial")
    source = read_source(written_series(tmp_path / "series", scan))
    data = pydicom.dcmread(write_rtstruct(labels_of(scan), segments_of(SPEC, ("#2f8fe8",)), source, tmp_path / "x.dcm"))
    liver, tumor, kidney = data.RTROIObservationsSequence
    assert (liver.RTROIInterpretedType, tumor.RTROIInterpretedType) == ("ORGAN", "")
    code = kidney.RTROIIdentificationCodeSequence[0]
    assert (code.CodeValue, code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("64033007", "Left")
    assert data.ROIContourSequence[0].ROIDisplayColor == [0x2F, 0x8F, 0xE8]
    assert "research use" in data.StructureSetDescription and data.ApprovalStatus == "UNAPPROVED"
    assert {item.ROIGenerationAlgorithm for item in data.StructureSetROISequence} == {"AUTOMATIC"}


def test_regions_may_overlap(tmp_path):
    scan = scan_of("sagittal")
    source, labels = read_source(written_series(tmp_path / "series", scan)), labels_of(scan)
    found = rasterised(write_rtstruct(labels, segments_of(REGIONS), source, tmp_path / "x.dcm"), labels)
    for label in REGIONS.labels:
        assert np.array_equal(found[label.name], np.isin(labels.array[0], label.values))


def test_frames_of_enhanced_files_are_referred_to_by_number(tmp_path):
    scan = scan_of("oblique")
    path = write_enhanced(tmp_path / "scan.dcm", scan, change=lambda data: whole(data, 0))
    labels = labels_of(scan)
    rtstruct = write_rtstruct(labels, SEGMENTS, read_source(path), tmp_path / "rt.dcm")
    found = rasterised(rtstruct, labels)
    assert np.array_equal(found["liver"], labels.array[0] == 1)
    require_valid(rtstruct)
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    contour = pydicom.dcmread(rtstruct).ROIContourSequence[0].ContourSequence[0]
    reference = contour.ContourImageSequence[0]
    assert reference.ReferencedSOPInstanceUID == f"{SERIES}.6.1"
    place = np.array(frames[reference.ReferencedFrameNumber - 1].PlanePositionSequence[0].ImagePositionPatient, float)
    normal = np.cross(scan.affine[:3, 2] * LPS, scan.affine[:3, 1] * LPS)
    assert abs((np.array(contour.ContourData[:3], float) - place) @ normal / np.linalg.norm(normal)) < 0.01


def test_fine_voxels_have_finer_coordinates(tmp_path):
    scan = scan_of("oblique")
    fine = Volume(scan.array, scan.affine @ np.diag([0.01, 0.01, 0.01, 1.0]))
    labels = labels_of(fine)
    data = pydicom.dcmread(
        write_rtstruct(labels, SEGMENTS, read_source(written_series(tmp_path / "series", fine)), tmp_path / "x.dcm")
    )
    text = data.ROIContourSequence[0].ContourSequence[0].ContourData[0].original_string
    assert len(text.partition(".")[2]) == 6 and len(text) <= 16


def test_a_real_series(tmp_path, shared_data):
    series = shared_data / "dicom" / "ProstateX-0001_t2tsetra"
    scan = read_volume(series)
    array = np.zeros(scan.array.shape, np.uint8)
    array[:, :3, 40:60, 30:55] = scan.array[:, :3, 40:60, 30:55] > np.median(scan.array)
    labels = scan.with_array(array)
    path = write_rtstruct(labels, SEGMENTS, read_source(series), tmp_path / "rt.dcm")
    assert np.array_equal(rasterised(path, labels)["liver"], array[0] == 1)
    require_valid(path)
