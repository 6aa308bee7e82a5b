"""What a worker makes of a job, and what it never says."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from serving import TINY, TestClient, scan_bytes, send, service, until

from dicom_scans import SECRET, write_series  # isort: skip - beside the tests of the readers
from sagittal.bundle import read_bundle
from sagittal.errors import DataError, ResourceError, SagittalError
from sagittal.serve.engines import WarmEngines
from sagittal.serve.jobs import InputRef, Job, JobOptions, Outcome
from sagittal.serve.supervisor import WORKER
from sagittal.serve.worker import JobTask, Task, Worker, failure_of, plain_message
from sagittal.serve.worker_process import WorkerProcess
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.testing.datasets import AFFINE
from sagittal.volumes import Volume, read_volume


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def worker(tiny_bundle: Path, told: list[dict[str, Any]]) -> Worker:
    made = Worker(_task(tiny_bundle), lambda **message: told.append(message))
    assert "cpu" in made.warm_up()
    return made


def _task(bundle: Path) -> Task:
    return Task(
        models={bundle.name: str(bundle)},
        device="cpu",
        engine="auto",
        precision="fp32",
        threads=1,
        memory_gib=None,
        cache_folder=None,
        unpacked_bytes=1 << 30,
        allowed_folders=(),
        debug=False,
    )


def _run(worker: Worker, client: TestClient, job: str, **options: Any) -> tuple[Outcome, Path]:
    held = service(client)
    stored: Job = held.store.get(job)
    folder = held.settings.job_folder(job)
    out = folder / "attempt"
    chosen = stored.options.replace(**options)
    task = JobTask(id=job, model="tiny", options=chosen, input=stored.input, folder=str(folder), out=str(out))
    return worker.run(task), out


def _in_study(data: Any, index: int) -> None:
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.9", "1.2.8"


def _study(tmp_path: Path) -> bytes:
    """Return a zip of a study with two series, the second one larger."""
    rng, target = np.random.default_rng(0), BytesIO()
    for number, depth in ((1, 5), (2, 9)):
        volume = Volume(rng.integers(0, 500, (1, depth, 12, 10)).astype(np.int16), AFFINE)
        write_series(tmp_path / f"s{number}", volume, series_uid=f"1.2.3.{number}", modality="CT", change=_in_study)
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(tmp_path.glob("s*/*.dcm")):
            archive.write(path, f"{SECRET}/{path.parent.name}/{path.name}")
    return target.getvalue()


def test_a_job_tells_how_far_it_is_and_lists_what_it_made(
    worker: Worker, client: TestClient, nifti: bytes, told: list[dict[str, Any]]
) -> None:
    told.clear()
    outcome, out = _run(worker, client, send(client, nifti).json()["id"])
    assert [message["stage"] for message in told][:2] == ["reading", "computing"] and told[-1]["stage"] == "writing"
    shares = [message["progress"] for message in told]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert {file.name: file.bytes for file in outcome.results} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    assert json.loads((out / "volumes.json").read_text())["volumes_ml"] == outcome.volumes_ml


def test_options_change_what_is_made(worker: Worker, client: TestClient, nifti: bytes) -> None:
    job = send(client, nifti).json()["id"]
    whole, out = _run(worker, client, job)
    labels = read_volume(out / "labels.nii.gz").array
    one, out = _run(worker, client, job, subset=("class_2",))
    assert one.volumes_ml.keys() == {"class_2"} < whole.volumes_ml.keys()
    assert np.array_equal(read_volume(out / "labels.nii.gz").array, np.where(labels == 2, 2, 0))
    plain, out = _run(worker, client, job, mirror=False, fast=True)
    assert not np.array_equal(read_volume(out / "labels.nii.gz").array, labels) and plain.results[0] != whole.results[0]


def test_a_study_becomes_every_dicom_object_and_its_series_can_be_named(
    worker: Worker, client: TestClient, tmp_path: Path
) -> None:
    study = _study(tmp_path)
    listed = client.post("/api/v1/series", files={"image": study})
    assert listed.status_code == 201, listed.text
    found = {each["series_uid"]: each for each in listed.json()["series"]}
    assert {uid: each["shape"] for uid, each in found.items()} == {"1.2.3.1": [5, 12, 10], "1.2.3.2": [9, 12, 10]}
    options = {"series_uid": "1.2.3.1"}
    sent = client.post("/api/v1/jobs", json={"upload": listed.json()["upload"], "options": options})
    assert sent.status_code == 202, sent.text
    outcome, out = _run(worker, client, sent.json()["id"])
    names = {file.name for file in outcome.results}
    assert names == {
        *("labels.nii.gz", "image.nii.gz", "volumes.json", "preview.png"),
        *("labels.seg.dcm", "labels.labelmap.dcm", "labels.rtstruct.dcm", "overview.dcm", "volumes.sr.dcm"),
    }, outcome.flags
    assert read_volume(out / "labels.nii.gz").array.shape == (1, 5, 12, 10)
    again = client.post("/api/v1/jobs", json={"upload": listed.json()["upload"]})
    assert again.status_code == 404
    sent = send(client, study, options={"formats": ["seg"], "series_uid": "1.2.3.2"})
    outcome, out = _run(worker, client, sent.json()["id"])
    assert {file.format for file in outcome.results} == {"nifti", "json", "png", "seg"}
    assert read_volume(out / "labels.nii.gz").array.shape[1] == 9
    assert all(SECRET not in flag for flag in outcome.flags)


@pytest.mark.parametrize("other", ["seg", "labelmap"])
def test_the_report_refers_to_whichever_segmentation_is_written(
    worker: Worker, client: TestClient, tmp_path: Path, other: str
) -> None:
    options = {"formats": [other, "sr"], "series_uid": "1.2.3.1"}
    _, out = _run(worker, client, send(client, _study(tmp_path), options=options).json()["id"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = highdicom.sr.srread(out / "volumes.sr.dcm").content.get_volumetric_roi_measurement_groups()
    referred = {group.referenced_segment.referenced_sop_instance_uid for group in groups}
    assert referred == {pydicom.dcmread(out / f"labels.{other}.dcm").SOPInstanceUID}


@pytest.mark.parametrize("series_uid", [None, "1.2.3.1", "1.2.3.1,1.2.3.1"])
def test_a_study_of_one_series_is_no_scan_of_two_channels(tmp_path: Path, series_uid: str | None) -> None:
    path = write_untrained_bundle(tmp_path / "two", "mednext-s", 3, channels=2, settings=TINY)
    volume = Volume(np.zeros((1, 5, 12, 10), np.int16), AFFINE)
    write_series(tmp_path / "job/input/0", volume, series_uid="1.2.3.1")
    worker = Worker(_task(path), lambda **message: None)
    task = JobTask(
        id="1",
        model=path.name,
        options=JobOptions(series_uid=series_uid),
        input=InputRef(kind="upload", files=("input/0", "input/0"), dicom=True),
        folder=str(tmp_path / "job"),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(DataError) as caught:
        worker.read(task, read_bundle(path))
    failure = failure_of(caught.value, task)
    assert failure["code"] == "channel_count"
    assert failure["message"].startswith("image 1: series (MR, 5 x 12 x 10) would be both channel_0 and channel_1.")


def test_a_scan_that_cannot_be_read_fails_without_a_path(worker: Worker, client: TestClient, nifti: bytes) -> None:
    job = send(client, nifti).json()["id"]
    held = service(client)
    folder = held.settings.job_folder(job)
    (folder / "input/0/image.nii.gz").write_bytes(nifti[:200])
    with pytest.raises(SagittalError) as caught:
        _run(worker, client, job)
    task = JobTask(
        id=job,
        model="tiny",
        options=JobOptions(),
        input=held.store.get(job).input,
        folder=str(folder),
        out=str(folder / "attempt"),
    )
    failure = failure_of(caught.value, task)
    assert failure["message"].startswith("image 1: ") and str(folder) not in failure["message"]


def test_messages_lose_paths_and_names_of_files(tmp_path: Path) -> None:
    scan = tmp_path / "a b" / "DOE^JOHN, 1970.nii.gz"
    task = JobTask(
        id="1",
        model="m",
        options=JobOptions(),
        input=InputRef(kind="path", files=(str(scan),)),
        folder="/srv/jobs/1",
        out="/srv/jobs/1/attempt",
    )
    text = f"{scan}: can't be read; {scan.name} in /srv/jobs/1/attempt/x.dcm and /etc/pass, 5 mm/s, and/or 1/2. Copy it"
    assert plain_message(text, task) == (
        "image 1: can't be read; a file in a file and a file, 5 mm/s, and/or 1/2. Copy it"
    )


def test_a_bug_is_told_by_its_place_alone() -> None:
    task = JobTask(id="1", model="m", options=JobOptions(), input=InputRef(kind="upload", files=("a",)), folder="/f", out="/f/o")  # fmt: skip # noqa: E501
    try:
        raise KeyError("DOE^JOHN")
    except KeyError as error:
        failure = failure_of(error, task)
    assert failure["code"] == "bug" and "DOE" not in json.dumps(failure)
    assert re.search(r"KeyError at test_worker\.py:\d+ test_a_bug", failure["where"])
    assert failure_of(MemoryError(), task)["code"] == "memory"
    assert failure_of(DataError("x", code="y"), task) == {"type": "DataError", "code": "y", "message": "x"}


_HIDDEN = """
import sys
from pathlib import Path

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Hidden())
from sagittal.serve import running
from sagittal.serve.worker import Task, Worker
task = Task(models={"tiny": sys.argv[1]}, device="cpu", engine="auto", precision="fp32", threads=1, memory_gib=None,
            cache_folder=None, unpacked_bytes=1, allowed_folders=(), debug=False)
