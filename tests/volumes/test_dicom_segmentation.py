from __future__ import annotations

import logging
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_scans import LPS, SECRET, SERIES, write_enhanced
from dicom_targets import (
    FRAME_OF_REFERENCE,
    ORIENTATIONS,
    REGIONS,
    SPEC,
    STUDY,
    frame_points,
    labels_of,
    require_valid,
    scan_of,
    sorted_ras,
    whole,
    world_voxels,
    written_series,
)
from PIL import Image, ImageCms

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.dicom_objects import Origin, lab_of, segments_of
from sagittal.volumes.dicom_segmentation import write_dicom_seg
from sagittal.volumes.dicom_source import read_source

SEGMENTS = segments_of(SPEC)
LABELMAP_UNKNOWN = "Information Object Not found|SegmentNumber not monotonically increasing"
"""What dciodvfy of 2022 says of label maps, which came into the standard in 2024."""


def points_by_hand(path) -> dict[str, np.ndarray]:
    """Return the voxels of each segment in the world, read with nothing but pydicom's parser."""
    data = pydicom.dcmread(path)
    count = data.Rows * data.Columns
    labels = {int(item.SegmentNumber): item.SegmentLabel for item in data.SegmentSequence}
    found: dict[str, list[np.ndarray]] = {}
    bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")
    for index, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        if data.SegmentationType == "BINARY":
            plane = bits[index * count : (index + 1) * count].reshape(data.Rows, data.Columns)
            number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            found.setdefault(labels[number], []).append(frame_points(data, plane, position))
        else:
            dtype = np.uint8 if data.BitsAllocated == 8 else np.dtype("<u2")
            plane = np.frombuffer(data.PixelData, dtype)[index * count : (index + 1) * count]
            for number in np.unique(plane[plane > 0]):
                mask = (plane == number).reshape(data.Rows, data.Columns)
                found.setdefault(labels[int(number)], []).append(frame_points(data, mask, position))
    return {name: sorted_ras(np.concatenate(parts)) for name, parts in found.items()}


def points_by_highdicom(path) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.segread(path)
        found = {}
        for number in seg.segment_numbers:
            volume = seg.get_volume(segment_numbers=[number], combine_segments=True, relabel=True)
            affine = np.diag([*LPS, 1.0]) @ volume.affine
            found[seg.get_segment_description(number).segment_label] = world_voxels(volume.array > 0, affine)
    return found


def require_same(found: dict[str, np.ndarray], labels: Volume, spec=SPEC) -> None:
    expected = {}
    for label in spec.labels:
        mask = np.isin(labels.array[0], label.values)
        if mask.any():
            expected[label.name] = world_voxels(mask, labels.affine)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert points.shape == found[name].shape, name
        assert np.allclose(points, found[name], atol=0.02), name


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_voxel_lies_where_the_label_map_has_it(tmp_path, orientation):
    scan = scan_of(orientation)
    series, labels = written_series(tmp_path / "series", scan), labels_of(scan)
    source = read_source(series)
    for kind in ("binary", "labelmap"):
        path = write_dicom_seg(labels, SEGMENTS, source, tmp_path / f"{kind}.dcm", kind=kind)
        require_same(points_by_hand(path), labels)
        require_same(points_by_highdicom(path), labels)
        data = pydicom.dcmread(path)
        assert (data.StudyInstanceUID, data.FrameOfReferenceUID) == (STUDY, FRAME_OF_REFERENCE)
        positions = {
            header.SOPInstanceUID: np.array(header.ImagePositionPatient, float)
            for header in map(pydicom.dcmread, series.iterdir())
        }
        for group in data.PerFrameFunctionalGroupsSequence:
            (reference,) = group.DerivationImageSequence[0].SourceImageSequence
            place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
            assert np.allclose(positions[reference.ReferencedSOPInstanceUID], place, atol=1e-6)
        referenced = data.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        assert {item.ReferencedSOPInstanceUID for item in referenced} == set(positions)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_the_standard_has_nothing_against_them(tmp_path, kind):
    scan = scan_of("oblique")
    source = read_source(written_series(tmp_path / "series", scan, modality="CT"))
    but = LABELMAP_UNKNOWN if kind == "labelmap" else "(?!)"
    for name, labels in (("some", labels_of(scan)), ("none", scan.with_array(np.zeros((1, 6, 11, 9), np.uint8)))):
        path = tmp_path / f"{name}.dcm"
        write_dicom_seg(labels, SEGMENTS, source, path, kind=kind, origin=Origin("a model", "4f2a"))
        require_valid(path, but)


def test_segments_say_what_they_are(tmp_path):
    scan = scan_of("axial")
    source = read_source(written_series(tmp_path / "series", scan))
    segments = segments_of(SPEC, ("#ff0000", "#2f8fe8"))
    path = write_dicom_seg(labels_of(scan), segments, source, tmp_path / "x.dcm", origin=Origin("a model", "4f2a"))
    data = pydicom.dcmread(path)
    # Nothing is an ankle here.
    assert [item.SegmentLabel for item in data.SegmentSequence] == ["liver", "liver tumor", "kidney_left"]
    assert [item.SegmentNumber for item in data.SegmentSequence] == [1, 2, 3]
    liver, tumor, kidney = data.SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert tumor.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Morphologically Abnormal Structure"
    assert tumor.AnatomicRegionSequence[0].CodeValue == "10200004"
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert modifier.CodeMeaning == "Left"
    assert liver.SegmentAlgorithmType == "AUTOMATIC" and liver.SegmentAlgorithmName == "a model"
    assert liver.RecommendedDisplayCIELabValue == lab_of((255, 0, 0))
    assert "research use" in data.ContentDescription
    assert data.SegmentsOverlap == "NO"
    assert str(data.PatientName) == f"{SECRET}^NAME" and data.PatientSex == "F" and data.PatientAge == "050Y"


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (47, 143, 232), (20, 168, 126)])
def test_colours_are_those_of_a_colour_management_system(colour):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (1, 1), colour), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert np.abs(np.array(lab_of(colour)) / 257 - lab.getpixel((0, 0))).max() < 1


