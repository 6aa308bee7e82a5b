"""The client against a real `sagittal serve`: a file, a DICOM folder, and a service that is killed while it waits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sagittal
from sagittal.client import Client
from sagittal.errors import SagittalError
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.testing.datasets import AFFINE, TINY_SETTINGS
from sagittal.volumes import Volume, read_volume

sys.path.append(str(Path(__file__).parents[1] / "volumes"))

from dicom_scans import SECRET, write_series  # isort: skip - beside the tests of the readers

pytestmark = [pytest.mark.slow, pytest.mark.kill]
_PATIENCE_S = 120.0
KEY = "k" * 32


class Service:
    """A service at an address that stays the same when it is started again."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        # Held as long as the service is used, which may listen on it all the same: while it is started again, nobody
        # else is given the port, nor does a client that asks for it meanwhile come to speak with itself.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}/seg"
        self._command = [
            *(sys.executable, "-m", "sagittal", "serve", str(bundle), "--folder", str(folder), "--device", "cpu"),
            *("--port", str(self.port), "--base-url", "/seg"),
        ]
        self.process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "SAGITTAL_API_KEY": f"ward: {KEY}"}
        return subprocess.Popen(self._command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)

    def is_ready(self) -> bool:
        """Whether a worker waits for jobs."""
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=_PATIENCE_S) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            with error:
                return False

    def worker(self) -> int:
        """Return the id of its worker process."""
        (found,) = (
            int(number)
            for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")
            for number in path.read_text().split()
        )
        return found

    def kill_and_start(self) -> None:
        self.process.kill()
        self.process.wait(_PATIENCE_S)
        self.process = self._begin()

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(_PATIENCE_S)
        self._held.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {name: value for name, value in TINY_SETTINGS.items() if name.startswith(("network.", "patch."))}
    return write_untrained_bundle(tmp_path_factory.mktemp("client") / "tiny", "mednext-s", 3, settings=settings)


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    begun = Service(bundle, tmp_path_factory.mktemp("client_serve"))
    yield begun
    begun.end()


def _scan(shape: tuple[int, int, int]) -> Volume:
    array = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    return Volume(array[None], AFFINE)


def _in_study(data: Any, index: int) -> None:
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.9", "1.2.8"


def _until(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("it took too long")


def test_a_file_gives_the_label_map_of_the_library(service: Service, bundle: Path, tmp_path: Path) -> None:
    scan = _scan((9, 12, 10)).write(tmp_path / "DOE^JOHN.nii.gz")
    client = Client(service.url, KEY)
    assert [model["name"] for model in client.models()] == ["tiny"]
    stages: list[str] = []
    done = client.predict(scan, out=tmp_path / "labels.nii.gz", on_progress=lambda job: stages.append(job["state"]))
    expected = sagittal.load(bundle, device="cpu").predict(scan)
    assert np.array_equal(read_volume(tmp_path / "labels.nii.gz").array[0], expected.array[0])
    assert done.volumes_ml.keys() == {"class_1", "class_2"} and stages[-1] == "done"
    # Nobody else of the machine reads what is kept; what is not, goes after the job has ended.
    _until(lambda: not list(service.folder.glob("jobs/*/input")))
    kept = [path for path in service.folder.rglob("*") if path.exists()]
    assert {"jobs.sqlite", "audit.jsonl", "labels.nii.gz"} <= {path.name for path in kept}
    assert [path.name for path in kept if path.stat().st_mode & 0o077] == []
    client.delete(done.job["id"])
    with pytest.raises(SagittalError, match="API key") as caught:
        Client(service.url, "x" * 32).models()
    assert caught.value.code == "api_key"


def test_a_dicom_folder_travels_without_names_and_comes_back_as_dicom(service: Service, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 500, (1, 7, 12, 10)).astype(np.int16)
    folder = write_series(tmp_path / SECRET, Volume(array, AFFINE), modality="CT", change=_in_study)
    client = Client(service.url, KEY)
    done = client.predict(folder, out=tmp_path / "labels.nii.gz", formats=["seg"])
    assert "labels.seg.dcm" in done.results
    assert client.read(done.job["id"], "labels.seg.dcm")[128:132] == b"DICM"
    assert read_volume(tmp_path / "labels.nii.gz").array.shape == (1, 7, 12, 10)
    assert SECRET not in str(done.job)


def test_waiting_goes_on_when_the_service_is_killed_and_started_again(service: Service, tmp_path: Path) -> None:
    scan = _scan((48, 64, 64)).write(tmp_path / "large.nii.gz")
    client = Client(service.url, KEY, patience_s=2 * _PATIENCE_S)
    client.models()  # it answers
    _until(service.is_ready)
    # Halted, so that the job is in progress when the service is killed, whoever is faster.
    worker = service.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        job = client.submit(scan)
        _until(lambda: client.job(job)["state"] == "running")
        ended: list[dict[str, Any]] = []
        waiting = threading.Thread(target=lambda: ended.append(client.wait(job)))
        waiting.start()
        service.kill_and_start()
    finally:
        os.kill(worker, signal.SIGCONT)
    waiting.join(2 * _PATIENCE_S)
    assert [(each["state"], each["attempt"]) for each in ended] == [("done", 2)]
    assert client.download(job, "labels.nii.gz", tmp_path / "labels.nii.gz").stat().st_size > 0
