"""The client against a service on a real socket that drops connections, breaks off and refuses."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from small_service import SmallService, error, running, told

from sagittal.client import Client
from sagittal.errors import BundleError, DataError, ResourceError, SagittalError

JOB = {"id": "a1", "state": "queued", "progress": 0.0, "results": [], "volumes_ml": {}, "flags": [], "error": None}
DONE = JOB | {
    "state": "done",
    "progress": 1.0,
    "results": [{"name": "labels.nii.gz"}, {"name": "volumes.json"}],
    "volumes_ml": {"liver": 1500.5},
    "flags": ["spacing is unusual"],
}
JOBS, ONE = "/seg/api/v1/jobs", "/seg/api/v1/jobs/a1"
LABELS = f"GET {ONE}/results/labels.nii.gz"


def client_of(service: SmallService, **settings: Any) -> Client:
    return Client(service.url, **{"patience_s": 120.0, "timeout_s": 120.0} | settings)


def parts_of(body: bytes, content_type: str) -> list[tuple[str, str, bytes]]:
    """Return (name, head, content) of each part."""
    boundary = b"--" + content_type.partition("boundary=")[2].encode()
    assert body.endswith(boundary + b"--\r\n")
    found = []
    for part in body.split(boundary + b"\r\n")[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        content = content.removesuffix(boundary + b"--\r\n")
        assert content.endswith(b"\r\n")
        name = re.search(r'form-data; name="(\w+)"', head.decode())
        assert name is not None
        found.append((name[1], head.decode(), content[:-2]))
    return found


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "Jane Doe.nii.gz"
    path.write_bytes(bytes(range(256)) * 9000)
    return path


def test_a_scan_is_sent_waited_for_and_saved_through_dropped_connections(scan: Path, tmp_path: Path) -> None:
    answers = {
        f"POST {JOBS}": ["drop", told(JOB, 202)],
        f"GET {ONE}": [told(JOB), "drop", told(JOB | {"state": "running", "progress": 0.5}), told(DONE)],
        LABELS: [("half", (200, b"label map", {})), (200, b"label map", {})],
    }
    seen: list[str] = []
    with running(answers) as service:
        client = client_of(service, key="secret")
        done = client.predict(
            scan,
            out=tmp_path / "out.nii.gz",
            model="liver",
            mirror=False,
            on_progress=lambda job: seen.append(job["state"]),
        )
        sent = [request for request in service.requests if request.method == "POST"]
    assert (tmp_path / "out.nii.gz").read_bytes() == b"label map"
    assert done.volumes_ml == {"liver": 1500.5}
    assert done.flags == ("spacing is unusual",)
    assert done.results == ("labels.nii.gz", "volumes.json")
    assert seen == ["queued", "running", "done"]
    assert len(sent) == 2
    assert sent[0].headers["Idempotency-Key"] == sent[1].headers["Idempotency-Key"]  # nothing is made twice
    assert sent[1].headers["X-API-Key"] == "secret"
    model, options, image = parts_of(sent[1].body, sent[1].headers["Content-Type"])
    assert image[0] == "image"
    assert image[2] == scan.read_bytes()
    assert "Jane" not in image[1]  # names of files tell who was scanned
    assert (model[0], model[2]) == ("model", b"liver")
    assert json.loads(options[2]) == {"mirror": False}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_jobs_of_one_scan_are_two(scan: Path) -> None:
    with running({f"POST {JOBS}": [told(JOB, 202)]}) as service:
        client = client_of(service)
        client.submit(scan)
        client.submit(scan)
        first, second = (request.headers["Idempotency-Key"] for request in service.requests)
    assert first != second


def test_a_folder_of_slices_travels_as_one_archive_without_names(tmp_path: Path) -> None:
    folder = tmp_path / "Doe^Jane"
    (folder / "deeper").mkdir(parents=True)
    (folder / "Doe_1.dcm").write_bytes(b"one")
    (folder / "deeper" / "2.dcm").write_bytes(b"two")
    (folder / ".DS_Store").write_bytes(b"no")
    (folder / "DICOMDIR").write_bytes(b"names files that travel under other names")
    with running({f"POST {JOBS}": [told(JOB, 202)]}) as service:
        client_of(service).submit(folder, series_uid="1.2.3")
        request = service.requests[0]
    options, archive = parts_of(request.body, request.headers["Content-Type"])
    with zipfile.ZipFile(io.BytesIO(archive[2])) as packed:
        assert packed.namelist() == ["000000", "000001"]
        assert {packed.read(name) for name in packed.namelist()} == {b"one", b"two"}
    assert json.loads(options[2]) == {"series_uid": "1.2.3"}


def test_a_failed_job_raises_what_the_service_states() -> None:
    failed = JOB | {"state": "failed", "error": {"type": "DataError", "code": "grid", "message": "grids differ"}}
    with running({f"GET {ONE}": [told(failed)]}) as service, pytest.raises(DataError, match="grids differ") as caught:
        client_of(service).wait("a1")
    assert caught.value.code == "grid"


def test_a_cancelled_job_is_told_as_such() -> None:
    answers = {f"GET {ONE}": [told(JOB | {"state": "cancelled"})]}
    with running(answers) as service, pytest.raises(SagittalError, match="cancelled") as caught:
        client_of(service).wait("a1")
    assert caught.value.code == "cancelled"


def test_waiting_ends_in_time() -> None:
    with running({f"GET {ONE}": [told(JOB)]}) as service, pytest.raises(ResourceError, match="goes on") as caught:
        client_of(service).wait("a1", timeout_s=0.3)
    assert caught.value.code == "timeout"


def test_what_the_service_refuses_comes_in_its_kind(scan: Path) -> None:
    answers = {f"POST {JOBS}": [(413, error("DataError", "too_large", "larger than 4 GiB"), {})]}
    with running(answers) as service:
        with pytest.raises(DataError, match="larger than") as caught:
            client_of(service).submit(scan)
        assert len(service.requests) == 1  # asking again would not help
    assert caught.value.code == "too_large"


def test_a_busy_service_is_asked_again(scan: Path) -> None:
    busy = (429, error("ResourceError", "queue_full", "1000 jobs wait"), {"Retry-After": "0"})
    with running({f"POST {JOBS}": [busy, busy, told(JOB, 202)]}) as service:
        assert client_of(service).submit(scan) == "a1"
    with running({f"POST {JOBS}": [busy]}) as service, pytest.raises(ResourceError, match="1000 jobs wait"):
        client_of(service, patience_s=0.5).submit(scan)


def test_an_unknown_kind_of_error_is_still_one_of_ours() -> None:
    for kind, expected in (("BundleError", BundleError), ("SystemExit", SagittalError), (None, SagittalError)):
        body = json.dumps({"error": {"type": kind, "code": None, "message": ""}}).encode()
        with running({f"GET {ONE}": [(400, body, {})]}) as service, pytest.raises(SagittalError) as caught:
            client_of(service).job("a1")
        assert type(caught.value) is expected


def test_another_server_is_told_from_ours() -> None:
    with running({f"GET {ONE}": [(404, b"<html>", {})]}) as service, pytest.raises(ResourceError, match="base path"):
        client_of(service).job("a1")


def test_nobody_there() -> None:
    # Held, but not listened on: a port that is free may be taken by somebody else meanwhile.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match="no answer") as caught:
            Client(f"http://127.0.0.1:{held.getsockname()[1]}/seg", patience_s=0.3).models()
    assert caught.value.code == "connection"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host?x=1", "http://me:pw@host", "http://host:99999", "x"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(DataError, match="not the address"):
        Client(url)


def test_bad_scans_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with running({}) as service:
        client = client_of(service)
        with pytest.raises(DataError, match="no scan given"):
            client.submit()
        with pytest.raises(DataError, match="no such file"):
            client.submit(tmp_path / "none.nii.gz")
        with pytest.raises(DataError, match="no file in it"):
            client.submit(tmp_path / "empty")
        assert service.requests == []


def test_a_result_that_can_t_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with running({LABELS: [(200, b"x", {})]}) as service:
        client = client_of(service)
        with pytest.raises(DataError, match="can't be written") as caught:
            client.download("a1", "labels.nii.gz", tmp_path / "none" / "out.nii.gz")
        assert caught.value.code == "cannot_write"
        full = Path("/dev/full")
        if full.exists():  # a disk without room
            with pytest.raises(DataError, match="can't be written"), full.open("wb", buffering=0) as stream:
                client._fetch("a1", "labels.nii.gz", stream.write, lambda: None)


@pytest.mark.parametrize(
    "content", [b"<html>Please log in", b"\xff\xfe\x00", b"[" * 100_000, b'["models"]', b'{"models": ']
)
def test_an_answer_that_is_none_of_a_service_is_told_as_such(content: bytes) -> None:
    with running({"GET /seg/api/v1/models": [(200, content, {"Content-Type": "text/html; charset=utf-8"})]}) as service:
        with pytest.raises(ResourceError, match=r"no JSON object \(text/html\)") as caught:
            client_of(service).models()
        assert caught.value.code == "service" and len(service.requests) == 1


def test_cancel_delete_and_models() -> None:
    answers = {
        f"POST {ONE}/cancel": [told(JOB | {"state": "cancelled"})],
        f"DELETE {ONE}": [(204, b"", {})],
        "GET /seg/api/v1/models": [told({"models": [{"name": "liver"}]})],
    }
    with running(answers) as service:
        client = client_of(service)
        assert client.cancel("a1")["state"] == "cancelled"
        client.delete("a1")
        assert client.models() == [{"name": "liver"}]


def test_an_id_stays_in_its_place() -> None:
    with running({}) as service:
        with pytest.raises(DataError):
            client_of(service).job("../models?x")
        assert service.requests[0].path == "/seg/api/v1/jobs/..%2Fmodels%3Fx"


def test_the_client_needs_no_package() -> None:
    code = "import sys, sagittal.client; print([m for m in ('numpy', 'pydantic', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