def test_regions_may_overlap_in_bits_and_not_in_numbers(tmp_path):
    scan = scan_of("coronal")
    source, labels = read_source(written_series(tmp_path / "series", scan)), labels_of(scan)
    path = write_dicom_seg(labels, segments_of(REGIONS), source, tmp_path / "x.dcm")
    require_same(points_by_hand(path), labels, REGIONS)
    assert pydicom.dcmread(path).SegmentsOverlap == "YES"
    require_valid(path)
    with pytest.raises(DataError, match="'whole tumor' and 'tumor core' overlap"):
        write_dicom_seg(labels, segments_of(REGIONS), source, tmp_path / "y.dcm", kind="labelmap")
    assert not (tmp_path / "y.dcm").exists()


def test_a_label_map_keeps_the_labels_values_where_it_can(tmp_path):
    scan = scan_of("axial")
    source, labels = read_source(written_series(tmp_path / "series", scan)), labels_of(scan)
    path = write_dicom_seg(labels, SEGMENTS, source, tmp_path / "x.dcm", kind="labelmap")
    assert [item.SegmentNumber for item in pydicom.dcmread(path).SegmentSequence] == [0, 1, 2, 5]
    wide = SPEC.replace(labels=(*SPEC.labels[:3], SPEC.labels[3].replace(name="ankle", values=(300,))))
    array = labels.array.astype(np.uint16)
    array[array == 5] = 300
    path = write_dicom_seg(labels.with_array(array), segments_of(wide), source, path, kind="labelmap")
    assert pydicom.dcmread(path).BitsAllocated == 16
    require_same(points_by_hand(path), labels.with_array(array), wide)
    negative = SPEC.replace(label_map=((5, -7),))
    array = labels.array.astype(np.int32)
    array[array == 5] = -7
    path = write_dicom_seg(labels.with_array(array), segments_of(negative), source, path, kind="labelmap")
    require_same(points_by_hand(path), labels)


def test_frames_of_enhanced_files_are_referred_to_by_number(tmp_path):
    scan = scan_of("oblique")
    echoes = Volume(np.concatenate([scan.array, scan.array + 1]), scan.affine)

    def complete(data):
        whole(data, 0)

    path = write_enhanced(tmp_path / "scan.dcm", echoes, modality="MR", values={"echo": [10, 80]}, change=complete)
    source = read_source(path, f"{SERIES}@2")
    labels = labels_of(scan)
    seg = write_dicom_seg(labels, SEGMENTS, source, tmp_path / "seg.dcm")
    require_same(points_by_hand(seg), labels)
    require_valid(seg)
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    for group in pydicom.dcmread(seg).PerFrameFunctionalGroupsSequence:
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        frame = frames[reference.ReferencedFrameNumber - 1]
        assert frame.MREchoSequence[0].EffectiveEchoTime == 80
        place = group.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(np.array(place, float), np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float))


def test_the_same_labels_have_the_same_uids(tmp_path):
    scan = scan_of("axial")
    source = read_source(written_series(tmp_path / "series", scan))
    uids = [
        pydicom.dcmread(write_dicom_seg(labels, SEGMENTS, source, tmp_path / "x.dcm", origin=origin)).SOPInstanceUID
        for labels, origin in (
            (labels_of(scan), Origin()),
            (labels_of(scan), Origin()),
            (labels_of(scan, seed=1), Origin()),
            (labels_of(scan), Origin("another")),
        )
    ]
    assert uids[0] == uids[1] and len(set(uids)) == 3


def test_what_names_the_patient_is_copied_and_never_told(tmp_path, caplog):
    def odd(data, index):
        data.SpecificCharacterSet = "ISO_IR 100"
        data.PatientName = f"{SECRET}^Jürgen"
        for name, kind, value in (("PatientSex", "CS", "Secretsex"), ("PatientBirthDate", "DA", "SECRETDATE")):
            data[name] = pydicom.DataElement(name, kind, value, validation_mode=pydicom.config.IGNORE)

    scan = scan_of("axial")
    series = written_series(tmp_path / "series", scan, change=odd)
    with caplog.at_level(logging.DEBUG):
        path = write_dicom_seg(labels_of(scan), SEGMENTS, read_source(series), tmp_path / "x.dcm")
    assert SECRET not in caplog.text.upper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path)
        assert str(data.PatientName) == f"{SECRET}^Jürgen" and data.SpecificCharacterSet == "ISO_IR 192"
        assert str(data.PatientSex) == "Secretsex"


def test_a_real_series(tmp_path, shared_data):
    series = shared_data / "dicom" / "ProstateX-0001_t2tsetra"
    scan = read_volume(series)
    array = np.zeros(scan.array.shape, np.uint8)
    for value, share in ((1, 60), (2, 90), (5, 99)):
        array[scan.array > np.percentile(scan.array, share)] = value
    name = scan.with_array(array).reoriented().write(tmp_path / "labels.nii.gz")
    read, geometry = read_labels(name)
    labels, source = Volume.on(geometry, read), read_source(series)
    for kind, but in (("binary", "(?!)"), ("labelmap", LABELMAP_UNKNOWN)):
        path = write_dicom_seg(labels, SEGMENTS, source, tmp_path / f"{kind}.dcm", kind=kind)
        require_same(points_by_highdicom(path), labels)
        require_valid(path, but)
