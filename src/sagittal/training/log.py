"""The run's log: one JSON object per line, flushed as it is written.

Every record has `kind` and `step` (finished steps). Kinds:

    step                loss and gradient_norm (null where they overflowed), learning_rate, seconds (training time so
                        far), step_s, waited_s (for data, within step_s); on a GPU memory_mib (peak so far); loss_scale
                        where fp16 skipped the step
    skipped             reason: gradients overflowed in fp16, so the weights stayed as they were
    validation          dice (by label; null where no case has it), mean_dice, cases, seconds (that it took), elapsed_s,
                        present (references that have a label), by_case (Dice by case and label), best_dice, best_step,
                        stale (validations since the best)
    validation_skipped  reason: no time was left for it
    shortening          reason, end: the clock gave the schedule another end
    alarm               label, alarm (never_found, lost), reason, advice: a class has collapsed
    alarm_over          label: it is found again

Case ids stay in the run folder: no bundle holds the log.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sagittal.plan.base import cannot_write, write_atomically


class JsonlLog:
    """Append records to a JSONL file; a resumed run first drops the records after its checkpoint."""

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        self.path = path
        kept = [record for record in read_log(path) if int(record["step"]) <= keep_to_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.kept = tuple(kept)
        """The records that were there before, up to the checkpoint."""
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """Append one record and return it.

        Raises:
            ResourceError: the disk is full.
        """
        record = {"kind": kind, "step": step, **fields}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error, note="--resume goes on where the run stopped.") from None
        return record

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
