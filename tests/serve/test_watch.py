"""A watch over a place that fails, fills slowly, and forgets; jobs are done by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import TestClient, error_of, service, until

from sagittal.errors import PlanError, ResourceError, SagittalError
from sagittal.serve.arrivals import Arrival
from sagittal.serve.jobs import JobError, Outcome, ResultFile
from sagittal.serve.service import Service
from sagittal.serve.settings import ApiKey, WatchSettings, hash_of_key, settings_of
from sagittal.serve.watch import MAX_TRIES, OUTBOX, RESULT, FolderPlace, Watch
from sagittal.serve.watch_state import Watched, WatchStore
from sagittal.volumes import Volume

from dicom_scans import SECRET, write_series  # isort: skip - beside the tests of the readers

RULE = WatchSettings(rule="modality=CT,description~liver", folder=Path("/nowhere"), every_s=1)


class Shelf:
    """A place in memory, and what was put there."""

    def __init__(self, *arrivals: Arrival) -> None:
        self.arrivals = list(arrivals)
        self.stored: list[tuple[str, bytes]] = []
        self.errors: dict[str, Exception] = {}
        self.comes = 0
        self.dies_after_store = False

    def find(self) -> tuple[Arrival, ...]:
        return tuple(self.arrivals)

    def fetch(self, service: Service, watched: Watched, folder: Path) -> int:
        if watched.series_uid in self.errors:
            raise self.errors[watched.series_uid]
        (folder / "input/0").mkdir(parents=True)
        (folder / "input/0/000000.dcm").write_bytes(b"slice")
        return self.comes or watched.instances

    def store(self, watched: Watched, file: Path) -> None:
        self.stored.append((watched.series_uid, file.read_bytes()))
        if self.dies_after_store:
            raise KeyboardInterrupt  # nothing of ours catches it, as if the process were killed


def liver(uid: str = "1.2.3", instances: int = 3) -> Arrival:
    return Arrival(uid, "1.2", "CT", "Liver", instances=instances)


def end_job(held: Service, content: bytes = b"segmentation", error: JobError | None = None) -> None:
    """Do what a worker does with the job that waits longest."""
    job = held.store.claim("worker")
    assert job is not None and job.source == "watch" and job.owner == "" and job.options.formats == ("seg",)
    assert job.input.dicom and (held.settings.job_folder(job.id) / job.input.files[0]).is_dir()
    if error is not None:
        assert held.store.fail(job.id, "worker", error)
        return
    folder = held.settings.job_folder(job.id) / "results"
    folder.mkdir()
    (folder / RESULT).write_bytes(content)
    file = ResultFile(name=RESULT, format="seg", media_type="application/dicom", bytes=len(content), sha256="a" * 64)
    assert held.store.finish(job.id, "worker", Outcome(results=(file,)))


LATER = time.time() + 1e6


def state(watch: Watch, uid: str = "1.2.3") -> Watched:
    found = watch.store.get(uid)
    assert found is not None
    return found


def test_a_series_is_waited_for_then_segmented_and_stored_once(client: TestClient) -> None:
    held, shelf = service(client), Shelf(liver(instances=1), liver("1.2.9"))
    shelf.arrivals += [
        Arrival("1.2.4", "1.2", "CT", "Head", instances=3),
        Arrival("1.2.5", "1.2", "SEG", "liver", instances=1),
        Arrival("../../1", "1.2", "CT", "liver", instances=3),
    ]
    watch = Watch(held, RULE, shelf)
    shelf.arrivals[1] = Arrival("1.2.9", "1.2", "MR", "liver", instances=3)
    watch.look()
    shelf.arrivals[0] = liver(instances=3)
    watch.look()
    assert watch.store.counts() == {}
    watch.look()
    assert watch.store.counts() == {"found": 1}
    watch.advance()
    assert state(watch).state == "computing" and held.store.counts()["queued"] == 1
    watch.advance()
    end_job(held)
    watch.advance()
    assert shelf.stored == [("1.2.3", b"segmentation")] and state(watch).state == "done"
    for _ in range(3):
        watch.look()
        watch.advance(LATER)
    watch.stop()
    again = Watch(held, RULE, shelf)
    for _ in range(3):
        again.look()
        again.advance(LATER)
    assert len(shelf.stored) == 1 and sum(held.store.counts().values()) == 1
    log = held.settings.audit_file.read_text()
    assert all(action in log for action in ("watch_found", "watch_fetched", "watch_stored")) and "1.2.3" not in log


def test_whatever_dies_in_between_is_done_again_and_comes_to_the_same(client: TestClient) -> None:
    held, shelf = service(client), Shelf(liver())
    watch = Watch(held, RULE, shelf)
    watch.look()
    watch.look()
    # The job was made, but its note was not written.
    found = state(watch)
    watch.advance()
    assert watch.store.change(state(watch), state="found", job=None)
    watch.advance()
    assert held.store.counts()["queued"] == 1 and state(watch).job is not None and found.job is None
    watch.stop()
    watch = Watch(held, RULE, shelf)
    end_job(held)
    shelf.dies_after_store = True
    with pytest.raises(KeyboardInterrupt):
        watch.advance()
    watch.stop()
    shelf.dies_after_store = False
    watch = Watch(held, RULE, shelf)
    assert state(watch).state == "storing"
    watch.advance()
    # The very same file: its UIDs are the same, and the place has one object.
    assert state(watch).state == "done" and len(set(shelf.stored)) == 1 and len(shelf.stored) == 2


def test_an_error_is_tried_again_later_and_later_then_stated_and_blocks_nobody(client: TestClient) -> None:
    held, shelf = service(client), Shelf(liver("1.2.1"), liver("1.2.2"), liver("1.2.3"))
    shelf.errors = {"1.2.1": ResourceError("refused", code="pacs"), "1.2.2": RuntimeError(SECRET)}
    watch = Watch(held, RULE.replace(every_s=600), shelf)
    watch.look()
    watch.look()
    watch.advance()
    assert state(watch).state == "computing" and state(watch, "1.2.1").code == "pacs"
    assert state(watch, "1.2.2").code == "bug"
    before = state(watch, "1.2.1").next_try
    assert 0 < before - time.time() <= 600
    watch.advance()
    assert state(watch, "1.2.1").tries == 1
    for _ in range(MAX_TRIES):
        watch.advance(LATER)
    assert state(watch, "1.2.1").state == "failed" == state(watch, "1.2.2").state
    assert state(watch, "1.2.1").next_try > before + 10
    end_job(held, error=JobError(type="DataError", code="spacing", message="x"))
    watch.advance(LATER)
    assert (state(watch).state, state(watch).code) == ("failed", "spacing")
    assert "watch_failed" in held.settings.audit_file.read_text()


def test_what_passes_by_itself_is_waited_for_without_end(client: TestClient) -> None:
    held, shelf = service(client), Shelf(liver())
    shelf.errors = {"1.2.3": ResourceError("away", code="pacs_unreachable")}
    watch = Watch(held, RULE, shelf)
    watch.look()
    watch.look()
    for _ in range(3 * MAX_TRIES):
        watch.advance(LATER)
    assert state(watch).state == "found" and 60 < state(watch).next_try - time.time() <= 3600
    # Nor does the wait leave fewer tries for what does not pass.
    shelf.errors = {"1.2.3": ResourceError("refused", code="pacs")}
    for _ in range(MAX_TRIES - 1):
        watch.advance(LATER)
    assert (state(watch).state, state(watch).tries) == ("found", MAX_TRIES - 1)
    # More images came than there were when the series was found.
    shelf.errors, shelf.comes = {}, 5
    watch.advance(LATER)
    assert state(watch).code == "still_arriving" and state(watch).instances == 5
    assert not list(held.settings.uploads_folder.iterdir())
    watch.advance(LATER)
    assert state(watch).state == "computing"
    # Its job was deleted by hand: it is made again.
    held.store.cancel(state(watch).job or "")
    held.store.delete(state(watch).job or "")
    watch.advance(LATER)
    watch.advance(LATER)
    assert state(watch).state == "computing" and state(watch).round == 2


def test_the_api_tells_of_it_and_begins_anew_what_failed(client: TestClient) -> None:
    assert client.get("/api/v1/watch").json() == {"watching": False, "counts": {}, "series": []}
    error_of(client.post("/api/v1/watch/1.2.3/retry"), 404, "not_found")
    held, shelf = service(client), Shelf(liver())
    held.watch = watch = Watch(held, RULE, shelf)
    watch.look()
    watch.look()
    error_of(client.post("/api/v1/watch/1.2.3/retry"), 404, "not_found")
    watch.advance()
    held.store.cancel(state(watch).job or "")
    watch.advance()
    told = client.get("/api/v1/watch").json()
    assert told["counts"] == {"failed": 1} and told["series"][0]["code"] == "cancelled"
    assert client.post("/api/v1/watch/1.2.3/retry").status_code == 204
    watch.advance()
    assert state(watch).state == "computing" and state(watch).round == 2


def test_a_key_sees_how_a_watch_goes_but_neither_its_jobs_nor_whose_series_they_are(
    served: Callable[..., TestClient],
) -> None:
    client = served(api_keys=(ApiKey(name="ward", sha256=hash_of_key(SECRET * 4)),))
    held, shelf, ward = service(client), Shelf(liver()), {"X-API-Key": SECRET * 4}
    held.watch = watch = Watch(held, RULE, shelf)
    watch.look()
    watch.look()
    watch.advance()
    end_job(held)
    job = state(watch).job
    assert client.get("/api/v1/jobs", headers=ward).json()["jobs"] == []
    for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", ""), ("GET", f"/results/{RESULT}")):
        error_of(client.request(method, f"/api/v1/jobs/{job}{path}", headers=ward), 404, "not_found")
    told = client.get("/api/v1/watch", headers=ward).json()
    (row,) = told["series"]
    assert told["counts"] == {"computing": 1} and row["state"] == "computing" and job is not None
    assert (row["series_uid"], row["study_uid"], row["job"]) == (None, None, None)
    watch.advance()
    assert shelf.stored == [("1.2.3", b"segmentation")]


def test_a_folder_is_watched_and_gets_the_segmentation(client: TestClient, tmp_path: Path) -> None:
    held, folder = service(client), tmp_path / "in"
    folder.mkdir()
    place = FolderPlace(folder)
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "half.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 20)

    def change(data: Any, index: int) -> None:
        data.StudyInstanceUID, data.SeriesDescription = "1.2.3", "LIVER"

    scan = Volume(np.zeros((1, 4, 5, 6), np.int16), np.eye(4))
    write_series(folder / "a", scan, change=change, series_uid="1.2.3.1", modality="CT")
    write_series(folder / OUTBOX, scan, change=change, series_uid="1.2.3.2", modality="CT")
    watch = Watch(held, RULE, place)
    watch.look()
    found = place.find()
    assert [(each.series_uid, each.instances, each.modality) for each in found] == [("1.2.3.1", 4, "CT")]
    with (folder / "a" / "000_1.dcm").open("ab") as file:
        file.write(b"\0\0")
    watch.look()
    assert watch.store.counts() == {}
    watch.look()
    watch.advance()
    end_job(held)
    watch.advance()
    assert (folder / OUTBOX / "1.2.3.1.seg.dcm").read_bytes() == b"segmentation"
    (folder / OUTBOX / "1.2.3.1.seg.dcm").unlink()
    folder.rename(tmp_path / "gone")
    with pytest.raises(ResourceError, match="not there"):
        watch.look()


def test_settings_and_rules_that_make_no_sense(client: TestClient, tmp_path: Path) -> None:
    def settings(**given: Any) -> WatchSettings:
        return settings_of(WatchSettings, rule="modality=CT", **given)

    for given in (
        {},
        {"folder": tmp_path, "dicomweb": "http://a/b"},
        {"dicomweb": "ftp://a/b"},
        {"dicomweb": "http://user:word@a/b"},
        {"dicomweb": "a/b"},
    ):
        with pytest.raises(PlanError, match="expected"):
            settings(**given)
    assert SECRET not in repr(settings(dicomweb="http://a/b", credentials=f"a:{SECRET}"))
    with pytest.raises(PlanError, match="no such model"):
        Watch(service(client), RULE.replace(rule="modality=CT,model=none"), Shelf())


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = WatchStore(tmp_path / "watch.sqlite")
    store._rows.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(SagittalError, match="newer version"):
        WatchStore(tmp_path / "watch.sqlite")
    (tmp_path / "other").write_text("no database, " * 100)
    with pytest.raises(ResourceError, match="can't keep"):
        WatchStore(tmp_path / "other")


def test_the_watch_runs_by_itself_and_goes_on_after_a_place_that_failed(
    served: Callable[..., TestClient], tmp_path: Path
) -> None:
    client = served(watch=RULE.replace(folder=tmp_path / "later", every_s=0.02))
    held = service(client)
    time.sleep(0.1)

    def change(data: Any, index: int) -> None:
        data.StudyInstanceUID, data.SeriesDescription = "1.2.3", "LIVER"

    scan = Volume(np.zeros((1, 4, 5, 6), np.int16), np.eye(4))
    # All at once: of files that come slowly the watch may well take the first ones for the whole series.
    write_series(tmp_path / "made", scan, change=change, series_uid="1.2.3.1", modality="CT")
    (tmp_path / "made").rename(tmp_path / "later")
    until(lambda: held.store.counts()["queued"] or None)
    end_job(held)
    until(lambda: client.get("/api/v1/watch").json()["counts"] == {"done": 1} or None)
    assert (tmp_path / "later" / OUTBOX / "1.2.3.1.seg.dcm").exists()

    def logged() -> list[str]:
        return [json.loads(line)["action"] for line in held.settings.audit_file.read_text().splitlines()]

    # The line comes after the state.
    until(lambda: "watch_stored" in logged() or None)
    assert logged().count("watch_stored") == 1
