from __future__ import annotations

import sys
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_scans import SECRET, write_enhanced
from dicom_targets import SPEC, STUDY, labels_of, require_valid, scan_of, whole, written_series

from sagittal.errors import DataError
from sagittal.volumes.dicom_objects import Origin, segments_of
from sagittal.volumes.dicom_overview import write_overview
from sagittal.volumes.dicom_segmentation import write_dicom_seg
from sagittal.volumes.dicom_source import read_source
from sagittal.volumes.dicom_volumes import write_volumes_sr

SEGMENTS = segments_of(SPEC)
VOLUMES_ML = {"liver": 1523.456789, "liver tumor": 3.5, "kidney_left": 0.25, "Knöchel": 0.0}


@pytest.fixture
def source(tmp_path):
    return read_source(written_series(tmp_path / "series", scan_of("oblique"), modality="CT"))


def groups_of(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return highdicom.sr.srread(path).content.get_image_measurement_groups(), highdicom.sr.srread(path)


def test_the_report_tells_volume_and_code_of_every_segment(tmp_path, source):
    path = write_volumes_sr(VOLUMES_ML, SEGMENTS, source, tmp_path / "sr.dcm", origin=Origin("a model", "4f2a"))
    require_valid(path)
    groups, report = groups_of(path)
    assert report.StudyInstanceUID == STUDY and str(report.PatientName) == f"{SECRET}^NAME"
    told = {}
    for group in groups:
        (measurement,) = group.get_measurements(name=pydicom.sr.codedict.codes.SCT.Volume)
        told[group.tracking_identifier] = measurement.value
        assert measurement.unit.value == "mL"
    assert told == VOLUMES_ML
    assert [group.finding_type.value for group in groups][:2] == ["10200004", "108369006"]
    assert [site.value.value for site in groups[1].finding_sites] == ["10200004"]
    assert "research use" in str(pydicom.dcmread(path))


def test_the_report_refers_to_segments_where_there_is_a_segmentation(tmp_path, source):
    seg = write_dicom_seg(labels_of(scan_of("oblique")), SEGMENTS, source, tmp_path / "seg.dcm")
    path = write_volumes_sr(VOLUMES_ML, SEGMENTS, source, tmp_path / "sr.dcm", segmentation=seg)
    require_valid(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = highdicom.sr.srread(path).content
        groups = content.get_volumetric_roi_measurement_groups()
    uid = pydicom.dcmread(seg).SOPInstanceUID
    found = {group.tracking_identifier: group.referenced_segment.referenced_segment_numbers for group in groups}
    assert found == {"liver": [1], "liver tumor": [2], "kidney_left": [3]}
    assert {group.referenced_segment.referenced_sop_instance_uid for group in groups} == {uid}
    assert len(content.get_image_measurement_groups()) == 1


def test_frames_of_enhanced_files_can_be_measured(tmp_path):
    scan = scan_of("axial")
    source = read_source(write_enhanced(tmp_path / "scan.dcm", scan, change=lambda data: whole(data, 0)))
    require_valid(write_volumes_sr(VOLUMES_ML, SEGMENTS, source, tmp_path / "sr.dcm"))


def test_reports_need_highdicom(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DataError, match=r"needs highdicom, .*pip install 'sagittal\[dicom\]'"):
        write_volumes_sr(VOLUMES_ML, SEGMENTS, source, tmp_path / "sr.dcm")


def test_an_overview_holds_the_picture(tmp_path, source):
    picture = np.random.default_rng(1).integers(0, 255, (13, 17, 3)).astype(np.uint8)
    path = write_overview(picture, source, tmp_path / "overview.dcm")
    require_valid(path)
    data = pydicom.dcmread(path)
    assert np.array_equal(data.pixel_array, picture)
    assert (data.Modality, data.StudyInstanceUID, data.BurnedInAnnotation) == ("OT", STUDY, "NO")
    with pytest.raises(DataError, match=r"Expected \(H, W, 3\)"):
        write_overview(picture[..., 0], source, path)
