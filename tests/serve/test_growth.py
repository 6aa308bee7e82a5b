"""What a service holds in memory does not grow with what it was asked, counted in objects and not in bytes.

Bytes can't be held to: freed memory stays with the threads that had it, until the C library gives it back.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from serving import TestClient, compute, held_by, send, service

JOBS = 30


def use(client: TestClient, nifti: bytes, round: int) -> None:
    """Do everything once that leaves something behind where somebody forgets to clean up."""
    job = send(client, nifti, headers={"Idempotency-Key": f"key-{round}"}).json()["id"]
    assert compute(client).id == job
    for path in (f"/api/v1/jobs/{job}", "/api/v1/jobs", "/metrics", "/ready", f"/nowhere/{round}"):
        client.get(path)
    assert client.get(f"/api/v1/jobs/{job}/results/labels.nii.gz").status_code == 200
    assert send(client, b"no image").status_code >= 400
    assert client.post("/api/v1/series", files={"image": b"no study"}).status_code >= 400
    assert client.put(f"/monai/datastore/?image=scan-{round}", files={"file": nifti}).status_code < 500
    other = send(client, nifti).json()["id"]
    assert client.post(f"/api/v1/jobs/{other}/cancel").json()["state"] == "cancelled"
    for name in (job, other):
        assert client.delete(f"/api/v1/jobs/{name}").status_code == 204


def counted(client: TestClient) -> Counter[str]:
    """Count what the service and the package's modules hold."""
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("sagittal.")]
    return held_by(service(client), client.app, logging.getLogger("sagittal.serve").handlers, *modules)


def test_what_is_held_does_not_grow_with_the_requests(client: TestClient, nifti: bytes) -> None:
    for round in range(5):
        use(client, nifti, round)
    before, samples = counted(client), len(client.get("/metrics").text.splitlines())
    for round in range(5, 5 + JOBS):
        use(client, nifti, round)
    grown = counted(client) - before
    assert grown.total() < JOBS, grown.most_common(5)
    assert len(client.get("/metrics").text.splitlines()) == samples, "a label holds what somebody sent"
    assert not service(client).arriving


@pytest.mark.parametrize("keep", [lambda held, job: held.append(job), lambda held, job: held.append([job])])
def test_one_object_per_job_would_be_seen(
    client: TestClient, nifti: bytes, keep: Callable[[list[object], str], None]
) -> None:
    held: list[object] = []
    service(client).held = held  # type: ignore[attr-defined]
    before = counted(client)
    for number in range(JOBS):
        keep(held, f"job {number}")
    assert (counted(client) - before).total() >= JOBS
