"""A real PACS (Orthanc with its DICOMweb plug-in) that is watched: what comes is segmented and stored, once each."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import highdicom
import httpx
import numpy as np
import pydicom
import pytest
from serving import PATIENCE_S, until

from sagittal.errors import ResourceError
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.settings import Limits
from sagittal.volumes import Volume, read_labels, read_volume

from dicom_scans import SECRET, write_series  # isort: skip - beside the tests of the readers

pytestmark = [pytest.mark.slow, pytest.mark.kill]
USER, WORD = "sagittal", "a word of the test"
STUDY = "1.2.826.0.1.3680043.8.498.7"
TODAY = time.strftime("%Y%m%d")
_PLUGIN = "libOrthancDicomWeb.so"
_FOLDERS = (Path("/usr/share/orthanc/plugins"), Path("/usr/lib/orthanc"))


@dataclass(frozen=True)
class Orthanc:
    """A PACS that was started, and its client."""

    url: str
    http: httpx.Client

    def client(self) -> DicomWeb:
        return DicomWeb(self.url, f"{USER}:{WORD}")

    def objects(self, modality: str) -> list[dict[str, Any]]:
        """Return its objects of a modality, as its own interface tells them."""
        found = self.http.post("/tools/find", json={"Level": "Series", "Query": {"Modality": modality}, "Expand": True})
        return [instance for series in found.json() for instance in series["Instances"]]


@contextmanager
def _held_port() -> Iterator[int]:
    """Give a port that nobody else is given during the block; who asks for it and says so may listen on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


class _Forwarded(BaseHTTPRequestHandler):
    """A request that is handed on."""

    server: Gate

    def _reply(self) -> None:
        # A service that was killed reads no answer.
        with suppress(OSError):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if "Modality=CT" in self.path:
                self.server.looks += 1
                if self.server.arriving:
                    self.server.arriving.pop(0)()
            pacs = http.client.HTTPConnection("127.0.0.1", self.server.pacs, timeout=PATIENCE_S)
            kept = {
                name: value for name in ("Accept", "Authorization", "Content-Type") if (value := self.headers[name])
            }
            pacs.request(self.command, self.path, body or None, kept)
            answer = pacs.getresponse()
            content = answer.read()
            pacs.close()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.getheader("Content-Type", ""))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = _reply  # noqa: N815 - the name that the library looks for

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Gate(ThreadingHTTPServer):
    """Stands before a PACS, so that what comes to it comes between two looks of a watch and not by chance.

    Attributes:
        looks: how many there were.
        arriving: before each look the first of these is called.
    """

    def __init__(self, pacs: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarded)
        self.pacs, self.looks, self.arriving = pacs, 0, list[Callable[[], None]]()
        self.url = f"http://127.0.0.1:{self.server_port}/dicom-web"


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    binary = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
    plugin = next((path for folder in _FOLDERS for path in sorted(folder.glob(f"{_PLUGIN}*"))), None)
    if binary is None or plugin is None:
        reason = "Orthanc or its DICOMweb plug-in is absent (Debian: orthanc, orthanc-dicomweb; 'make system')"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with _held_port() as port:
        yield from _running(binary, plugin, tmp_path_factory.mktemp("orthanc"), port)


