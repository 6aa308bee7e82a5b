"""The run's log: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sagittal.errors import ResourceError
from sagittal.plan.base import write_atomically


class JsonlLog:
    """Append records to a JSONL file; a resumed run first drops the records after its checkpoint."""

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        self.path = path
        kept = [record for record in read_log(path) if int(record["step"]) <= keep_to_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one record.

        Raises:
            ResourceError: the disk is full.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"{self.path}: can't be written ({error.strerror}). Free space, then go on with --resume."
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:
            # A full disk has been reported by `write`; what could not be flushed is lost either way.
            os.close(self._file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
