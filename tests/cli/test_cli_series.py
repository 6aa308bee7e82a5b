"""DICOM studies of several series, as a user names them: `info` and `predict --series`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from sagittal.cli import run
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import read_labels

SETTINGS = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "preprocessing.crop_to_nonzero": False,
}
UID = "1.2.826.0.1.3680043.8.498"


def write_series(folder: Path, number: int, modality: str, description: str, shape: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(number).integers(0, 900, shape).astype(np.int16)
    kind = CTImageStorage if modality == "CT" else MRImageStorage
    for index, plane in enumerate(voxels):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"{UID}.{number}.{index}"
        data = FileDataset("slice", {}, preamble=b"\0" * 128, file_meta=meta)
        data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = f"{UID}.0", f"{UID}.{number}"
        data.PatientName, data.PatientID = "DOE^JANE", "DOE77"
        data.Modality, data.SeriesNumber, data.SeriesDescription = modality, number, description
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 1.5 * index], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.Rows, data.Columns = [1.25, 1.0], *shape[1:]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = plane.tobytes()
        pydicom.dcmwrite(folder / f"{number}_{index}.dcm", data, enforce_file_format=True)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    write_series(folder / "b", 7, "CT", "portal", (10, 17, 16))
    write_series(folder / "a", 3, "MR", "t1_vibe", (9, 16, 14))
    write_series(folder / "a", 4, "MR", "t2_haste", (9, 16, 14))
    return folder


def a_bundle(folder: Path, *channels: str) -> str:
    spec = untrained_spec(2).replace(channel_names=channels)
    plan = untrained_plan("segformer3d", spec, patch_size=(16, 18, 20), settings=SETTINGS)
    return str(write_random_bundle(folder / "bundle", plan))


def test_info_lists_the_series_of_a_study(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(study)]) == 0
    told = capsys.readouterr().out
    for text in ("DICOM study", "t1_vibe", "9 x 16 x 14", "1.5 x 1.25 x 1", f"7  {UID}.7", "yes"):
        assert text in told
    assert "DOE" not in told
    assert run(["info", str(study), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["series"]
    assert [(series["series_number"], series["usable"], series["shape"]) for series in found] == [
        (3, True, [9, 16, 14]),
        (4, True, [9, 16, 14]),
        (7, True, [10, 17, 16]),
    ]
    assert "DOE" not in str(found)


def test_info_shows_the_image_of_the_only_series_or_of_the_named_one(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (study / "b", f"{study}#7"):
        assert run(["info", str(path)]) == 0
        told = capsys.readouterr().out
        assert "10 x 17 x 16" in told and "axes D, H, W run towards" in told
    assert run(["info", str(study / "b" / "7_0.dcm"), "--json"]) == 0
    (slice_,) = json.loads(capsys.readouterr().out)["series"]
    assert slice_["why_not"] == "a series of one slice"
    (study / "x.nii").write_bytes(b"")
    assert run(["info", str(study / "x.nii"), "--json"]) != 0


def test_the_series_of_the_models_modality_is_predicted(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = a_bundle(tmp_path, "CT")
    assert run(["predict", bundle, str(study), "--out", str(tmp_path / "out"), "--json"]) == 0
    case = json.loads(capsys.readouterr().out.splitlines()[0])
    flags = {flag["code"]: flag["message"] for flag in case["flags"]}
    assert flags["series"] == "study: series 7 (CT, 10 x 17 x 16) was taken for CT, of 3 in it"
    assert "modality" not in flags
    labels, _ = read_labels(tmp_path / "out" / "study.nii.gz")
    assert labels.shape == (10, 17, 16)


def test_a_series_named_by_hand_is_predicted_and_another_one_is_another_input(study: Path, tmp_path: Path) -> None:
    bundle, out = a_bundle(tmp_path, "MRI"), tmp_path / "out"
    command = ["predict", bundle, str(study), "--out", str(out), "--series"]
    assert run([*command, f"{UID}.4"]) == 0
    first = (out / "study.nii.gz").read_bytes()
    assert run([*command, "4"]) == 0
    assert run([*command, "7"]) == 0
    assert read_labels(out / "study.nii.gz")[0].shape == (10, 17, 16)
    assert (out / "study.nii.gz").read_bytes() != first


def test_channels_are_series_named_in_their_order(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = a_bundle(tmp_path, "T1", "T2"), str(tmp_path / "out")
    assert run(["predict", bundle, str(study), "--out", out, "--series", f"{UID}.3,{UID}.4"]) == 0
    assert read_labels(tmp_path / "out" / "study.nii.gz")[0].shape == (9, 16, 14)
    capsys.readouterr()
    assert run(["predict", bundle, str(study), str(study), "--out", out, "--series", "3"]) == 2
    assert "--series 3: 2 inputs. Expected the one study" in capsys.readouterr().err
    assert run(["predict", bundle, f"{study}#3", f"{study}#7", "--out", out, "--overwrite"]) == 1
    assert "grids differ" in capsys.readouterr().err


def test_one_series_for_two_channels_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = a_bundle(tmp_path, "CT", "cta"), str(tmp_path / "out")
    for scans in ([str(study), str(study)], [str(study), "--series", "7,7"], [str(study), "--series", f"7,{UID}.7"]):
        assert run(["predict", bundle, *scans, "--out", out]) == 1
        assert "series 7 (CT, 10 x 17 x 16) would be both CT and cta" in capsys.readouterr().err


def test_series_that_fit_equally_well_are_refused_with_their_numbers(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["predict", a_bundle(tmp_path, "MRI"), str(study), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "2 series fit equally well" in told and "number 3" in told and "--series" in told
    assert "DOE" not in told and "haste" not in told
