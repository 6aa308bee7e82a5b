"""A job ends exactly once, whoever does what to it in whatever order."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sagittal.errors import ResourceError
from sagittal.serve.jobs import ENDED, InputRef, Job, JobError, JobOptions, JobStore, Outcome, ResultFile
from sagittal.serve.refusals import RefusalError

INPUT = InputRef(kind="upload", files=("input/0/image.nii.gz",))
ERROR = JobError(type="DataError", code="unreadable", message="can't be read")
FILE = ResultFile(name="labels.nii.gz", format="nifti", media_type="application/gzip", bytes=3, sha256="0" * 64)
WORKERS = ("one", "two")


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = JobStore(tmp_path / "jobs.sqlite")
    yield opened
    opened.close()


def _send(store: JobStore, **more: Any) -> Job:
    return store.submit("model", JobOptions(), INPUT, **more)


class Jobs(RuleBasedStateMachine):
    """Two workers that may die, a service that may die, and callers who cancel: against a plain dictionary."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "jobs.sqlite"

    @initialize()
    def begin(self) -> None:
        self.store = JobStore(self.path)
        self.order: list[str] = []
        self.states: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        self.workers: dict[str, str] = {}
        self.endings: Counter[str] = Counter()

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(target=ids)
    def submit(self) -> str:
        job = _send(self.store).id
        self.order.append(job)
        self.states[job] = "queued"
        return job

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> None:
        waiting = [job for job in self.order if self.states[job] == "queued"]
        found = self.store.claim(worker)
        assert (None if found is None else found.id) == (waiting[0] if waiting else None)
        if found is not None:
            self.attempts[found.id] += 1
            self.states[found.id], self.workers[found.id] = "running", worker
            assert found.attempt == self.attempts[found.id] <= 2

    @rule(job=ids, worker=st.sampled_from(WORKERS), is_good=st.booleans())
    def end(self, job: str, worker: str, is_good: bool) -> None:
        is_own = self.states[job] == "running" and self.workers[job] == worker
        ended = (
            self.store.finish(job, worker, Outcome(volumes_ml={"a": 1.0}, results=(FILE,)))
            if is_good
            else self.store.fail(job, worker, ERROR)
        )
        assert ended == is_own
        if ended:
            self._ends(job, "done" if is_good else "failed")

    @rule(job=ids, worker=st.sampled_from(WORKERS))
    def progress(self, job: str, worker: str) -> None:
        is_own = self.states[job] == "running" and self.workers[job] == worker
        assert self.store.progress(job, worker, 0.5, "computing") == is_own

    @rule(job=ids)
    def cancel(self, job: str) -> None:
        before = self.states[job]
        found = self.store.cancel(job)
        if before in ("queued", "running"):
            self._ends(job, "cancelled")
        assert found.state == self.states[job]

    @rule(worker=st.sampled_from(WORKERS))
    def worker_dies(self, worker: str) -> None:
        self._lost(self.store.requeue_lost(worker), [worker])

    @rule(worker=st.sampled_from(WORKERS))
    def worker_is_stopped(self, worker: str) -> None:
        for job in self.store.release(worker):
            assert job.state == "queued"
            self.states[job.id] = "queued"
            self.attempts[job.id] -= 1

    @rule()
    def service_dies(self) -> None:
        self.store.close()
        self.store = JobStore(self.path)
        self._lost(self.store.recover(), list(WORKERS))

    def _lost(self, found: tuple[Job, ...], workers: list[str]) -> None:
        running = {job for job, state in self.states.items() if state == "running" and self.workers[job] in workers}
        assert {job.id for job in found} == running
        for job in found:
            if self.attempts[job.id] < 2:
                self.states[job.id] = "queued"
            else:
                self._ends(job.id, "failed")
                assert job.error is not None and job.error.code == "worker_died"
            assert job.state == self.states[job.id]

    def _ends(self, job: str, state: str) -> None:
        self.states[job] = state
        self.endings[job] += 1

    @invariant()
    def the_store_agrees_and_nothing_ends_twice(self) -> None:
        found = {job.id: job for job in self.store.jobs(limit=1000)}
        assert {job: each.state for job, each in found.items()} == self.states
        assert all(count == 1 for count in self.endings.values())
        for job in found.values():
            assert (job.state in ENDED) == (job.ended is not None)
            assert bool(job.results) == (job.state == "done")
            assert (job.error is not None) == (job.state == "failed")
            assert (job.worker is not None) == (job.state == "running")
        positions = [found[job].queue_position for job in self.order if self.states[job] == "queued"]
        assert positions == list(range(1, len(positions) + 1))


