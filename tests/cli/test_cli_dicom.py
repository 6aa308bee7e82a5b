"""`sagittal dicom`, and `sagittal predict --dicom`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

from sagittal.cli import run
from sagittal.volumes import Volume, read_labels, read_volume

KINDS = "seg,labelmap,rtstruct,overview,sr"
LABELS = {"background": 0, "prostate": 1, "lesion X": 2}


@pytest.fixture
def series(shared_data: Path, tmp_path: Path) -> Path:
    """Three even slices of a real series."""
    folder = tmp_path / "T2 axial"
    folder.mkdir()
    (source,) = (shared_data / "dicom" / "ProstateX-missing-slice").glob("*/*/*")
    for number in range(7, 10):
        shutil.copy(source / f"1-{number:02d}.dcm", folder)
    return folder


@pytest.fixture
def labels(series: Path, tmp_path: Path) -> Path:
    """A label map in another order of axes than the series', and what it means."""
    scan = read_volume(series)
    array = np.zeros(scan.array.shape, np.uint8)
    array[0, :, 30:50, 20:40], array[0, 1:, 60:70, 30:42] = 1, 2
    (tmp_path / "maps").mkdir()
    declared = {"labels": LABELS, "codes": {"lesion X": "SCT:52988006:Lesion"}}
    (tmp_path / "maps" / "dataset.json").write_text(json.dumps(declared))
    turned = scan.with_array(array).reoriented()
    return Volume(turned.array[:, :, ::-1], _reversed(turned)).write(tmp_path / "maps" / "case.nii.gz")


def _reversed(volume: Volume) -> np.ndarray:
    affine = volume.affine.copy()
    affine[:3, 3] += (volume.array.shape[2] - 1) * affine[:3, 1]
    affine[:3, 1] *= -1
    return affine


def test_a_label_map_of_any_origin_becomes_dicom(
    series: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["dicom", str(labels), str(series), "--out", str(out), "--as", KINDS]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [str(out / f"case.{kind}.dcm") for kind in KINDS.split(",")]
    patient = {str(pydicom.dcmread(path).PatientID) for path in [*out.iterdir(), *series.iterdir()]}
    assert len(patient) == 1
    seg = pydicom.dcmread(out / "case.seg.dcm")
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["prostate", "lesion X"]
    assert seg.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    array, _ = read_labels(labels)
    assert int(bits.sum()) == int((array > 0).sum())
    assert len(pydicom.dcmread(out / "case.rtstruct.dcm").ROIContourSequence[0].ContourSequence) == 3
    picture = pydicom.dcmread(out / "case.overview.dcm").pixel_array
    assert picture.std() > 10
    assert "prostate" in str(pydicom.dcmread(out / "case.sr.dcm"))


def test_what_does_not_fit_is_refused_in_words(
    series: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert run(["dicom", str(labels), str(series), *out, "--as", "sge"]) == 2
    assert "Did you mean 'seg'?" in capsys.readouterr().err
    assert run(["dicom", str(labels), str(series), *out, "--as", ","]) == 2
    assert "no object is named" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"labels": {"background": 0, "prostate": 1}}))
    assert run(["dicom", str(labels), str(series), *out, "--labels", str(other)]) == 1
    assert "holds 2, which no label has (prostate)" in capsys.readouterr().err
    other.write_text(json.dumps({"labels": {"whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}))
    assert run(["dicom", str(labels), str(series), *out, "--labels", str(other), "--as", "labelmap"]) == 2
    assert "'whole' and 'core' overlap" in capsys.readouterr().err
    for content, told in (("{", "not JSON"), ("[]", "no object"), (None, "can't be read")):
        other.unlink() if content is None else other.write_text(content)
        assert run(["dicom", str(labels), str(series), *out, "--labels", str(other)]) == 1
        assert told in capsys.readouterr().err
    shutil.copy(next(series.iterdir()), series / "case.seg.dcm")
    assert run(["dicom", str(labels), str(series), "--out", str(series)]) == 1
    assert "is a file of the study already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_of_another_grid_need_nearest(
    series: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array, geometry = read_labels(labels)
    part = Volume(array[None, :, 10:], geometry.affine @ _shift(10)).write(labels.with_name("part.nii.gz"))
    command = ["dicom", str(part), str(series), "--out", str(tmp_path / "out"), "--as", "seg,sr"]
    assert run(command) == 1
    assert "lies on another grid than the series (shape" in capsys.readouterr().err
    assert run([*command, "--nearest"]) == 0
    seg = pydicom.dcmread(tmp_path / "out" / "part.seg.dcm")
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    assert int(bits.sum()) == int((array[:, 10:] > 0).sum())


def _shift(rows: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[1, 3] = rows
    return matrix


def test_a_prediction_is_written_as_dicom_beside_its_label_map(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    command = [sys.executable, "-m", "sagittal.testing.bundle", "--network", "segformer3d", "--classes", "2"]
    subprocess.run([*command, "--out", str(bundle), "--set", "patch.size=32,32,32"], check=True)
    plain = read_volume(series).write(tmp_path / "plain.nii.gz")
    predict = ["predict", str(bundle), str(series), str(plain), "--out", str(out), "--device", "cpu", "--no-mirror"]
    assert run([*predict, "--dicom", "seg, rtstruct"]) == 0
    report = json.loads((out / "prediction.json").read_text())
    by_case = {case["case"]: case for case in report["cases"]}
    files = [stamp["path"] for stamp in by_case["T2 axial"]["files"]]
    assert files == ["T2 axial.nii.gz", "T2 axial.seg.dcm", "T2 axial.rtstruct.dcm"]
    assert "no_dicom" in [flag["code"] for flag in by_case["plain"]["flags"]]
    labels, _ = read_labels(out / "T2 axial.nii.gz")
    seg = pydicom.dcmread(out / "T2 axial.seg.dcm")
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    assert int(bits.sum()) == int((labels > 0).sum()) > 0
    more = ["--out", str(tmp_path / "more"), "--labels", str(bundle)]
    assert run(["dicom", str(out / "T2 axial.nii.gz"), str(series), *more]) == 0
    assert pydicom.dcmread(tmp_path / "more" / "T2 axial.seg.dcm").SOPInstanceUID == seg.SOPInstanceUID
    capsys.readouterr()
    # What is there covers less than was made, so nothing is computed again.
    assert run([*predict, "--dicom", "seg", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [case.get("finished_before") for case in told[:-1]] == [True, True]
    assert run([*predict, "--dicom", "nothing"]) == 2
