"""`sagittal serve` as a process of its own: what it computes, and what becomes of jobs when something dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import PATIENCE_S, scan_bytes, until

import sagittal
from sagittal.volumes import read_volume
from sagittal.volumes.volume import read_labels

pytestmark = [pytest.mark.slow, pytest.mark.kill]


class Running:
    """A service that was started, and a client for it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sagittal", "serve", *arguments], stderr=self._file, stdout=self._file
        )
        begun = log.stat().st_size

        def address() -> str | None:
            told = log.read_bytes()[begun:].decode()
            assert self.process.poll() is None, told
            return told.partition(" on http://")[2].partition("/\n")[0] if " on http://" in told else None

        self.http = httpx.Client(base_url=f"http://{until(address)}", timeout=PATIENCE_S)

    def job(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/api/v1/jobs/{job}").json()
        return found

    def send(self, image: bytes) -> str:
        answer = self.http.post("/api/v1/jobs", files={"image": image})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(self, job: str) -> dict[str, Any]:
        return until(lambda: found if (found := self.job(job))["state"] in ("done", "failed", "cancelled") else None)

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.http.close()
        self._file.close()
        return code


@pytest.fixture
def start(tmp_path: Path, tiny_bundle: Path) -> Iterator[Callable[..., Running]]:
    opened: list[Running] = []

    def begin(*more: str) -> Running:
        arguments = [str(tiny_bundle), "--folder", str(tmp_path / "serve"), "--port", "0", "--device", "cpu", *more]
        opened.append(Running(arguments, tmp_path / "log.txt"))
        return opened[-1]

    yield begin
    for running in opened:
        if running.process.poll() is None:
            running.stop(signal.SIGKILL)


def _workers(service: Running) -> list[int]:
    """Return the ids of a service's worker processes that are ready."""
    if service.http.get("/ready").status_code != 200:
        return []
    found: list[int] = []
    for path in Path(f"/proc/{service.process.pid}/task").glob("*/children"):
        # A thread may end between being found and being read; it is none that has a worker.
        with suppress(OSError):
            found += [int(number) for number in path.read_text().split()]
    return found


def _large(tmp_path: Path) -> bytes:
    """Return a scan that takes a worker some seconds."""
    array = np.random.default_rng(1).normal(100, 20, (32, 64, 64)).astype(np.float32)
    path = sagittal.Volume(array[None], np.diag([1.0, 1, 1, 1])).write(tmp_path / "large.nii")
    return path.read_bytes()


def write_endless(folder: Path) -> Path:
    """Write a scan for a job that is to be ended: no worker is done with it before, however late the test comes."""
    array = np.random.default_rng(1).normal(100, 20, (128, 224, 224)).astype(np.int16)
    return sagittal.Volume(array[None], np.diag([1.0, 1, 1, 1])).write(folder / "endless.nii")


def test_a_result_is_that_of_the_library_bit_for_bit_and_a_stop_is_clean(
    start: Callable[..., Running], tiny_bundle: Path, tmp_path: Path
) -> None:
    image = scan_bytes(3, folder=tmp_path)
    (tmp_path / "scan.nii.gz").write_bytes(image)
    service = start()
    job = service.ended(service.send(image))
    assert job["state"] == "done", job
    assert [each["name"] for each in job["results"]] == ["labels.nii.gz", "image.nii.gz", "volumes.json", "preview.png"]
    for each in job["results"]:
        content = service.http.get(each["href"]).content
        assert len(content) == each["bytes"]
        (tmp_path / each["name"]).write_bytes(content)
    expected = sagittal.load(tiny_bundle, device="cpu").predict(tmp_path / "scan.nii.gz")
    labels, geometry = read_labels(tmp_path / "labels.nii.gz")
    assert np.array_equal(labels, expected.array[0]) and np.array_equal(geometry.affine, expected.affine)
    assert np.array_equal(read_volume(tmp_path / "image.nii.gz").array, read_volume(tmp_path / "scan.nii.gz").array)
    assert service.http.get("volumes.json").status_code == 404
    assert service.stop(signal.SIGTERM) == 0
    log = service.log.read_text()
    assert "Traceback" not in log and str(tmp_path / "serve") not in log


def test_a_killed_worker_costs_an_attempt_and_a_second_one_the_job(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    service = start()
    image = write_endless(tmp_path).read_bytes()
    until(lambda: _workers(service) or None)
    job = service.send(image)
    for attempt in (1, 2):
        until(lambda attempt=attempt: self if (self := service.job(job))["attempt"] == attempt else None)
        until(lambda: service.job(job)["stage"] == "computing" or None)
        os.kill(_workers(service)[0], signal.SIGKILL)
        until(lambda attempt=attempt: service.job(job)["attempt"] > attempt or service.job(job)["error"] or None)
    failed = service.ended(job)
    assert (failed["state"], failed["attempt"], failed["error"]["code"]) == ("failed", 2, "worker_died")
    after = service.ended(service.send(scan_bytes(folder=tmp_path)))
    assert after["state"] == "done"


def test_a_killed_service_goes_on_where_it_was(start: Callable[..., Running], tmp_path: Path) -> None:
    first = start()
    image = _large(tmp_path)
    (worker,) = until(lambda: _workers(first) or None)
    # Halted, so that the job is in progress when the service is killed, whoever is faster.
    os.kill(worker, signal.SIGSTOP)
    try:
        jobs = [first.send(image), first.send(scan_bytes(folder=tmp_path))]
        until(lambda: first.job(jobs[0])["state"] == "running" or None)
        first.stop(signal.SIGKILL)
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{worker}/exe").exists() or None)
    second = start()
    ended = [second.ended(job) for job in jobs]
    assert [(job["state"], job["attempt"]) for job in ended] == [("done", 2), ("done", 1)]
    assert second.http.get(ended[0]["results"][0]["href"]).status_code == 200
    assert not list((tmp_path / "serve" / "jobs").glob("*/attempt-*"))
    assert not list((tmp_path / "serve" / "jobs").glob("*/input"))


def test_cancel_time_limit_and_a_stop_in_the_middle(start: Callable[..., Running], tmp_path: Path) -> None:
    image = write_endless(tmp_path).read_bytes()
    service = start("--stop-time", "0.1s")
    until(lambda: _workers(service) or None)
    first = service.send(image)
    until(lambda: service.job(first)["state"] == "running" or None)
    assert service.http.post(f"/api/v1/jobs/{first}/cancel").json()["state"] == "cancelled"
    second = service.send(image)
    until(lambda: service.job(second)["state"] == "running" or None)
    assert service.job(first)["state"] == "cancelled"
    assert service.stop(signal.SIGTERM) == 75
    assert "1 jobs wait; the same command goes on" in service.log.read_text()
    again = start("--max-job-time", "0.2s")
    failed = again.ended(second)
    assert (failed["state"], failed["attempt"], failed["error"]["code"]) == ("failed", 1, "time_limit")
    assert again.stop(signal.SIGINT) == 0


def test_two_services_do_not_share_a_folder(start: Callable[..., Running], tmp_path: Path, tiny_bundle: Path) -> None:
    start()
    command = [sys.executable, "-m", "sagittal", "serve", str(tiny_bundle), "--folder", str(tmp_path / "serve")]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and "another 'sagittal serve' works there" in done.stderr
    done = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True)
    assert done.returncode == 2 and "no API key" in done.stderr
