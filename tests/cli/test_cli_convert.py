"""Scans in other formats, as a user names them: `convert`, `info` and `predict`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import run
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.io import read_stored

RESAMPLED = (19, 128, 84)


@pytest.fixture
def series(shared_data: Path, tmp_path: Path) -> Path:
    """Three even slices of a real series."""
    folder = tmp_path / "T2 axial"
    folder.mkdir()
    (source,) = (shared_data / "dicom" / "ProstateX-missing-slice").glob("*/*/*")
    for number in range(7, 10):
        shutil.copy(source / f"1-{number:02d}.dcm", folder)
    return folder


@pytest.mark.parametrize("suffix", [".nii.gz", ".hdr", ".mgz", ".nrrd", ".mhd"])
def test_convert_keeps_grid_type_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    scan = Volume(np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5), np.diag([2.0, 3.0, 4.0, 1.0]))
    source, target = scan.write(tmp_path / "scan.mha"), tmp_path / f"out{suffix}"
    assert run(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: Volume((1, 3, 4, 5) int16, spacing_mm (2, 3, 4)")
    stored = read_stored(target)
    assert np.array_equal(stored.voxels, scan.array[0])
    assert stored.voxels.dtype == np.int16
    assert np.allclose(stored.affine, scan.affine)
    assert run(["convert", str(source), str(source)]) == 1
    assert "is the scan itself" in capsys.readouterr().err


def test_convert_resamples_a_series_with_a_hole_on_request(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(shared_data / "dicom"), str(tmp_path / "out.nii.gz")
    assert run(["convert", source, out]) == 1
    assert "2 series" in capsys.readouterr().err
    uid = "1.3.6.1.4.1.14519.5.2.1.7311.5101.338465037878158762935951983202"
    assert run(["convert", source, out, "--series-uid", uid]) == 1
    assert "6 mm between slices 13 and 14: 1 missing" in capsys.readouterr().err
    assert run(["convert", source, out, "--series-uid", uid, "--resample-slices"]) == 0
    assert read_volume(out).array.shape == (1, *RESAMPLED)


def test_a_series_is_predicted_and_described(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-m", "sagittal.testing.bundle", "--network", "segformer3d", "--classes", "2"]
    subprocess.run([*command, "--out", str(bundle), "--set", "patch.size=32,32,32"], check=True)
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for slice_ in series.iterdir():
            file.write(slice_, slice_.name)
    arguments = [
        str(bundle),
        str(series),
        str(archive),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--no-mirror",
    ]
    assert run(["predict", *arguments]) == 0
    report = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert [case["output"] for case in report["cases"]] == ["T2 axial.nii.gz", "packed.nii.gz"]
    scan = read_volume(series)
    labels, geometry = read_labels(tmp_path / "out" / "T2 axial.nii.gz")
    assert labels.shape == scan.array.shape[1:] == (3, 128, 84)
    assert np.allclose(geometry.affine, scan.affine, atol=1e-4)
    assert np.array_equal(labels, read_labels(tmp_path / "out" / "packed.nii.gz")[0])
    capsys.readouterr()
    assert run(["info", str(series)]) == 0
    assert "3 x 128 x 84" in capsys.readouterr().out
