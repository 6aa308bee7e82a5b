"""The HTTP interface with nobody computing: shapes, limits, access, and one form for every error."""

from __future__ import annotations

import io
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import TestClient, compute, error_of, scan_bytes, send, service

from sagittal.cli.serve import Allowance
from sagittal.errors import PlanError
from sagittal.serve.expiry import expire, sweep
from sagittal.serve.settings import ApiKey, Limits, hash_of_key

Served = Callable[..., TestClient]
KEY, OTHER = "k" * 32, "o" * 32
KEYS = (ApiKey(name="ward", sha256=hash_of_key(KEY)), ApiKey(name="lab", sha256=hash_of_key(OTHER)))
JOB_FIELDS = (
    "id model state stage progress queue_position created started ended expires attempt options error volumes_ml flags "
    "results"
)


def test_a_job_from_its_scan_to_its_deletion(client: TestClient, nifti: bytes) -> None:
    sent = send(client, nifti, options={"mirror": False, "subset": ["class_1"]})
    assert sent.status_code == 202, sent.text
    job = sent.json()
    assert sorted(job) == sorted(JOB_FIELDS.split())
    assert (job["state"], job["queue_position"], job["model"]) == ("queued", 1, "tiny")
    assert job["options"]["mirror"] is False and sent.headers["location"] == f"/api/v1/jobs/{job['id']}"
    held = service(client)
    stored = held.store.get(job["id"])
    assert (held.settings.job_folder(job["id"]) / stored.input.files[0]).read_bytes() == nifti
    assert error_of(client.delete(f"/api/v1/jobs/{job['id']}"), 409, "not_ended")
    compute(client)
    done = client.get(f"/api/v1/jobs/{job['id']}").json()
    assert (done["state"], done["progress"], done["volumes_ml"]) == ("done", 1.0, {"class_1": 1.5})
    assert done["results"] == [
        {
            "name": "labels.nii.gz",
            "format": "nifti",
            "media_type": "application/gzip",
            "bytes": 6,
            "href": f"/api/v1/jobs/{job['id']}/results/labels.nii.gz",
        }
    ]
    assert client.get("/api/v1/jobs", params={"state": "done"}).json()["jobs"] == [done]
    assert client.delete(f"/api/v1/jobs/{job['id']}").status_code == 204
    error_of(client.get(f"/api/v1/jobs/{job['id']}"), 404, "not_found")
    assert not held.settings.job_folder(job["id"]).exists()


def test_results_are_kept_for_a_time_that_ends_at_a_date(served: Served, nifti: bytes) -> None:
    with pytest.raises(PlanError, match=r"--keep 876001h: .*876000h"):
        Allowance(keep="876001h").limits()
    longest = Allowance(keep="876000h").limits().result_ttl_s
    client = served(limits=Limits(result_ttl_s=longest, free_bytes=0))
    send(client, nifti)
    job = compute(client)
    told = client.get(f"/api/v1/jobs/{job.id}")
    assert told.status_code == 200 and int(told.json()["expires"][:4]) >= 2100
    expire(service(client))
    assert service(client).store.state(job.id) == "done"


def test_results_come_in_ranges_and_only_when_they_changed(client: TestClient, nifti: bytes) -> None:
    send(client, nifti)
    href = f"/api/v1/jobs/{compute(client, b'0123456789').id}/results/labels.nii.gz"
    whole = client.get(href)
    assert whole.content == b"0123456789" and whole.headers["content-type"] == "application/gzip"
    etag = whole.headers["etag"]
    part = client.get(href, headers={"Range": "bytes=2-4", "If-Range": etag})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert client.get(href, headers={"If-None-Match": etag}).status_code == 304
    assert client.head(href).headers["content-length"] == "10"
    error_of(client.get(href, headers={"Range": "bytes=20-"}), 416, "range")
    error_of(client.get(href, headers={"Range": "bytes=x"}), 400, "range")
    error_of(client.get(href.replace("labels.nii.gz", "jobs.sqlite")), 404, "not_found")
    assert client.get(href.replace("labels.nii.gz", "..%2f..%2f..%2fjobs.sqlite")).status_code in (404, 422)


def test_a_job_is_cancelled_before_and_while_it_is_computed(client: TestClient, nifti: bytes) -> None:
    first, second = (send(client, nifti).json()["id"] for _ in range(2))
    held = service(client)
    assert client.post(f"/api/v1/jobs/{first}/cancel").json()["state"] == "cancelled"
    assert not (held.settings.job_folder(first) / "input").exists()
    claimed = held.store.claim("worker")
    assert claimed is not None and claimed.id == second
    assert client.post(f"/api/v1/jobs/{second}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/api/v1/jobs/{second}/cancel").json()["state"] == "cancelled"
    assert not held.store.progress(second, "worker", 0.5, "computing")


