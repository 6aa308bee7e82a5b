"""Jobs as rows of SQLite: the table, what opens it, and what reads single rows of it.

Plain functions over a connection, so that a transition in `jobs.JobStore` reads and writes within one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sagittal.errors import ResourceError
from sagittal.serve.job import MAX_ATTEMPTS, WORKER_DIED, InputRef, Job, JobError, JobOptions, ResultFile, State
from sagittal.serve.refusals import not_found

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    stage TEXT NOT NULL,
    progress REAL NOT NULL,
    created TEXT NOT NULL,
    started TEXT,
    ended TEXT,
    attempt INTEGER NOT NULL,
    options TEXT NOT NULL,
    input TEXT NOT NULL,
    error TEXT,
    volumes_ml TEXT NOT NULL,
    flags TEXT NOT NULL,
    results TEXT NOT NULL,
    owner TEXT NOT NULL,
    source TEXT NOT NULL,
    worker TEXT,
    idempotency_key TEXT,
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (ended);
"""
ENDED_SQL = "('done', 'failed', 'cancelled')"
_COLUMNS = (
    "j.*, CASE WHEN j.state = 'queued' THEN "
    "(SELECT count(*) FROM jobs AS q WHERE q.state = 'queued' AND q.number <= j.number) END AS queue_position"
)


def open_rows(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection]:
    """Return two connections to the jobs at `path`; transactions of the first wait for the disk.

    Raises:
        ResourceError: the file can't be used, or a newer version wrote it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, quick = _connection(path, "FULL"), _connection(path, "NORMAL")
        version = rows.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise ResourceError(
                f"{path}: written by a newer version of sagittal. Update sagittal, or choose another folder.",
                code="too_new",
            )
        rows.executescript(_SCHEMA)
        rows.execute(f"PRAGMA user_version = {_VERSION}")
    except (sqlite3.Error, OSError) as error:
        raise ResourceError(
            f"{path}: the jobs can't be kept there ({error}). Check the disk, or choose another folder.",
            code="disk",
        ) from None
    return rows, quick


def one(rows: sqlite3.Connection, job_id: str, owner: str | None = None) -> Job:
    """Return a job.

    Args:
        rows: that it is in.
        job_id: of the job.
        owner: whose it must be; None: anybody's. What came without a key is no key's.

    Raises:
        RefusalError: there is none, or it is another owner's (404).
    """
    row = rows.execute(
        f"SELECT {_COLUMNS} FROM jobs AS j WHERE j.id = :id AND (:owner IS NULL OR j.owner = :owner)",
        {"id": job_id, "owner": owner},
    ).fetchone()
    if row is None:
        raise not_found("the job")
    return job_of(row)


def keyed(rows: sqlite3.Connection, owner: str, key: str) -> Job | None:
    """Return the job that an owner sent under an idempotency key, or None."""
    row = rows.execute("SELECT id FROM jobs WHERE owner = ? AND idempotency_key = ?", (owner, key)).fetchone()
    return None if row is None else one(rows, row["id"])


def number_of(rows: sqlite3.Connection, job_id: str, owner: str | None) -> int:
    """Return a job's place among all.

    Raises:
        RefusalError: see `one`.
    """
    row = rows.execute(
        "SELECT number FROM jobs WHERE id = :id AND (:owner IS NULL OR owner = :owner)",
        {"id": job_id, "owner": owner},
    ).fetchone()
    if row is None:
        raise not_found("the job 'after'")
    return int(row["number"])


def count(rows: sqlite3.Connection, state: State) -> int:
    """Return how many jobs are in a state."""
    return int(rows.execute("SELECT count(*) FROM jobs WHERE state = ?", (state,)).fetchone()[0])


def listed(
    rows: sqlite3.Connection, state: State | None, before: int | None, owner: str | None, limit: int
) -> tuple[Job, ...]:
    """Return jobs, the latest first: of a state, before a place, of an owner; None: any."""
    found = rows.execute(
        f"SELECT {_COLUMNS} FROM jobs AS j WHERE (:state IS NULL OR j.state = :state) "
        "AND (:before IS NULL OR j.number < :before) AND (:owner IS NULL OR j.owner = :owner) "
        "ORDER BY j.number DESC LIMIT :limit",
        {"state": state, "before": before, "owner": owner, "limit": limit},
    ).fetchall()
    return tuple(job_of(row) for row in found)


def running_ids(rows: sqlite3.Connection, condition: str, values: Sequence[str]) -> list[str]:
    """Return the ids of running jobs that a condition of SQL holds for."""
    found = rows.execute(f"SELECT id FROM jobs WHERE state = 'running' AND {condition}", values).fetchall()
    return [row["id"] for row in found]


def take_back(rows: sqlite3.Connection, condition: str, values: Sequence[str], now: str) -> tuple[Job, ...]:
    """Put running jobs that a condition holds for back into the queue, once; after that they have failed."""
    ids = running_ids(rows, condition, values)
    rows.execute(
        "UPDATE jobs SET state = 'queued', stage = 'queued', progress = 0, started = NULL, worker = NULL "
        f"WHERE state = 'running' AND attempt < {MAX_ATTEMPTS} AND {condition}",
        values,
    )
    rows.execute(
        "UPDATE jobs SET state = 'failed', ended = ?, worker = NULL, error = ? "
        f"WHERE state = 'running' AND {condition}",
        (now, WORKER_DIED.model_dump_json(), *values),
    )
    return tuple(one(rows, job_id) for job_id in ids)


def job_of(row: sqlite3.Row) -> Job:
    """Return a row as a job."""
    plain: dict[str, Any] = {name: row[name] for name in row.keys() if name in Job.model_fields}  # noqa: SIM118
    return Job(
        **{
            **plain,
            "options": JobOptions.model_validate_json(row["options"]),
            "input": InputRef.model_validate_json(row["input"]),
            "error": None if row["error"] is None else JobError.model_validate_json(row["error"]),
            "volumes_ml": json.loads(row["volumes_ml"]),
            "flags": tuple(json.loads(row["flags"])),
            "results": tuple(ResultFile.model_validate(each) for each in json.loads(row["results"])),
        }
    )


def _connection(path: Path, synchronous: Literal["FULL", "NORMAL"]) -> sqlite3.Connection:
    # Transactions begin and end by name, and a lock lets one thread in at a time.
    rows = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
    rows.row_factory = sqlite3.Row
    rows.execute("PRAGMA journal_mode = WAL")
    rows.execute(f"PRAGMA synchronous = {synchronous}")
    return rows