def test_whatever_happens_a_job_ends_once() -> None:
    quick = hypothesis_settings(max_examples=12, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(Jobs, settings=quick)


def test_two_claimers_never_get_the_same_job(tmp_path: Path) -> None:
    stores = [JobStore(tmp_path / "jobs.sqlite") for _ in range(2)]
    sent = {_send(stores[0]).id for _ in range(30)}
    claimed: list[str] = []

    def work(number: int) -> None:
        while (job := stores[number % 2].claim(f"worker-{number}")) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(sent)
    for store in stores:
        store.close()


def test_the_queue_has_an_end(store: JobStore) -> None:
    for _ in range(2):
        _send(store, most_queued=2)
    with pytest.raises(RefusalError, match="2 jobs wait already") as caught:
        _send(store, most_queued=2)
    assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) > 0
    assert store.claim("one") is not None
    assert _send(store, most_queued=2).state == "queued"


def test_the_same_key_of_the_same_owner_gives_the_same_job(store: JobStore) -> None:
    first = _send(store, owner="a", idempotency_key="k", most_queued=1)
    assert _send(store, owner="a", idempotency_key="k", most_queued=1).id == first.id
    assert _send(store, owner="b", idempotency_key="k").id != first.id
    known = store.known("a", "k")
    assert known is not None and known.id == first.id


def test_owners_see_their_own_jobs_alone(store: JobStore) -> None:
    mine, theirs, nobodys = (_send(store, owner=owner).id for owner in ("a", "b", ""))
    assert [job.id for job in store.jobs(owner="a")] == [mine]
    assert [job.id for job in store.jobs()] == [nobodys, theirs, mine]
    for other in (theirs, nobodys):
        for call in (store.get, store.cancel, store.delete):
            with pytest.raises(RefusalError, match="not found") as caught:
                call(other, owner="a")
            assert caught.value.status == 404
        with pytest.raises(RefusalError, match="not found"):
            store.jobs(after=other, owner="a")
        assert store.state(other) == "queued"


def test_pages_of_a_list(store: JobStore) -> None:
    sent = [_send(store).id for _ in range(5)]
    first = store.jobs(limit=2)
    second = store.jobs(limit=2, after=first[-1].id)
    assert [job.id for job in (*first, *second)] == sent[:0:-1]
    assert store.jobs(state="done") == ()


def test_old_jobs_expire_and_only_ended_ones_are_deleted(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    store = JobStore(tmp_path / "jobs.sqlite", clock=lambda: now)
    old, waiting = _send(store).id, _send(store).id
    store.cancel(old)
    with pytest.raises(RefusalError, match="has not ended") as caught:
        store.delete(waiting)
    assert caught.value.status == 409
    now += timedelta(seconds=100)
    assert store.expire(101) == ()
    assert store.expire(99) == (old,)
    assert store.ids() == {waiting}
    store.cancel(waiting)
    store.delete(waiting)
    assert store.state(waiting) is None and store.counts() == dict.fromkeys(store.counts(), 0)
    store.close()


def test_results_survive_a_restart(store: JobStore, tmp_path: Path) -> None:
    job = _send(store, source="watch")
    store.claim("one")
    outcome = Outcome(volumes_ml={"liver": 1234.5}, flags=("look",), results=(FILE,))
    assert store.finish(job.id, "one", outcome)
    again = JobStore(tmp_path / "jobs.sqlite")
    found = again.get(job.id)
    assert (found.volumes_ml, found.flags, found.results) == (outcome.volumes_ml, outcome.flags, outcome.results)
    assert found.source == "watch" and found.progress == 1.0
    again.close()


def test_transitions_wait_for_the_disk(store: JobStore) -> None:
    (full,) = store._rows.execute("PRAGMA synchronous").fetchone()
    (mode,) = store._rows.execute("PRAGMA journal_mode").fetchone()
    assert (full, mode) == (2, "wal")


def test_a_file_of_a_newer_version_and_no_database_are_refused(tmp_path: Path) -> None:
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as rows:
        rows.execute("PRAGMA user_version = 99")
    rows.close()
    with pytest.raises(ResourceError, match="newer version"):
        JobStore(newer)
    (tmp_path / "none.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(ResourceError, match="can't be kept there"):
        JobStore(tmp_path / "none.sqlite")
