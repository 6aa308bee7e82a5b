"""What every job in SLURM's queue does on its node: end with a report, or go back into the queue.

SLURM tells a job by SIGTERM that it is preempted, and by SIGUSR2 that its time is nearly up. Either way it ends after
the step in progress with a checkpoint, puts itself back into the queue and exits with 75; started again, it goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sagittal.plan.base import write_atomically

STOPPED = 75
"""Exit code of a job that goes on when it is started again."""
ASK_S, ASK_EVERY_S = 180.0, 5.0
"""How long a job asks a controller that does not answer to have it back, unless SLURM ends it first."""


def read_report(path: Path) -> Mapping[str, Any] | None:
    """Return how a job ended, None where it has not or died without a word."""
    try:
        report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report


def job_id() -> str:
    """Return this job's id as squeue shows it, empty outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def processors() -> int:
    """Return the processors that SLURM gave this job on its node."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if (text := os.environ.get(name, "")).isdigit() and int(text) > 0:
            return min(int(text), allowed)
    return allowed


def put_back() -> bool:
    """Put this job back into the queue where it runs and no one took it out; return whether it was put back.

    A job that was cancelled is told by SIGTERM too, and is not to come back; one that SLURM itself puts back waits in
    the queue already. A controller that is silent for a while is asked again.
    """
    job, end = job_id(), time.monotonic() + ASK_S
    while True:
        asked = subprocess.run(
            ["squeue", "-h", "-r", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0 and asked.stdout.strip() != "RUNNING":
            return False
        if asked.returncode == 0 and subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(ASK_EVERY_S)


def finish(work: Callable[[], Mapping[str, Any] | None], report: Path) -> None:
    """Work until it is done and leave its report, or until the job is told to end and go back into the queue."""
    try:
        with _stoppable():
            outcome = work()
    except _Stopped:
        outcome = None
    if outcome is None:
        # To requeue a job ends it at once, so this comes last; the second SIGTERM is the same word again.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        put_back()
        sys.exit(STOPPED)
    write_atomically(report, json.dumps(outcome).encode())


class _Stopped(BaseException):
    """The job was told to end before, or beside, what ends by a flag."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Unwind at SIGTERM, where training does not take it for a flag, and let SIGUSR2 be a SIGTERM."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    def pass_on(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, unwind)}
    previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