def test_the_same_idempotency_key_gives_the_same_job(client: TestClient, nifti: bytes) -> None:
    first, again = (send(client, nifti, headers={"Idempotency-Key": "abc"}).json() for _ in range(2))
    assert first["id"] == again["id"] != send(client, nifti).json()["id"]
    error_of(send(client, nifti, headers={"Idempotency-Key": "a b"}), 400, "invalid")


def test_a_full_queue_says_when_to_come_again(client: TestClient, nifti: bytes) -> None:
    for _ in range(4):
        assert send(client, nifti).status_code == 202
    refused = send(client, nifti)
    error_of(refused, 429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    error_of(client.get("/ready"), 503, "queue_full")
    assert list(service(client).settings.uploads_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 415, "unknown_format"),
        (b"hello, I am no scan" * 100, 415, "unknown_format"),
        (b"\x5c\1\0\0" + bytes(600), 415, "unknown_format"),
        (b"\x1f\x8b" + bytes(100), 415, "unknown_format"),
        (b"NRRD0004\nnothing: more\n\n", 422, "unreadable"),
        (b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = ../../jobs.sqlite\n", 422, None),
        (b"PK\x03\x04" + bytes(100), 422, "unreadable"),
        (bytes(128) + b"DICM" + bytes(100), 422, None),
    ],
)
def test_what_is_no_scan_is_refused(client: TestClient, content: bytes, status: int, code: str | None) -> None:
    refused = send(client, content)
    if content.startswith(bytes(128)):
        # Only a worker reads the slices of a series.
        assert refused.status_code in (202, 422)
        return
    error_of(refused, status, code or refused.json()["error"]["code"])
    assert list(service(client).settings.uploads_folder.iterdir()) == []
    assert service(client).store.counts()["queued"] == 0


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_every_format_is_known_by_its_bytes(client: TestClient, tmp_path: Path, suffix: str) -> None:
    sent = send(client, scan_bytes(suffix=suffix, folder=tmp_path))
    assert sent.status_code == 202, sent.text
    assert service(client).store.get(sent.json()["id"]).input.files == (f"input/0/image{suffix}",)


def test_headers_that_promise_too_much_are_refused(served: Served, nifti: bytes) -> None:
    client = served(limits=Limits(unpacked_bytes=1000, free_bytes=0))
    error_of(send(client, nifti), 413, "too_large")


def test_uploads_are_cut_off_at_their_limit(served: Served) -> None:
    client = served(limits=Limits(upload_bytes=5000, free_bytes=0))
    error_of(send(client, bytes(20_000)), 413, "too_large")

    def pieces() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        for _ in range(100):
            yield bytes(1000)

    streamed = client.post(
        "/api/v1/jobs", content=pieces(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    error_of(streamed, 413, "too_large")
    assert list(service(client).settings.uploads_folder.iterdir()) == []


def test_a_full_disk_is_told(served: Served, nifti: bytes) -> None:
    client = served(limits=Limits(free_bytes=1 << 60))
    error_of(send(client, nifti), 503, "disk")
    error_of(client.get("/ready"), 503, "disk")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mirror": "yes"}, "mirror"),
        ({"step": 0}, "step"),
        ({"step": 2}, "step"),
        ({"subset": ["livr"]}, "livr"),
        ({"formats": ["pdf"]}, "formats"),
        ({"formats": ["seg"]}, "DICOM"),
        ({"series_uid": "../1"}, "series_uid"),
        ({"unknown": 1}, "unknown"),
        ([1], "options"),
    ],
)
def test_options_that_make_no_sense_are_told_by_name(
    client: TestClient, nifti: bytes, options: Any, words: str
) -> None:
    refused = send(client, nifti, options=options)
    assert words in error_of(refused, 422, refused.json()["error"]["code"])


