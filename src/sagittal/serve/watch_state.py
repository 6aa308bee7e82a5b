"""What a watch remembers: a row per series in SQLite beside the jobs, so that each is segmented once through restarts.

found -> computing -> storing -> done
  |          |           |
  +----------+-----------+----> failed        (found again where a job vanished, or by hand)
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from sagittal.errors import ResourceError
from sagittal.serve.arrivals import Arrival

WatchState: TypeAlias = Literal["found", "computing", "storing", "done", "failed"]
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    series_uid TEXT NOT NULL UNIQUE,
    study_uid TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('found', 'computing', 'storing', 'done', 'failed')),
    instances INTEGER NOT NULL,
    job TEXT,
    round INTEGER NOT NULL DEFAULT 1,
    tries INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0,
    code TEXT,
    found TEXT NOT NULL,
    changed TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS series_by_state ON series (state, next_try);
"""
_COLUMNS = "series_uid, study_uid, state, instances, job, round, tries, next_try, code, found, changed"


class Watched(NamedTuple):
    """A series that a rule matched.

    Attributes:
        series_uid, study_uid: its UIDs.
        state: see above.
        instances: images that it had when nothing more came.
        job: that segments it, None before.
        round: how often it was begun; more than 1 where a job vanished.
        tries: of the step that it is at, that failed for what does not pass by itself.
        next_try: seconds since 1970, before which nothing is done with it.
        code: of the last error, None where there was none.
        found, changed: UTC, ISO 8601.
    """

    series_uid: str
    study_uid: str
    state: WatchState
    instances: int
    job: str | None
    round: int
    tries: int
    next_try: float
    code: str | None
    found: str
    changed: str


class WatchStore:
    """The series of a watch. Safe to use from several threads.

    Args:
        path: the SQLite file, made where it is missing.

    Raises:
        ResourceError: the file can't be used, or a newer version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = FULL")
            if self._rows.execute("PRAGMA user_version").fetchone()[0] > _VERSION:
                raise ResourceError(
                    f"{path}: written by a newer version of sagittal. Update sagittal, or choose another folder.",
                    code="too_new",
                )
            self._rows.executescript(_SCHEMA)
            self._rows.execute(f"PRAGMA user_version = {_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise ResourceError(
                f"{path}: the watch can't keep its notes there ({error}). Check the disk, or choose another folder.",
                code="disk",
            ) from None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._rows.close()

    def add(self, arrival: Arrival) -> bool:
        """Note a series that is to be segmented; False where it is known."""
        now = _now()
        with self._lock:
            done = self._rows.execute(
                "INSERT OR IGNORE INTO series (series_uid, study_uid, state, instances, found, changed) "
                "VALUES (?, ?, 'found', ?, ?, ?)",
                (arrival.series_uid, arrival.study_uid, arrival.instances, now, now),
            )
            return done.rowcount == 1

    def knows(self, series_uid: str) -> bool:
        """Whether a series was noted, whatever became of it."""
        return self.get(series_uid) is not None

    def get(self, series_uid: str) -> Watched | None:
        """Return a series, None where it is not known."""
        found = self._read("WHERE series_uid = ?", (series_uid,))
        return found[0] if found else None

    def due(self, now: float) -> tuple[Watched, ...]:
        """Return the series that something is to be done with, those that waited longest first."""
        return self._read(
            "WHERE state IN ('found', 'computing', 'storing') AND next_try <= ? ORDER BY next_try", (now,)
        )

    def latest(self, limit: int = 100) -> tuple[Watched, ...]:
        """Return series, the latest first."""
        return self._read("ORDER BY number DESC LIMIT ?", (limit,))

    def counts(self) -> dict[str, int]:
        """Return how many series there are in each state."""
        with self._lock:
            return dict(self._rows.execute("SELECT state, count(*) FROM series GROUP BY state").fetchall())

    def change(self, before: Watched, **new: Any) -> bool:
        """Change a series that is still in the state that it was read in; False where it is not."""
        assert new.keys() <= {"state", "instances", "job", "round", "tries", "next_try", "code"}, new.keys()
        names = ", ".join(f"{name} = ?" for name in new)
        with self._lock:
            done = self._rows.execute(
                f"UPDATE series SET {names}, changed = ? WHERE series_uid = ? AND state = ?",
                (*new.values(), _now(), before.series_uid, before.state),
            )
            return done.rowcount == 1

    def _read(self, rest: str, values: Sequence[Any]) -> tuple[Watched, ...]:
        with self._lock:
            return tuple(Watched(*row) for row in self._rows.execute(f"SELECT {_COLUMNS} FROM series {rest}", values))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
