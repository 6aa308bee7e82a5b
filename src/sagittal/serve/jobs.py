"""Jobs that outlive the process: a row each in SQLite, and every step of a job guarded by the state it comes from.

    queued -> running -> done | failed
       ^________|  (lost worker: once)        queued | running -> cancelled

A transition is one UPDATE that names the state, and for running jobs the worker, that it comes from: of two processes
that would end a job, one finds no row. So a job ends exactly once, with one result or one stated error. Transitions
wait for the disk (synchronous FULL); how far a job is, which nobody would miss, does not.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sagittal.serve.job import (
    ENDED,
    MAX_ATTEMPTS,
    STATES,
    WORKER_DIED,
    Format,
    InputRef,
    Job,
    JobError,
    JobOptions,
    Outcome,
    ResultFile,
    Source,
    Stage,
    State,
)
from sagittal.serve.job_rows import ENDED_SQL, count, keyed, listed, number_of, one, open_rows, running_ids, take_back
from sagittal.serve.refusals import RefusalError

__all__ = [
    "ENDED",
    "MAX_ATTEMPTS",
    "STATES",
    "WORKER_DIED",
    "Format",
    "InputRef",
    "Job",
    "JobError",
    "JobOptions",
    "JobStore",
    "Outcome",
    "ResultFile",
    "Source",
    "Stage",
    "State",
    "new_id",
    "require_room",
]
RETRY_AFTER_S = 30


class JobStore:
    """The jobs of a service. Safe to use from several threads; every method is short.

    Args:
        path: the SQLite file, made where it is missing.
        clock: gives the time, for tests.

    Raises:
        ResourceError: the file can't be used, or a newer version wrote it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._rows, self._quick = open_rows(path)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._quick.close()
            self._rows.close()

    def submit(
        self,
        model: str,
        options: JobOptions,
        input: InputRef,
        *,
        job_id: str | None = None,
        owner: str = "",
        source: Source = "api",
        idempotency_key: str | None = None,
        most_queued: int | None = None,
    ) -> Job:
        """Put a job into the queue and return it; the same idempotency key of the same owner gives the same job.

        Args:
            model, options, input: of the job.
            job_id: as `new_id` makes it.
            owner, source: who sent it.
            idempotency_key: the sender's name for this job, or None.
            most_queued: jobs that may wait, this one included.

        Raises:
            RefusalError: the queue is full (429).
        """
        with self._transaction() as rows:
            if idempotency_key is not None:
                same = keyed(rows, owner, idempotency_key)
                if same is not None:
                    return same
            require_room(count(rows, "queued"), most_queued)
            job_id = job_id or new_id()
            rows.execute(
                "INSERT INTO jobs (id, model, state, stage, progress, created, attempt, options, input, volumes_ml, "
                "flags, results, owner, source, idempotency_key) "
                "VALUES (?, ?, 'queued', 'queued', 0, ?, 0, ?, ?, '{}', '[]', '[]', ?, ?, ?)",
                (
                    job_id,
                    model,
                    self._now(),
                    options.model_dump_json(),
                    input.model_dump_json(),
                    owner,
                    source,
                    idempotency_key,
                ),
            )
            return one(rows, job_id)

    def known(self, owner: str, idempotency_key: str) -> Job | None:
        """Return the job that an owner sent under this key, or None."""
        with self._lock:
            return keyed(self._rows, owner, idempotency_key)

    def get(self, job_id: str, *, owner: str | None = None) -> Job:
        """Return a job.

        Args:
            job_id: of the job.
            owner: whose it must be; None: anybody's. What came without a key is no key's.

        Raises:
            RefusalError: there is none, or it is another owner's (404).
        """
        with self._lock:
            return one(self._rows, job_id, owner)

    def state(self, job_id: str) -> State | None:
        """Return a job's state, None where there is no such job."""
        with self._lock:
            row = self._rows.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else row["state"]

    def jobs(
        self, *, state: State | None = None, limit: int = 100, after: str | None = None, owner: str | None = None
    ) -> tuple[Job, ...]:
        """Return jobs, the latest first.

        Args:
            state: the only one wanted.
            limit: how many at most.
            after: id of a job; only those that were sent before it.
            owner: see `get`.

        Raises:
            RefusalError: no job `after` (404).
        """
        with self._lock:
            number = None if after is None else number_of(self._rows, after, owner)
            return listed(self._rows, state, number, owner, limit)

    def counts(self) -> dict[State, int]:
        """Return how many jobs there are in each state."""
        with self._lock:
            found = dict(tuple(row) for row in self._rows.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def claim(self, worker: str) -> Job | None:
        """Hand the job that waits longest to `worker`; None where none waits. Nobody else gets it."""
        with self._transaction() as rows:
            row = rows.execute(
                "UPDATE jobs SET state = 'running', stage = 'reading', progress = 0, started = ?, "
                "attempt = attempt + 1, worker = ? WHERE state = 'queued' AND number = "
                "(SELECT min(number) FROM jobs WHERE state = 'queued') RETURNING id",
                (self._now(), worker),
            ).fetchone()
            return None if row is None else one(rows, row["id"])

    def progress(self, job_id: str, worker: str, progress: float, stage: Stage) -> bool:
        """Note how far a running job is; False where it is no longer this worker's."""
        with self._lock:
            done = self._quick.execute(
                "UPDATE jobs SET progress = ?, stage = ? WHERE id = ? AND state = 'running' AND worker = ?",
                (min(max(progress, 0.0), 1.0), stage, job_id, worker),
            )
            return done.rowcount == 1

    def finish(self, job_id: str, worker: str, outcome: Outcome) -> bool:
        """End a running job with its result; False where it is no longer this worker's, and nothing changed."""
        results = json.dumps([result.model_dump(mode="json") for result in outcome.results])
        with self._transaction() as rows:
            done = rows.execute(
                "UPDATE jobs SET state = 'done', progress = 1, ended = ?, worker = NULL, volumes_ml = ?, flags = ?, "
                "results = ? WHERE id = ? AND state = 'running' AND worker = ?",
                (
                    self._now(),
                    json.dumps(outcome.volumes_ml),
                    json.dumps(list(outcome.flags)),
                    results,
                    job_id,
                    worker,
                ),
            )
            return done.rowcount == 1

    def fail(self, job_id: str, worker: str, error: JobError) -> bool:
        """End a running job with an error; False where it is no longer this worker's, and nothing changed."""
        with self._transaction() as rows:
            done = rows.execute(
                "UPDATE jobs SET state = 'failed', ended = ?, worker = NULL, error = ? "
                "WHERE id = ? AND state = 'running' AND worker = ?",
                (self._now(), error.model_dump_json(), job_id, worker),
            )
            return done.rowcount == 1

    def cancel(self, job_id: str, *, owner: str | None = None) -> Job:
        """End a job that has not ended; one that has stays as it is. Return it.

        Raises:
            RefusalError: see `get`.
        """
        with self._transaction() as rows:
            one(rows, job_id, owner)
            rows.execute(
                "UPDATE jobs SET state = 'cancelled', ended = ?, worker = NULL "
                "WHERE id = ? AND state IN ('queued', 'running')",
                (self._now(), job_id),
            )
            return one(rows, job_id)

    def requeue_lost(self, worker: str) -> tuple[Job, ...]:
        """Take back the jobs of a worker that died: once to the queue, then they have failed. Return them."""
        return self._take_back("worker = ?", (worker,))

    def recover(self) -> tuple[Job, ...]:
        """Take back the running jobs of a service that died, as `requeue_lost`; call it before any worker starts."""
        return self._take_back("1", ())

    def release(self, worker: str) -> tuple[Job, ...]:
        """Put the jobs of a worker that was stopped on purpose back into the queue; the attempt does not count."""
        with self._transaction() as rows:
            ids = running_ids(rows, "worker = ?", (worker,))
            rows.execute(
                "UPDATE jobs SET state = 'queued', stage = 'queued', progress = 0, started = NULL, worker = NULL, "
                "attempt = attempt - 1 WHERE state = 'running' AND worker = ?",
                (worker,),
            )
            return tuple(one(rows, job_id) for job_id in ids)

    def delete(self, job_id: str, *, owner: str | None = None) -> None:
        """Forget a job that has ended.

        Raises:
            RefusalError: see `get`; or it has not ended (409).
        """
        with self._transaction() as rows:
            if not one(rows, job_id, owner).has_ended:
                raise RefusalError(f"job {job_id}: has not ended. Cancel it first.", code="not_ended", status=409)
            rows.execute(f"DELETE FROM jobs WHERE id = ? AND state IN {ENDED_SQL}", (job_id,))

    def expire(self, ttl_s: float) -> tuple[str, ...]:
        """Forget the jobs that ended more than `ttl_s` ago and return their ids."""
        before = _iso(self._clock() - timedelta(seconds=ttl_s))
        with self._transaction() as rows:
            found = rows.execute(
                f"DELETE FROM jobs WHERE state IN {ENDED_SQL} AND ended < ? RETURNING id", (before,)
            ).fetchall()
        return tuple(row["id"] for row in found)

    def ids(self) -> frozenset[str]:
        """Return the ids of all jobs."""
        with self._lock:
            return frozenset(row["id"] for row in self._rows.execute("SELECT id FROM jobs"))

    def _take_back(self, condition: str, values: Sequence[str]) -> tuple[Job, ...]:
        with self._transaction() as rows:
            return take_back(rows, condition, values, self._now())

    def _now(self) -> str:
        return _iso(self._clock())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                yield self._rows
            except BaseException:
                self._rows.execute("ROLLBACK")
                raise
            self._rows.execute("COMMIT")


def new_id() -> str:
    """Return an id for a job or an upload that nobody can guess."""
    return uuid.uuid4().hex


def require_room(queued: int, most: int | None) -> None:
    """Refuse a further job where `most` wait already.

    Raises:
        RefusalError: the queue is full (429).
    """
    if most is not None and queued >= most:
        raise RefusalError(
            f"{queued} jobs wait already, as many as the service takes. Send this one again later.",
            code="queue_full",
            status=429,
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