def test_forms_that_make_no_sense(client: TestClient, nifti: bytes) -> None:
    error_of(send(client, nifti, nifti), 422, "channel_count")
    error_of(send(client, nifti, data={"model": "nothing"}), 404, "unknown_model")
    error_of(send(client, nifti, data={"options": "{"}), 422, "invalid")
    error_of(send(client, nifti, data={"extra": "1"}), 422, "invalid")
    error_of(client.post("/api/v1/jobs", files={"other": b""}), 422, "invalid")
    error_of(client.post("/api/v1/jobs", content=b"x", headers={"Content-Type": "text/plain"}), 415, "unknown_format")
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/api/v1/jobs", content=b"--x\r\nnonsense", headers=boundary), 400, "bad_form")
    error_of(client.post("/api/v1/jobs", content=b"--y--", headers=boundary), 400, "bad_form")
    cut = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc'
    error_of(client.post("/api/v1/jobs", content=cut, headers=boundary), 400, "bad_form")
    for text in ("[]", "{", '{"paths": 3}', '{"paths": [], "upload": null}', "[" * 5000):
        error_of(
            client.post("/api/v1/jobs", content=text, headers={"Content-Type": "application/json"}), 422, "invalid"
        )


def test_paths_below_allowed_folders_only(served: Served, tmp_path: Path, nifti: bytes) -> None:
    allowed, other = tmp_path / "scans", tmp_path / "secret"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "DOE.nii.gz").write_bytes(nifti)
    (allowed / "link.nii.gz").symlink_to(other / "DOE.nii.gz")
    (allowed / "bad.nii.gz").write_bytes(b"no scan")
    (allowed / "DOE.mhd").write_text("NDims = 3\nElementDataFile = ../secret/DOE.nii.gz\n")
    client = served(allowed_folders=(allowed,))

    def ask(*paths: object) -> Any:
        return client.post("/api/v1/jobs", json={"paths": [str(path) for path in paths]})

    sent = ask(allowed / "DOE.nii.gz")
    assert sent.status_code == 202, sent.text
    assert service(client).store.get(sent.json()["id"]).input.kind == "path"
    outside = [other / "DOE.nii.gz", allowed / "../secret/DOE.nii.gz", allowed / "link.nii.gz", "/etc/passwd", "/no",
               "relative.nii.gz", "a\0b"]  # fmt: skip
    for path in outside:
        assert str(tmp_path) not in error_of(ask(path), 403, "path_not_allowed")
    error_of(ask(allowed / "DOE2.nii.gz"), 404, "not_found")
    for name in ("bad.nii.gz", "DOE.mhd"):
        assert str(tmp_path) not in error_of(ask(allowed / name), 422, "unreadable")
    assert (allowed / "DOE.nii.gz").exists()


def test_without_allowed_folders_no_path_is_read(client: TestClient, tmp_path: Path) -> None:
    error_of(client.post("/api/v1/jobs", json={"paths": [str(tmp_path)]}), 403, "path_not_allowed")


def test_a_key_opens_the_service_and_its_own_jobs(served: Served, nifti: bytes) -> None:
    client = served(api_keys=KEYS)
    ward, lab = {"X-API-Key": KEY}, {"Authorization": f"Bearer {OTHER}"}
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": f"Basic {KEY}"}, {"X-API-Key": "ü"}):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        for path in ("/api/v1/models", "/api/v1/jobs", "/metrics", "/no/such/place", "/staticky"):
            error_of(client.get(path, headers=raw), 401, "api_key")
    for path in ("/health", "/ready", "/openapi.json"):
        assert client.get(path).status_code == 200
    mine = send(client, nifti, headers=ward).json()["id"]
    assert [job["id"] for job in client.get("/api/v1/jobs", headers=ward).json()["jobs"]] == [mine]
    assert client.get("/api/v1/jobs", headers=lab).json()["jobs"] == []
    error_of(client.get(f"/api/v1/jobs/{mine}", headers=lab), 404, "not_found")
    error_of(client.post(f"/api/v1/jobs/{mine}/cancel", headers=lab), 404, "not_found")
    log = service(client).settings.audit_file.read_text()
    assert '"key": "ward"' in log and KEY not in log and "DOE" not in log


def test_other_hosts_and_other_sites_are_refused_on_loopback(served: Served, nifti: bytes) -> None:
    client = served(allowed_hosts=("scans.example",), allowed_origins=("https://viewer.example",))
    error_of(client.get("/health", headers={"Host": "evil.example"}), 403, "host")
    for host in ("127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "scans.example"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null"):
        error_of(send(client, nifti, headers={"Origin": origin}), 403, "origin")
    for origin in ("http://localhost", "https://viewer.example", "https://scans.example"):
        assert send(client, nifti, headers={"Origin": origin}).status_code == 202


def test_every_answer_has_the_headers_that_keep_browsers_in(client: TestClient) -> None:
    for path in ("/health", "/nowhere", "/api/v1/jobs/zzz"):
        headers = client.get(path).headers
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")


