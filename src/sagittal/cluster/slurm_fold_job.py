"""A fold trained by a job in SLURM's queue."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagittal.cluster.slurm_job import finish, job_id, processors
from sagittal.errors import SagittalError, TrainingError
from sagittal.kernels import keep_freed_memory
from sagittal.plan.base import write_atomically
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.cross_validation import FoldTask
from sagittal.training.fold_process import report_of
from sagittal.training.peers import process_device
from sagittal.training.precision import require_precision
from sagittal.training.side_by_side import OUTPUT_LOG
from sagittal.training.signals import graceful_stop

REPORT = "slurm.json"
"""In a fold's folder: how its job ended."""
MOST_STUCK = 5
"""So often in a row a fold may go back into the queue no further than it was; then its time is too short."""
_STARTS = "slurm_starts.json"
_ENDED_EARLY = ("interrupted", "terminated")


@dataclass(frozen=True)
class FoldJob:
    """Trains one fold. `share_s` is its part of a budget, which time in the queue does not count against."""

    task: FoldTask
    share_s: float | None = None

    @property
    def folder(self) -> Path:
        """Of the fold."""
        return self.task.run.folder / f"fold_{self.task.name}"

    def __call__(self) -> None:
        """Train, and leave a report or go back into the queue."""
        finish(self._trained, self.folder / REPORT)

    def _trained(self) -> Mapping[str, Any] | None:
        began, before = time.monotonic(), _Starts.read(self.folder)
        torch.set_num_threads(processors())
        keep_freed_memory()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / OUTPUT_LOG).open("a", encoding="utf-8") as log, redirect_stderr(log):

            def say(line: str) -> None:
                log.write(f"{line}\n")
                log.flush()

            restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
            again = "" if restarts == "0" else f", start {int(restarts) + 1}"
            say(f"on {os.uname().nodename}, job {job_id()}, {torch.get_num_threads()} threads{again}")
            try:
                task = self._here(None if self.share_s is None else began + self.share_s - before.used_s)
            except SagittalError as error:
                return error.as_dict()
            with graceful_stop() as stop:
                report = report_of(task, stop, say)
        if report.get("ended") not in _ENDED_EARLY:
            (self.folder / _STARTS).unlink(missing_ok=True)
            return report
        after = before.again(time.monotonic() - began, _step(self.folder))
        if after.stuck >= MOST_STUCK:
            (self.folder / _STARTS).unlink(missing_ok=True)
            return TrainingError(
                f"job {job_id()} was stopped {after.stuck + 1} times in a row at step {after.step}, by its time "
                "limit or by preemption, and is not put back. Give a longer time= in --on, then --resume.",
                code="no_progress",
            ).as_dict()
        write_atomically(self.folder / _STARTS, json.dumps(dataclasses.asdict(after)).encode())
        return None

    def _here(self, ends: float | None) -> FoldTask:
        """Return the task with this node's device."""
        run = self.task.run
        device = process_device(run.options.device, run.options.world)
        require_precision(run.plan, device)
        return dataclasses.replace(
            self.task, run=dataclasses.replace(run, devices=(device,)), threads=processors(), ends=ends
        )


@dataclass(frozen=True)
class _Starts:
    """What the starts of a fold's job have come to: seconds, the last step, and how often they got no further."""

    used_s: float = 0.0
    step: int = -1
    stuck: int = 0

    @classmethod
    def read(cls, folder: Path) -> _Starts:
        try:
            return cls(**json.loads((folder / _STARTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def again(self, seconds: float, step: int) -> _Starts:
        """Return the same after one more start that ended at `step`."""
        return _Starts(self.used_s + seconds, step, self.stuck + 1 if step <= self.step else 0)


def _step(folder: Path) -> int:
    """Return the step of a fold's last checkpoint."""
    newest = newest_checkpoint(folder)
    return 0 if newest is None else newest[1].step
