"""Scans that are named instead of sent: by paths of the service's machine, or by an upload whose series are listed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import TestClient, error_of, send, service
from test_dicom_catalogue import as_dicomdir

from dicom_scans import SECRET, write_enhanced, write_series  # isort: skip - beside the tests of the readers
from sagittal.testing.datasets import AFFINE
from sagittal.volumes import Volume

Served = Callable[..., TestClient]
SERIES = ("1.2.3.1", "1.2.3.2")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder of a study with two series."""
    folder = tmp_path / "scans" / f"{SECRET}^JOHN"
    rng = np.random.default_rng(0)
    for number, uid in enumerate(SERIES):
        volume = Volume(rng.integers(0, 900, (1, 5 + number, 6, 7)).astype(np.int16), AFFINE)
        write_series(folder / uid[-1], volume, series_uid=uid, modality="CT", change=_in_study)
    return folder


def _in_study(data: Any, index: int) -> None:
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.9", "1.2.8"
    data.StudyDate, data.StudyTime, data.StudyID = "20200102", "101112", "1"
    data.SeriesNumber, data.InstanceNumber = int(data.SeriesInstanceUID[-1]), index


def _packed(study: Path) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(study.rglob("*.dcm")):
            archive.write(path, path.relative_to(study.parent))
    return target.getvalue()


@pytest.mark.parametrize("kind", ["folder", "zip", "DICOMDIR"])
def test_a_series_of_a_study_is_named_beside_its_path(served: Served, study: Path, kind: str) -> None:
    path = study
    if kind == "zip":
        path = study.with_suffix(".zip")
        path.write_bytes(_packed(study))
    elif kind == "DICOMDIR":
        path = as_dicomdir(study, study.parent / "disc")
    client = served(allowed_folders=(study.parent,))
    options = {"series_uid": SERIES[1], "formats": ["seg"]}
    sent = client.post("/api/v1/jobs", json={"paths": [str(path)], "options": options})
    assert sent.status_code == 202, sent.text
    assert service(client).store.get(sent.json()["id"]).input.dicom


def test_a_dicom_file_of_many_frames_is_a_series(served: Served, tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "many.dcm", Volume(np.full((1, 5, 6, 7), 9, np.int16), AFFINE))
    client = served(allowed_folders=(tmp_path,))
    sent = client.post("/api/v1/jobs", json={"paths": [str(path)], "options": {"formats": ["rtstruct"]}})
    assert sent.status_code == 202, sent.text
    assert service(client).store.get(sent.json()["id"]).input.dicom


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_study_without_a_volume_is_refused_without_its_names(served: Served, study: Path, is_zip: bool) -> None:
    for number, path in enumerate(sorted(study.rglob("*.dcm"))):
        path.write_bytes(path.read_bytes()[:200])
        path.rename(path.with_name(f"{SECRET}{number}.dcm"))
    path = study
    if is_zip:
        path = study.with_suffix(".zip")
        path.write_bytes(_packed(study))
    client = served(allowed_folders=(study.parent,))
    refused = client.post("/api/v1/jobs", json={"paths": [str(path)]})
    assert SECRET not in error_of(refused, 422, "no_series")


def test_a_listed_upload_stays_where_the_queue_filled_meanwhile(
    client: TestClient, study: Path, nifti: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = client.post("/api/v1/series", files={"image": _packed(study)})
    assert listed.status_code == 201, listed.text
    first, *_ = [send(client, nifti).json()["id"] for _ in range(4)]
    # As if there had been room when it was asked for.
    monkeypatch.setattr("sagittal.serve.routes_jobs.require_capacity", lambda *given: None)
    asked = {"upload": listed.json()["upload"], "options": {"series_uid": SERIES[0]}}
    error_of(client.post("/api/v1/jobs", json=asked), 429, "queue_full")
    assert client.post(f"/api/v1/jobs/{first}/cancel").status_code == 200
    sent = client.post("/api/v1/jobs", json=asked)
    assert sent.status_code == 202, sent.text
    held = service(client)
    stored = held.store.get(sent.json()["id"])
    assert (held.settings.job_folder(stored.id) / stored.input.files[0]).is_dir()


def test_what_a_full_queue_refuses_leaves_nothing(
    served: Served, study: Path, nifti: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served(allowed_folders=(study.parent,))
    for _ in range(4):
        send(client, nifti)
    monkeypatch.setattr("sagittal.serve.routes_jobs.require_capacity", lambda *given: None)
    error_of(send(client, nifti), 429, "queue_full")
    error_of(client.post("/api/v1/jobs", json={"paths": [str(study)]}), 429, "queue_full")
    held = service(client).settings
    assert list(held.uploads_folder.iterdir()) == []
    assert len(list(held.jobs_folder.iterdir())) == 4