print(Worker(task, print).warm_up())
"""


def test_the_service_needs_no_torch_where_openvino_computes(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="a service without PyTorch needs OpenVINO")
    done = subprocess.run([sys.executable, "-c", _HIDDEN, str(tiny_bundle)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "cpu (openvino)\n"), done.stderr


class _Engine:
    def __init__(self, size: int) -> None:
        self.size = size

    def memory(self, window: Any) -> Any:
        return type("Memory", (), {"fixed_bytes": self.size})()


def test_engines_stay_as_long_as_they_fit(tiny_bundle: Path) -> None:
    bundle, loaded = read_bundle(tiny_bundle), []

    def load(given: Any) -> Any:
        loaded.append(given)
        return _Engine(40)

    engines = WarmEngines(load, 100)
    for name in ("a", "b", "a", "c", "b"):
        engines.get((name, False), bundle)
    # Loaded: a, b, c for which b had to go since a was used last, and b again.
    assert len(loaded) == 4 and engines.keys == (("c", False), ("b", False)) and engines.size == 80
    assert engines.others_bytes(("b", False)) == 40 and not engines.has_room(21)
    assert engines.keep_only(("b", False)) and not engines.keep_only(("b", False))


def test_the_size_of_a_scan_is_looked_at_before_its_voxels(worker: Worker, client: TestClient, tmp_path: Path) -> None:
    job = send(client, scan_bytes(folder=tmp_path)).json()["id"]
    small = Worker.__new__(Worker)
    vars(small).update(vars(worker), _task=worker._task.replace(unpacked_bytes=100))
    with pytest.raises(DataError, match="more than the 100") as caught:
        _run(small, client, job)
    assert caught.value.code == "too_large"


def test_a_scan_beyond_the_memory_is_refused_before_its_voxels(
    worker: Worker, client: TestClient, tmp_path: Path
) -> None:
    job = send(client, scan_bytes(folder=tmp_path)).json()["id"]
    small = Worker.__new__(Worker)
    vars(small).update(vars(worker), _task=worker._task.replace(memory_gib=1e-6))
    with pytest.raises(ResourceError, match="has for a job") as caught:
        _run(small, client, job)
    assert caught.value.code == "memory"


def test_a_packed_file_that_goes_on_after_its_voxels_is_not_read_to_its_end(
    worker: Worker, client: TestClient, tmp_path: Path
) -> None:
    plain = scan_bytes(suffix=".nii", folder=tmp_path)
    flood = gzip.compress(plain, 1) + gzip.compress(bytes(80 << 20), 9)
    assert len(flood) < 1 << 20
    job = send(client, flood).json()["id"]
    with pytest.raises(DataError, match="bytes follow the"):
        _run(worker, client, job)


def test_signals_that_ask_to_end_leave_a_worker_to_its_service(tiny_bundle: Path, tmp_path: Path) -> None:
    child = WorkerProcess(WORKER, _task(tiny_bundle), debug=False)
    try:
        assert "ready" in until(lambda: child.next(1.0))
        for number in (signal.SIGTERM, signal.SIGINT):
            child._process.send_signal(number)
        given = InputRef(kind="upload", files=("input/none.nii",))
        job = JobTask(
            id="1",
            model=tiny_bundle.name,
            options=JobOptions(),
            input=given,
            folder=str(tmp_path),
            out=str(tmp_path / "out"),
        )
        child.send(job.model_dump(mode="json"))
        said: list[dict[str, Any]] = []

        def last() -> dict[str, Any] | None:
            said.append(child.next(1.0) or {})
            return said[-1] if "failed" in said[-1] or child.has_said_all else None

        # A worker that the signals ended would say nothing more.
        assert "failed" in until(last)
    finally:
        child.end()


def test_the_worker_goes_before_the_service_where_memory_runs_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from sagittal.serve.worker import be_first_to_go as go; go(); "
         "print(open('/proc/self/oom_score_adj').read())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == 500
