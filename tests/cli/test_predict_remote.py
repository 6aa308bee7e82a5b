"""`sagittal predict http://...` against a small service on a real socket."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.cli import predict_remote, run
from sagittal.client import Client
from sagittal.errors import ResourceError
from sagittal.volumes import Volume

sys.path.append(str(Path(__file__).parents[1] / "client"))

from small_service import SmallService, error, running, told  # isort: skip - beside the tests of the client

LIVER = {"name": "liver", "channels": ["CT"], "labels": [{"name": "liver", "value": 1, "color": "#ff0000"}]}
JOB = {"id": "a1", "state": "running", "progress": 0.5, "results": [], "volumes_ml": {}, "flags": [], "error": None}
RESULTS = [
    {"name": "labels.nii.gz", "format": "nifti"},
    {"name": "preview.png", "format": "png"},
    {"name": "labels.seg.dcm", "format": "seg"},
]
DONE = JOB | {"state": "done", "results": RESULTS, "volumes_ml": {"liver": 12.5}, "flags": ["spacing is unusual"]}
FAILED = JOB | {"state": "failed", "error": {"type": "DataError", "code": "not_finite", "message": "holds NaN"}}
ONE = "/seg/api/v1/jobs/a1"


def answers(**changed: Any) -> dict[str, list[Any]]:
    return {
        "GET /seg/api/v1/models": [told({"models": [LIVER]})],
        "POST /seg/api/v1/jobs": [told(JOB, 202)],
        f"GET {ONE}": [told(JOB), told(DONE)],
        f"GET {ONE}/results/labels.nii.gz": [(200, b"labels", {})],
        f"GET {ONE}/results/preview.png": [(200, b"picture", {})],
        f"GET {ONE}/results/labels.seg.dcm": [(200, b"object", {})],
        f"POST {ONE}/cancel": [told(JOB | {"state": "cancelled"})],
    } | changed


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b"):
        Volume(np.ones((1, 3, 4, 5), np.float32), np.eye(4)).write(folder / f"{name}.nii.gz")
    return folder


def predict(service: SmallService, *arguments: str | Path) -> int:
    return run(["predict", service.url, *map(str, arguments)])


def posted(service: SmallService) -> list[bytes]:
    return [request.body for request in service.requests if request.method == "POST"]


def test_scans_are_sent_and_label_maps_saved_with_what_was_asked_for(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with running(answers()) as service:
        assert (
            predict(service, scans, "--out", out, "--preview", "--dicom", "seg", "--no-mirror", "--subset", "liver")
            == 0
        )
        bodies = posted(service)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        *("a.nii.gz", "b.nii.gz", "a.seg.dcm", "b.seg.dcm", "previews/a.png", "previews/b.png")
    }
    assert (out / "b.nii.gz").read_bytes() == b"labels"
    assert len(bodies) == 2
    assert b'"mirror": false' in bodies[0]
    assert b'"subset": ["liver"]' in bodies[0]
    assert b'"formats": ["seg"]' in bodies[0]
    printed = capsys.readouterr()
    assert "a: done" in printed.out
    assert "liver 12.5 mL" in printed.out
    assert "spacing is unusual" in printed.out
    assert "not a medical device" in printed.err


def test_what_is_there_is_left_alone_unless_told_otherwise(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"before")
    with running(answers()) as service:
        assert predict(service, scans, "--out", tmp_path / "out") == 0
        assert len(posted(service)) == 1
        assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"before"
        assert predict(service, scans, "--out", tmp_path / "out", "--overwrite") == 0
        assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"labels"


def test_a_bad_case_loses_nothing(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(answers(**{f"GET {ONE}": [told(FAILED), told(DONE)]})) as service:
        assert predict(service, scans, "--out", tmp_path / "out", "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("status") for line in lines] == ["failed", "done", None]
    assert lines[0]["message"] == "holds NaN"
    assert lines[2]["summary"] == {"cases": 2, "failed": 1, "skipped": 0}
    assert not (tmp_path / "out" / "a.nii.gz").exists()
    assert (tmp_path / "out" / "b.nii.gz").exists()


def test_a_service_that_asks_for_a_key_ends_the_run_and_jobs_are_cancelled(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = (401, error("ServiceError", "api_key", "no valid API key"), {})
    with running(answers(**{f"GET {ONE}": [refused]})) as service:
        assert predict(service, scans, "--out", tmp_path / "out") == 1
        assert any(request.path == f"{ONE}/cancel" for request in service.requests)
    assert "no valid API key" in capsys.readouterr().err


def test_a_service_that_is_lost_is_not_waited_for_again_to_cancel(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(client: Client, id: str, **more: Any) -> Any:
        raise ResourceError("no answer", code="connection")

    monkeypatch.setattr(Client, "wait", wait)
    with running(answers()) as service:
        assert predict(service, scans, "--out", tmp_path / "out") == 1
        assert not any(request.path == f"{ONE}/cancel" for request in service.requests)
    assert "no answer" in capsys.readouterr().err


def test_what_is_interrupted_is_cancelled_in_haste(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(client: Client, id: str, **more: Any) -> Any:
        raise ResourceError("refused", code="api_key")

    monkeypatch.setattr(Client, "wait", wait)
    monkeypatch.setattr(predict_remote, "_HASTE_S", 0.1)
    made: list[float] = []

    class Counted(Client):
        def __init__(self, url: str, key: str | None = None, **more: float) -> None:
            made.append(more.get("patience_s", 120.0))
            super().__init__(url, key, **more | {"timeout_s": 120.0})

    monkeypatch.setattr("sagittal.client.Client", Counted)
    busy = (503, error("ServiceError", "stopping", "the service is stopping"), {"Retry-After": "10"})
    with running(answers(**{f"POST {ONE}/cancel": [busy]})) as service:
        assert predict(service, scans, "--out", tmp_path / "out") == 1
        # Two jobs are there, and one request: what fails for the first is not tried for the second.
        assert sum(request.path == f"{ONE}/cancel" for request in service.requests) == 1
        assert len(posted(service)) == 3
    assert made == [120.0, 0.1]


def test_the_key_comes_from_a_file_or_a_variable(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    monkeypatch.setenv("SAGITTAL_API_KEY", "other")
    with running(answers()) as service:
        assert predict(service, scans, "--out", tmp_path / "out", "--key-file", key) == 0
        assert {request.headers["X-API-Key"] for request in service.requests} == {"secret"}
        service.requests.clear()
        assert predict(service, scans, "--out", tmp_path / "more") == 0
        assert {request.headers["X-API-Key"] for request in service.requests} == {"other"}
        key.write_text("two words")
        assert predict(service, scans, "--out", tmp_path / "out", "--key-file", key) == 1
        assert predict(service, scans, "--out", tmp_path / "out", "--key-file", tmp_path / "none") == 1
    assert "two words" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--probabilities",), "does not offer"),
        (("--missing", "CT"), "does not offer"),
        (("--device", "cuda"), "when it started"),
        (("--memory-gib", "4"), "when it started"),
        (("--model", "livr"), "Did you mean 'liver'"),
        (("--dicom", "segg"), "Did you mean 'seg'"),
    ],
)
def test_what_a_service_does_not_have_is_refused(
    options: tuple[str, ...], words: str, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(answers()) as service:
        assert predict(service, scans, "--out", tmp_path / "out", *options) == 2
        assert posted(service) == []
    assert words in " ".join(capsys.readouterr().err.split())


def test_one_of_several_models_is_chosen_by_name(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = told({"models": [LIVER, LIVER | {"name": "spleen"}]})
    with running(answers(**{"GET /seg/api/v1/models": [both]})) as service:
        assert predict(service, scans, "--out", tmp_path / "out") == 2
        assert "liver, spleen" in capsys.readouterr().err
        assert predict(service, scans, "--out", tmp_path / "out", "--model", "spleen") == 0
        assert b"spleen" in posted(service)[0]


def test_options_of_services_are_refused_for_bundles(scans: Path, tmp_path: Path) -> None:
    assert run(["predict", str(tmp_path / "bundle"), str(scans), "--out", str(tmp_path), "--model", "liver"]) == 2


def test_an_output_never_replaces_a_scan(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(answers()) as service:
        assert predict(service, scans / "a.nii.gz", "--out", scans, "--overwrite") == 1
        assert posted(service) == []
    assert "overwrite a scan" in capsys.readouterr().err
