"""`sagittal datasets`: from the list to a data set that the doctor finds usable, without any network."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import run
from sagittal.data import catalogue
from sagittal.volumes import Volume

AFFINE = np.array([[0, 0, 1, -9], [0, 1.2, 0, 5], [2, 0, 0, 7], [0, 0, 0, 1]], np.float64)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """ACDC of three patients, as a zip."""
    rng = np.random.default_rng(0)
    path = tmp_path / "acdc.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for number in (1, 2, 3):
            for frame in (1, 12):
                labels = np.zeros((8, 10, 9), np.uint8)
                labels[1:4, 2:5, 3:6] = 1
                labels[1:4, 5:7, 3:6] = 2
                labels[5:7, 5:7, 3:6] = 3
                scans = {"": rng.normal(100, 9, labels.shape).astype(np.float32), "_gt": labels}
                for ending, array in scans.items():
                    file = Volume(array[None], AFFINE).write(tmp_path / "scan.nii.gz")
                    name = f"patient{number:03d}"
                    packed.write(file, f"database/training/{name}/{name}_frame{frame:02d}{ending}.nii.gz")
    return path


def test_the_list_names_every_set_with_licence_and_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets"]) == 0
    shown = capsys.readouterr().out
    for name in catalogue.CATALOGUE:
        assert name in shown
    assert run(["datasets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(catalogue.CATALOGUE)
    assert listed[0]["downloads"][0]["md5"] == "240a19d752f0d9e9101544901065d872"
    assert {entry["access"] for entry in listed} == {"fetch", "registration", "script"}


def test_one_set_is_shown_with_what_could_not_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets", "show", "msd-task09"]) == 0
    shown = capsys.readouterr().out
    for part in ("CC BY-SA 4.0", "MD5 410d4a301da4e5b2f6f86ec3ddba524e", "published by MONAI", "arXiv:1902.09063"):
        assert part in shown
    assert run(["datasets", "show", "amos22"]) == 0
    shown = capsys.readouterr().out
    assert "none published" in shown and "not verified" in shown
    assert run(["datasets", "show", "btcv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "btcv"
    assert run(["datasets", "show", "brats2012", "--json"]) == 1
    assert "brats2021" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_archive_becomes_a_data_set_that_the_doctor_finds_usable(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "acdc"
    assert run(["datasets", "convert", "acdc", str(archive), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "6 training cases, 0 test cases" in shown and "as published the set has 200" in shown
    assert (out / "patients.csv").read_text().splitlines()[1] == "patient001_frame01,patient001"
    assert run(["doctor", str(out), "--json"]) == 0
    capsys.readouterr()
    assert run(["datasets", "convert", "acdc", str(archive), "--out", str(out)]) == 1
    assert "never overwritten" in capsys.readouterr().err


def test_a_set_behind_a_login_is_not_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets", "fetch", "lits", "--to", str(tmp_path)]) == 1
    assert "Register at codalab.org" in capsys.readouterr().err


def test_an_open_set_is_fetched_with_its_terms_and_the_next_command(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    from local_server import Served, serving

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = archive.read_bytes()
    entry = catalogue.CATALOGUE["acdc"]
    with serving(Served(content)) as server:
        item = catalogue.Download(server.url, "acdc.zip", hashlib.md5(content).hexdigest(), "a test")
        changed = catalogue.PublicDataset(**{**vars(entry), "downloads": (item,)})
        monkeypatch.setitem(sys.modules["sagittal.data.catalogue"].CATALOGUE, "acdc", changed)
        assert run(["datasets", "fetch", "acdc", "--to", str(tmp_path / "got")]) == 0
    told = capsys.readouterr()
    assert (tmp_path / "got" / "acdc.zip").read_bytes() == content
    assert "CC BY-NC-SA 4.0" in told.out and "doi:10.1109/TMI.2018.2837502" in told.out
    assert f"{len(content)} of {len(content)} bytes" in told.err
    *_, last = told.out.splitlines()
    assert run(last.split()[1:]) == 0
    assert (tmp_path / "got" / "acdc" / "dataset.json").is_file()