def _running(binary: str, plugin: Path, folder: Path, port: int) -> Iterator[Orthanc]:
    settings = {
        "HttpPort": port,
        "DicomServerEnabled": False,
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "Plugins": [str(plugin)],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: WORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([binary, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=(USER, WORD), timeout=PATIENCE_S) as client:

            def answers() -> bool | None:
                assert process.poll() is None, (folder / "log.txt").read_text()
                try:
                    return client.get("/dicom-web/series").status_code == 200 or None
                except httpx.TransportError:
                    return None

            until(answers)
            yield Orthanc(f"http://127.0.0.1:{port}/dicom-web", client)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def _series(folder: Path, number: int, description: str, modality: str = "CT", depth: int = 9) -> tuple[Path, Volume]:
    """Write a series and return its folder and voxels."""
    array = np.random.default_rng(number).integers(0, 200, (1, depth, 12, 10)).astype(np.int16)
    # Oblique, and stored in the order of nobody's liking.
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn[:, ::-1] * [2.0, 1.5, 1.25]
    affine[:3, 3] = [-7, 11, 30]
    volume = Volume(array, affine)

    def change(data: Any, index: int) -> None:
        data.StudyInstanceUID, data.FrameOfReferenceUID = f"{STUDY}.{number}", f"{STUDY}.{number}.9"
        data.SeriesDescription, data.SeriesNumber, data.StudyDescription = description, number, "ABDOMEN"
        data.StudyDate, data.StudyTime, data.BodyPartExamined = TODAY, "120000", "ABDOMEN"
        data.RescaleSlope, data.RescaleIntercept = 1, 0

    return write_series(folder, volume, change=change, series_uid=_uid(number), modality=modality), volume


def _uid(number: int) -> str:
    return f"{STUDY}.{number}.1"


def test_the_client_finds_fetches_and_stores_what_a_real_pacs_has(orthanc: Orthanc, tmp_path: Path) -> None:
    folder, _ = _series(tmp_path / "a", 50, "CHEST", modality="PT")
    files = sorted(folder.glob("*.dcm"))
    pacs = orthanc.client()
    assert pacs.series(("PT",)) == () and pacs.one_series(_uid(50)) is None
    pacs.store(f"{STUDY}.50", files)
    pacs.store(f"{STUDY}.50", files[:2])
    (found,) = pacs.series(("PT",), TODAY)
    assert found == pacs.one_series(_uid(50))
    assert (found.series_uid, found.study_uid, found.modality) == (_uid(50), f"{STUDY}.50", "PT")
    assert (found.description, found.study_description, found.body_part) == ("CHEST", "ABDOMEN", "ABDOMEN")
    assert found.instances == 9 and pacs.series(("PT",), "29990101") == ()
    (tmp_path / "b").mkdir()
    assert pacs.fetch(found.study_uid, found.series_uid, tmp_path / "b", Limits()) == 9
    sent = {pydicom.dcmread(file).SOPInstanceUID: pydicom.dcmread(file).PixelData for file in files}
    assert sent == {
        pydicom.dcmread(file).SOPInstanceUID: pydicom.dcmread(file).PixelData for file in _in(tmp_path / "b")
    }
    for number, limits in enumerate((Limits(files=3), Limits(unpacked_bytes=2000))):
        (tmp_path / f"c{number}").mkdir()
        with pytest.raises(Exception, match="more than"):
            pacs.fetch(found.study_uid, found.series_uid, tmp_path / f"c{number}", limits)
    with _held_port() as nobody:
        for client, code in (
            (DicomWeb(orthanc.url, f"{USER}:wrong"), "pacs_credentials"),
            (DicomWeb(orthanc.url), "pacs_credentials"),
            (DicomWeb(f"http://127.0.0.1:{nobody}/dicom-web", timeout_s=2), "pacs_unreachable"),
            (DicomWeb(orthanc.url.replace("dicom-web", "patients"), f"{USER}:{WORD}"), "pacs_not_found"),
        ):
            with pytest.raises(ResourceError) as caught:
                client.series(("PT",))
            assert caught.value.code == code and WORD not in caught.value.message
    with pytest.raises(ResourceError) as caught:
        pacs.fetch("1.2.3", "1.2.3.4", tmp_path / "b", Limits())
    assert caught.value.code == "pacs_not_found"
    (tmp_path / "no.dcm").write_bytes(b"no DICOM" * 100)
    with pytest.raises(ResourceError, match=r"did not keep|answered with"):
        pacs.store("1.2.3", [tmp_path / "no.dcm"])


def _in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"))


class Watching:
    """`sagittal serve` as a process that watches."""

    def __init__(self, bundle: Path, folder: Path, url: str, log: Path) -> None:
        arguments = [str(bundle), "--folder", str(folder), "--port", "0", "--device", "cpu", "--watch-dicomweb", url]
        rule = ["--watch-rule", "modality=CT,description~liver", "--watch-every", "1"]
        with log.open("ab") as file:
            begun = log.stat().st_size
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sagittal", "serve", *arguments, *rule],
                stderr=file,
                stdout=file,
                env=os.environ | {"SAGITTAL_PACS_CREDENTIALS": f"{USER}:{WORD}"},
            )

        def address() -> str | None:
            told = log.read_bytes()[begun:].decode()
            assert self.process.poll() is None, told
            return told.partition(" on http://")[2].partition("/\n")[0] if " on http://" in told else None

        self.http = httpx.Client(base_url=f"http://{until(address)}", timeout=PATIENCE_S)

    def states(self) -> dict[str, str]:
        return {each["series_uid"]: each["state"] for each in self.http.get("/api/v1/watch").json()["series"]}

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.http.close()
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def gate(orthanc: Orthanc) -> Iterator[Gate]:
    with Gate(int(orthanc.http.base_url.port or 0)) as gate:
        thread = threading.Thread(target=gate.serve_forever, args=(0.01,))
        thread.start()
        yield gate
        gate.shutdown()
        thread.join()


@pytest.fixture
def watching(tmp_path: Path, tiny_bundle: Path, gate: Gate) -> Iterator[Callable[[], Watching]]:
    opened: list[Watching] = []

    def start() -> Watching:
        opened.append(Watching(tiny_bundle, tmp_path / "serve", gate.url, tmp_path / "log.txt"))
        return opened[-1]

    yield start
    for each in opened:
        if each.process.poll() is None:
            each.stop(signal.SIGKILL)


def test_what_comes_is_segmented_and_stored_once_whatever_dies_in_the_middle(
    orthanc: Orthanc, gate: Gate, watching: Callable[[], Watching], tmp_path: Path
) -> None:
    pacs = orthanc.client()
    first, _ = _series(tmp_path / "a", 1, "LIVER 1.0")
    other, _ = _series(tmp_path / "b", 2, "HEAD")
    later, volume = _series(tmp_path / "c", 3, "Liver, late")
    service = watching()
    gate.arriving += [partial(pacs.store, f"{STUDY}.2", _in(other)), partial(pacs.store, f"{STUDY}.1", _in(first))]
    until(lambda: service.states() == {_uid(1): "done"} or None)
    # Slices that come one after the other, each before another look, are one series.
    slices = _in(later)
    gate.arriving += [
        partial(pacs.store, f"{STUDY}.3", part) for part in (*([file] for file in slices[:4]), slices[4:])
    ]
    until(lambda: service.states().get(_uid(3)) or None)
    service.stop(signal.SIGKILL)
    service = watching()
    until(lambda: service.states() == {_uid(1): "done", _uid(3): "done"} or None)
    # As if it had died between the storing and its note.
    job = next(each for each in service.http.get("/api/v1/watch").json()["series"] if each["series_uid"] == _uid(3))
    assert service.stop(signal.SIGTERM) == 0
    with sqlite3.connect(tmp_path / "serve/watch.sqlite") as rows:
        rows.execute("UPDATE series SET state = 'storing' WHERE series_uid = ?", (_uid(3),))
    rows.close()
    service = watching()
    until(lambda: service.states() == {_uid(1): "done", _uid(3): "done"} or None)
    # Two looks more find nothing new, our own objects among it.
    looks = gate.looks
    until(lambda: gate.looks >= looks + 3 or None)
    assert service.states() == {_uid(1): "done", _uid(3): "done"} and len(orthanc.objects("SEG")) == 2
    assert len(service.http.get("/api/v1/jobs").json()["jobs"]) == 2
    _compare(orthanc, service, job["job"], later, volume, tmp_path)
    _ohif(service, volume, tmp_path)
    log = (tmp_path / "log.txt").read_text() + (tmp_path / "serve/audit.jsonl").read_text()
    assert SECRET not in log and WORD not in log and STUDY not in log and "LIVER" not in log


def _compare(orthanc: Orthanc, service: Watching, job: str, series: Path, volume: Volume, tmp_path: Path) -> None:
    """Compare a segmentation, fetched from the PACS, with the label map of its job, voxel by voxel in the world."""
    study = f"{STUDY}.3"
    found = [each for each in orthanc.client().series(("SEG",)) if each.study_uid == study]
    (tmp_path / "seg").mkdir()
    assert len(found) == 1
    assert orthanc.client().fetch(study, found[0].series_uid, tmp_path / "seg", Limits()) == 1
    seg = highdicom.seg.segread(tmp_path / "seg/000000.dcm")
    content = service.http.get(f"/api/v1/jobs/{job}/results/labels.nii.gz").content
    (tmp_path / "labels.nii.gz").write_bytes(content)
    labels, geometry = read_labels(tmp_path / "labels.nii.gz")
    scan = read_volume(series)
    assert np.allclose(geometry.affine, scan.affine) and labels.any()
    # Where each plane lies, in the coordinates of DICOM.
    index_of = {
        tuple(np.round((geometry.affine @ [index, 0, 0, 1])[:3] * [-1, -1, 1], 2)): index
        for index in range(len(labels))
    }
    seen = np.zeros_like(labels)
    names = {segment.SegmentNumber: segment.SegmentLabel for segment in seg.SegmentSequence}
    assert set(names.values()) <= {"class_1", "class_2"}
    for place, frame in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        position = tuple(np.round(np.array(place.PlanePositionSequence[0].ImagePositionPatient, float), 2))
        value = int(names[place.SegmentIdentificationSequence[0].ReferencedSegmentNumber][-1])
        seen[index_of[position]][frame == 1] = value
    assert np.array_equal(seen, labels)
    assert volume.array.shape[1:] == labels.shape


def _ohif(service: Watching, volume: Volume, tmp_path: Path) -> None:
    """Ask as OHIF does: for a series by its UID, with the label map as voxels of two bytes."""
    params = {"result_extension": ".nrrd", "result_dtype": "uint16", "result_compress": False}
    form = {"params": (None, json.dumps(params))}
    answer = service.http.post(f"/infer/tiny?image={_uid(3)}&output=image", files=form)
    assert answer.status_code == 200, answer.text
    (tmp_path / "ohif.nrrd").write_bytes(answer.content)
    found, _ = read_labels(tmp_path / "ohif.nrrd")
    labels, _ = read_labels(tmp_path / "labels.nii.gz")
    assert found.dtype == np.uint16 and np.array_equal(found, labels)
    seg = service.http.post(f"/monai/infer/tiny?image={_uid(3)}&output=dicom_seg", files=form)
    assert seg.headers["content-type"] == "application/dicom"
    made = [pydicom.dcmread(io.BytesIO(seg.content)), pydicom.dcmread(tmp_path / "seg/000000.dcm")]
    # The same content has the same UIDs, which is what keeps a PACS from having it twice.
    assert made[0].SOPInstanceUID == made[1].SOPInstanceUID and made[0].PixelData == made[1].PixelData
    assert service.http.post(f"/infer/tiny?image={STUDY}.99", files=form).status_code == 404
