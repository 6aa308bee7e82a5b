"""Who did what: one line of JSON per action, without names of files and without anything of a patient.

{"time": ..., "key": "ward3", "action": "submit", "job": ..., "model": ..., "status": 202, "bytes": 31457280}

Lines are only ever added. A file that is full becomes audit.jsonl.1, the one before it .2, and so on, and the oldest
goes, so that a service that runs for years does not fill its disk.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger("sagittal.serve")
MOST_BYTES = 16 << 20
"""Of a file: some 80 000 lines."""
KEPT = 20
"""Full files beside the one that is written."""


class Audit:
    """Appends to the log; a line is whole or not there, also where several threads write.

    Args:
        path: of the log, made where it is missing.
        most_bytes: of a file.
        kept: full files that stay, at least one.
    """

    def __init__(self, path: Path, *, most_bytes: int = MOST_BYTES, kept: int = KEPT) -> None:
        self._lock = threading.Lock()
        self._path, self._most_bytes, self._kept = path, most_bytes, kept
        self._cannot_rotate = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _opened(path)

    def write(
        self,
        action: str,
        *,
        key: str = "",
        job: str | None = None,
        model: str | None = None,
        status: int | None = None,
        bytes: int | None = None,
    ) -> None:
        """Note an action.

        Args:
            action: submit, download, cancel, delete, list_series, refused, done, failed, lost, expired.
            key: name of the key that asked for it; empty where there are none.
            job, model: that it was about.
            status: of HTTP, or the job's state.
            bytes: that came or went.
        """
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": key,
            "action": action,
            "job": job,
            "model": model,
            "status": status,
            "bytes": bytes,
        }
        line = (json.dumps({name: value for name, value in entry.items() if value is not None}) + "\n").encode()
        with self._lock:
            try:
                size = os.fstat(self._file.fileno()).st_size
                if size and size + len(line) > self._most_bytes:
                    self._rotate()
                self._file.write(line)
            except OSError:
                # A full disk must not turn an answer into an error; the service's own log tells.
                _log.error("the audit log can't be written")

    def _rotate(self) -> None:
        """Begin a new file; where that can't be, go on with the old one, since a line that is lost is worse."""
        try:
            # Not there: an earlier turn got so far and could not open the new one.
            if self._path.exists():
                for number in range(self._kept - 1, 0, -1):
                    if self._full(number).exists():
                        self._full(number).replace(self._full(number + 1))
                self._path.replace(self._full(1))
            new = _opened(self._path)
        except OSError as error:
            if not self._cannot_rotate:
                _log.error("the audit log can't begin a new file: %s", os.strerror(error.errno or 0))
            self._cannot_rotate = True
            return
        self._file.close()
        self._file, self._cannot_rotate = new, False

    def _full(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._file.close()


def _opened(path: Path) -> BinaryIO:
    # Opened to add, so that also what rotates the file from outside by cutting it (copytruncate) loses nothing.
    return open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0)  # noqa: PTH123