def test_errors_of_the_framework_have_the_one_shape(client: TestClient) -> None:
    error_of(client.get("/no/such/place"), 404, "not_found")
    error_of(client.put("/health"), 405, "method_not_allowed")
    assert client.put("/api/v1/jobs").headers["allow"] == "GET, POST"
    error_of(client.get("/api/v1/jobs/NO"), 422, "invalid")
    error_of(client.get("/api/v1/jobs", params={"limit": "0"}), 422, "invalid")
    error_of(client.get("/api/v1/jobs", params={"after": "0" * 32}), 404, "not_found")


def test_what_nobody_expected_is_a_500_with_an_id_that_the_log_has(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("DOE^JOHN at /serve/secret")

    monkeypatch.setattr(service(client).store, "counts", fail)
    message = error_of(client.get("/ready"), 500, "bug")
    found = re.search(r"as ([0-9a-f]{12})", message)
    assert found is not None and found[1] in caplog.text
    assert "ValueError" in caplog.text and "DOE" not in caplog.text and "secret" not in caplog.text


def test_below_a_base_url_with_and_without_a_proxy_that_takes_it_away(served: Served, nifti: bytes) -> None:
    client = served(base_url="/seg")
    assert client.get("/seg/health").status_code == client.get("/health").status_code == 200
    sent = client.post("/seg/api/v1/jobs", files={"image": nifti})
    assert sent.headers["location"].startswith("/seg/api/v1/jobs/")
    found = compute(client)
    href = client.get(f"/seg/api/v1/jobs/{found.id}").json()["results"][0]["href"]
    assert href.startswith("/seg/api/") and client.get(href).content == b"labels"
    assert client.get("/seg", follow_redirects=False).headers["location"] == "/seg/"
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/seg"}]


def test_models_and_numbers(client: TestClient, nifti: bytes) -> None:
    (model,) = client.get("/api/v1/models").json()["models"]
    assert sorted(model) == sorted(
        ["name", "network", "channels", "labels", "license", "mean_dice", "intended_use", "options"]
    )
    assert model["labels"][0].keys() == {"name", "value", "color"} and model["labels"][0]["value"] == 1
    send(client, nifti)
    text = client.get("/metrics").text
    assert 'sagittal_jobs{state="queued"} 1.0' in text
    assert 'sagittal_http_requests_total{method="POST",route="/api/v1/jobs",status="202"} 1.0' in text


def test_readiness_follows_the_workers(client: TestClient, nifti: bytes) -> None:
    assert client.get("/ready").json()["ready_workers"] == 1
    service(client).supervisor.ready_workers = 0  # type: ignore[misc]
    error_of(client.get("/ready"), 503, "workers")
    service(client).supervisor.stop(0)
    error_of(send(client, nifti), 503, "stopping")
    error_of(client.get("/ready"), 503, "stopping")


def test_old_jobs_and_forgotten_uploads_go_with_their_files(served: Served, nifti: bytes) -> None:
    client = served(limits=Limits(result_ttl_s=1e-3, series_ttl_s=1e-3, free_bytes=0))
    send(client, nifti)
    held, job = service(client), compute(client)
    for stray in (held.settings.jobs_folder / "stray", held.settings.uploads_folder / "stray"):
        stray.mkdir(parents=True)
    time.sleep(0.01)
    expire(held)
    assert held.store.state(job.id) is None and not held.settings.job_folder(job.id).exists()
    assert not (held.settings.uploads_folder / "stray").exists()
    sweep(held)
    assert not (held.settings.jobs_folder / "stray").exists()


def test_series_of_what_is_no_study(client: TestClient, nifti: bytes) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("DOE.dcm", b"no slice")
    refused = client.post("/api/v1/series", files={"image": packed.getvalue()})
    if refused.status_code != 201:
        error_of(refused, 422, refused.json()["error"]["code"])
    else:
        assert not any(each["usable"] for each in refused.json()["series"])
    error_of(client.post("/api/v1/series", files={"image": nifti}), 415, "unknown_format")
    error_of(client.post("/api/v1/jobs", json={"upload": "0" * 32}), 404, "not_found")


def test_the_openapi_document_names_every_address(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/api/v1/jobs", "/api/v1/jobs/{job_id}/results/{name}", "/api/v1/series", "/ready"} <= document[
        "paths"
    ].keys()
    bodies = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]
    assert bodies.keys() == {"multipart/form-data", "application/json"}
    assert "$ref" not in str(bodies)
