"""The plug-ins of 3D Slicer and OHIF against the service: what they send, byte for byte, and what they read of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote_plus

import numpy as np
import pytest
from fastapi import Request
from serving import SHAPE, TestClient, compute, error_of, send, service

from sagittal.serve.jobs import JobError
from sagittal.serve.label_answers import label_answer, multipart
from sagittal.serve.refusals import RefusalError
from sagittal.serve.routes_monai_label import _waited_for
from sagittal.serve.settings import ApiKey, hash_of_key
from sagittal.testing.datasets import AFFINE
from sagittal.volumes import Volume, read_labels

LIMIT = "----------lImIt_of_THE_fIle_eW_$"
"""The boundary that Slicer's plug-in always takes."""


def slicer_form(fields: dict[str, str], files: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    """Return what Slicer's plug-in sends as a form: file names are whole paths of its own machine."""
    lines: list[bytes] = []
    for name, value in fields.items():
        lines += [f"--{LIMIT}".encode(), f'Content-Disposition: form-data; name="{name}"'.encode(), b"", value.encode()]
    for name, (file, content) in files.items():
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="{file}"'
        kind = b"Content-Type: application/octet-stream"
        lines += [f"--{LIMIT}".encode(), disposition.encode(), kind, b"", content]
    body = b"\r\n".join([*lines, f"--{LIMIT}--".encode(), b"", b""])
    return {
        "content": body,
        "headers": {"content-type": f"multipart/form-data; boundary={LIMIT}", "content-length": str(len(body))},
    }


def parts_of(response: Any) -> dict[str, Message]:
    """Return the parts of a form by name, as a reader of MIME sees them."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    whole = BytesParser(policy=HTTP).parsebytes(head + response.content)
    found: dict[str, Message] = {}
    for part in whole.get_payload():
        assert isinstance(part, Message)
        found[str(part.get_param("name", header="content-disposition"))] = part
    return found


@contextmanager
def computing(client: TestClient, labels: bytes) -> Iterator[list[Any]]:
    """Have jobs done by somebody else while the block waits for them."""
    done: list[Any] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if service(client).store.counts()["queued"]:
                done.append(compute(client, labels))
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def labels(tmp_path: Path) -> tuple[np.ndarray, bytes]:
    array = np.zeros(SHAPE, np.uint8)
    array[2:4, 3:6, 1:9] = 2
    path = Volume(array[None], AFFINE).write(tmp_path / "labels.nii.gz")
    return array, path.read_bytes()


class Gone:
    """A request whose client went away."""

    async def is_disconnected(self) -> bool:
        return True


def test_a_request_that_slicer_gives_up_takes_its_scan_along(client: TestClient, nifti: bytes) -> None:
    held = service(client)
    first, second = (send(client, nifti).json()["id"] for _ in range(2))
    assert held.store.claim("worker") is not None
    running, waiting = held.store.get(first), held.store.get(second)
    for job in (waiting, running):
        with pytest.raises(RefusalError) as caught:
            asyncio.run(_waited_for(cast(Request, Gone()), held, job))
        assert (caught.value.code, held.store.state(job.id)) == ("cancelled", "cancelled")
    assert not (held.settings.job_folder(waiting.id) / "input").exists()
    # A worker may be reading it; the supervisor deletes it afterwards.
    assert (held.settings.job_folder(running.id) / "input").exists()
    assert held.settings.audit_file.read_text().count('"cancel"') == 2
    assert 'sagittal_jobs_ended_total{model="tiny",state="cancelled"} 2.0' in held.metrics.text().decode()


def test_what_slicer_reads_of_the_list_of_models(client: TestClient) -> None:
    for path in ("/info/", "/info", "/monai/info/", "/monai/info"):
        told = client.get(path).json()
        # Slicer takes a server that has it at this place for an old one, and stops.
        assert not told.get("config")
        (name, model), *others = told["models"].items()
        assert name == "tiny" and not others
        assert model["type"] == "segmentation" and model["dimension"] == 3 and "esearch" in model["description"]
        assert model["labels"] == {"class_1": 1, "class_2": 2}
        assert told["labels"] == ["background", "class_1", "class_2"]
        assert model["config"] == {"mirror": True, "fast": False, "postprocessing": True}
        assert told["trainers"] == {} and told["strategies"] == {} and told["datastore"]["total"] == 0
    # An answer with 200 would mean that a training runs.
    assert client.get("/train/?check_if_running=true").status_code != 200
    assert client.get("/datastore/?output=all").json() == {"objects": {}}
    assert client.get("/auth/").json() == {"enabled": False}


def test_slicer_sends_a_session_and_gets_a_label_map(
    client: TestClient, nifti: bytes, labels: tuple[np.ndarray, bytes], tmp_path: Path
) -> None:
    sent = client.put(
        "/session/", files=[("files", ("DOE^JOHN.nii.gz", nifti))], data={"client_id": "user-xyz"}
    )  # as python-requests does
    assert sent.status_code == 200, sent.text
    session = sent.json()["session_id"]
    assert sent.json()["session_info"] and client.get(f"/session/{session}").json()["name"] == session
    params = {
        "mirror": False,
        "fast": True,
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
        "client_id": "user-xyz",
    }
    where = f"/infer/tiny?image={quote_plus('DOE^JOHN')}&session_id={session}"
    with computing(client, labels[1]) as done:
        for _ in range(2):
            answer = client.post(where, **slicer_form({"params": json.dumps(params)}, {}))
            assert answer.status_code == 200, answer.text
            parts = parts_of(answer)
            assert list(parts) == ["params", "image"]
            told = json.loads(parts["params"].get_content())
            file = tmp_path / str(parts["image"].get_filename())
            assert file.suffix == ".nrrd" and parts["params"].get_filename() is None
            file.write_bytes(parts["image"].get_payload(decode=True))
            found, geometry = read_labels(file)
            # The only class that is there is the first, which is what Slicer takes it for.
            assert told["label_names"] == {"class_2": 1} and found.dtype == np.uint8
            assert np.array_equal(found, labels[0] // 2) and np.allclose(geometry.affine, AFFINE)
    job = done[0]
    assert len(done) == 2 and job.source == "monailabel" and job.options.fast and not job.options.mirror
    assert told["volumes_ml"] == {"class_1": 1.5} and told["flags"] == ["look"]
    assert client.delete(f"/session/{session}").status_code == 200
    error_of(client.get(f"/session/{session}"), 404, "not_found")
    error_of(client.post(where, **slicer_form({"params": "{}"}, {})), 404, "not_found")
    assert b"DOE" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_kept_scan_is_copied_where_the_disk_knows_no_second_names(
    client: TestClient, nifti: bytes, labels: tuple[np.ndarray, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    session = client.put("/session/", files={"files": nifti}).json()["session_id"]
    with computing(client, labels[1]) as done:
        answer = client.post(f"/infer/tiny?session_id={session}", headers={"content-length": "0"})
    assert answer.status_code == 200, answer.text
    (job,) = done
    held = service(client).settings
    assert (held.uploads_folder / session / "input/0/image.nii.gz").read_bytes() == nifti
    assert not (held.uploads_folder / job.id).exists()


def test_slicer_sends_an_image_under_a_name_that_is_not_kept(
    client: TestClient, nifti: bytes, labels: tuple[np.ndarray, bytes]
) -> None:
    name = "DOE^JOHN: CT/../1"
    where = f"/datastore/?image={quote_plus(name)}"
    path = "/home/doe/slicer/DOE.nii.gz"
    sent = client.put(where, **slicer_form({"params": "{}"}, {"file": (path, nifti)}))
    assert sent.status_code == 200 and sent.json() == {"image": name}
    again = client.put(where, **slicer_form({"params": "{}"}, {"file": (path, nifti)}))
    assert again.status_code == 200
    with computing(client, labels[1]):
        answer = client.post(f"/infer/tiny?image={quote_plus(name)}", **slicer_form({"params": "{}"}, {}))
    assert answer.status_code == 200 and parts_of(answer)["image"].get_filename() == "labels.nii.gz"
    folder = service(client).settings.folder
    assert not [path for path in folder.rglob("*") if "DOE" in path.name]
    error_of(client.post("/infer/tiny?image=other", **slicer_form({"params": "{}"}, {})), 404, "not_found")


def test_the_scan_may_come_with_the_request_and_the_answer_take_every_form(
    client: TestClient, nifti: bytes, labels: tuple[np.ndarray, bytes]
) -> None:
    def ask(output: str, **params: Any) -> Any:
        form = slicer_form({"params": json.dumps(params)}, {"file": ("scan.nii.gz", nifti)})
        return client.post(f"/monai/infer/tiny?output={output}", **form)

    with computing(client, labels[1]):
        assert ask("json").json()["label_names"] == {"class_2": 1}
        image = ask("image")
        assert image.headers["content-disposition"] == 'attachment; filename="labels.nii.gz"'
        assert image.headers["content-type"] == "application/octet-stream"
        raw = gzip.decompress(image.content)
        assert np.array_equal(np.frombuffer(raw[352:], np.uint8).reshape(SHAPE), labels[0])
        # OHIF: voxels of two bytes, not packed, with the model's own values.
        told = ask(
            "all", result_extension=".nrrd", result_dtype="uint16", result_compress=False, restore_label_idx=False
        )
        assert b"Content-Type: application/json" in told.content
        assert b"Content-Type: application/octet-stream" in told.content
        nrrd = parts_of(told)["image"].get_payload(decode=True)
        head, _, voxels = nrrd.partition(b"\n\n")
        assert b"encoding: raw" in head and b"type: ushort" in head
        assert np.array_equal(np.frombuffer(voxels, "<u2").reshape(SHAPE), labels[0])
        answer = json.loads(parts_of(told)["params"].get_content())
        assert answer["label_names"] == {"class_2": 2} and answer["centroids"] == {}
        error_of(ask("all", result_extension=".exe"), 422, "invalid")
        error_of(ask("all", result_dtype="object"), 422, "invalid")
        error_of(ask("image", mirror="yes"), 422, "invalid")
        error_of(ask("dicom_seg"), 422, "formats")
    error_of(client.post("/infer/none", **slicer_form({"params": "{}"}, {})), 404, "unknown_model")
    error_of(client.post("/infer/tiny", **slicer_form({"params": "{}"}, {})), 422, "no_image")
    error_of(client.post("/infer/tiny", **slicer_form({"params": "[]"}, {})), 422, "invalid")
    error_of(client.post("/infer/tiny", **slicer_form({"params": "{"}, {})), 422, "invalid")
    error_of(client.put("/session/", **slicer_form({}, {"files": ("a.nii", b"no scan")})), 415, "unknown_format")
    assert not list(service(client).settings.uploads_folder.iterdir())


def test_a_job_that_fails_says_why(client: TestClient, nifti: bytes) -> None:
    held = service(client)

    def fail() -> None:
        while (job := held.store.claim("worker")) is None:
            time.sleep(0.01)
        held.store.fail(job.id, "worker", JobError(type="DataError", code="spacing", message="too thick."))

    thread = threading.Thread(target=fail)
    thread.start()
    answer = client.post("/infer/tiny", **slicer_form({}, {"file": ("a.nii.gz", nifti)}))
    thread.join()
    assert error_of(answer, 422, "spacing") == "too thick."


def test_with_keys_a_session_belongs_to_its_key(
    served: Callable[..., TestClient], nifti: bytes, labels: tuple[np.ndarray, bytes]
) -> None:
    keys = tuple(ApiKey(name=name, sha256=hash_of_key(name * 16)) for name in ("a", "b"))
    client = served(api_keys=keys)
    error_of(client.get("/info/"), 401, "api_key")
    mine, other = ({"Authorization": f"Bearer {name * 16}"} for name in ("a", "b"))
    assert client.get("/info/", headers=mine).status_code == 200
    # What Slicer does where a key is needed: it asks for a password.
    assert client.get("/auth/").json() == {"enabled": True}
    error_of(client.post("/auth/token", data={"username": "x", "password": "wrong"}), 401, "api_key")
    error_of(client.post("/auth/token", content=b"\xff"), 401, "api_key")
    token = client.post("/monai/auth/token", data={"username": "x", "password": "a" * 16, "grant_type": "password"})
    assert token.json() == {"access_token": "a" * 16, "token_type": "Bearer"}
    assert client.get("/auth/token/valid", headers=mine).json() == {"username": "a"}
    error_of(client.get("/auth/token/valid"), 401, "api_key")
    session = client.put("/session/", files={"files": nifti}, headers=mine).json()["session_id"]
    assert client.get(f"/session/{session}", headers=mine).status_code == 200
    error_of(client.get(f"/session/{session}", headers=other), 404, "not_found")
    client.put("/datastore/?image=one", files={"file": nifti}, headers=mine)
    where = "/infer/tiny?image=one"
    error_of(client.post(where, files={"params": (None, "{}")}, headers=other), 404, "not_found")
    with computing(client, labels[1]):
        assert client.post(where, files={"params": (None, "{}")}, headers=mine).status_code == 200


def test_label_values_are_counted_only_where_one_is_missing(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.uint16)
    array[0], array[1] = 1, 300
    file = Volume(array[None], AFFINE).write(tmp_path / "labels.nii.gz")
    values = {"far": 300, "gone": 7, "near": 1}

    def made(is_counted: bool, **params: Any) -> tuple[dict[str, int], np.ndarray]:
        answer = label_answer(file, values, params, is_counted=is_counted)
        (tmp_path / answer.name).write_bytes(answer.content)
        return answer.label_names, read_labels(tmp_path / answer.name)[0]

    names, found = made(False, result_extension=".mha")
    assert list(names.items()) == [("near", 1), ("far", 300)] and np.array_equal(found, array)
    # 300 does not fit into what was asked for.
    names, found = made(False, result_extension=".nrrd", result_dtype="uint8")
    assert np.array_equal(found, array)
    names, found = made(True, result_extension=".seg.nrrd", result_dtype="uint8")
    assert list(names.items()) == [("near", 1), ("far", 2)] and np.array_equal(found, np.where(array == 300, 2, array))
    assert found.dtype == np.uint8
    with pytest.raises(RefusalError, match=r"Known are .nii.gz"):
        made(True, result_extension=7)
    body, kind = multipart({"a": 1}, label_answer(file, values, {}, is_counted=True))
    assert body.startswith(b"--" + kind.partition("boundary=")[2].encode())
