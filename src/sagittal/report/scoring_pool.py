"""Many cases scored at a time, in processes of their own, as far as the memory goes.

Scoring is many short numpy calls, between which threads wait for one another; so where there is enough to do, each
worker is a process. It is started afresh and is no copy of the caller, so that a user's script needs no guard. A case
that kills its process (for want of memory, most often) is tried once more alone, then told; the others lose nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from sagittal.errors import ResourceError, SagittalError
from sagittal.evaluation import Failure
from sagittal.evaluation.classes import present_values
from sagittal.report.scoring import Answer, Job, Outcome, score_files
from sagittal.volumes import read_header, read_labels
from sagittal.volumes.work_memory import SHARE, Room, available_bytes, run_in

MAX_WORKERS = 32
BYTES_PER_VOXEL = 24
"""Of a case at work: two label maps as they are read and as they are counted, and the transform of a class as large as
the scan."""
BYTES_PER_PROBABILITY_VOXEL = 12
"""On top of that where probabilities are compared, whatever the number of classes."""
APART_VOX = 1 << 26
"""Voxels of all cases together from which on processes are worth their start, which takes about half a second."""
_ADVICE = "Evaluate it on a machine with more memory, or while nothing else runs."

Scorer = Callable[[Job], Outcome]
ScoreAll = Callable[[Sequence[Job], int | None, Callable[[Outcome], None] | None], list[Outcome]]
"""What `score_all` is, wherever it computes."""


def score_all(
    jobs: Sequence[Job], workers: int | None = None, on_case: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Return the outcome of every job, in their order.

    Args:
        jobs: the cases.
        workers: at the same time; by itself the processors, at most 32. Fewer work where memory is short.
        on_case: told of each as it is done, in any order, from the worker's thread.

    Raises:
        ResourceError: a metric needs a package that is not installed.
    """
    number, room = _workers(workers, len(jobs)), _room()
    apart = number > 1 and _voxels(jobs[0]) * len(jobs) >= APART_VOX
    processes = [ScoringProcess() for _ in range(number)] if apart else []
    with _scorers(number, processes) as scorers, ThreadPoolExecutor(number, "evaluate") as pool:

        def work(job: Job) -> Outcome:
            scorer = scorers.get()
            try:
                outcome = run_in(room, need_bytes(job), lambda: scorer(job), advice=_ADVICE)
            except ResourceError as error:
                if error.code != "memory":
                    raise
                outcome = Outcome(failure=Failure(case=job.case, code=error.code, message=error.message))
            finally:
                scorers.put(scorer)
            if on_case is not None:
                on_case(outcome)
            return outcome

        try:
            return list(pool.map(work, jobs))
        except BaseException:
            # Ctrl-C, or what no case can be scored without: leaving the pool waits for the cases at work.
            for process in processes:
                process.abandon()
            raise


def read_values(paths: Sequence[Path], workers: int | None = None) -> list[frozenset[int]]:
    """Return the values in every label map, none of one that can't be read: that is told when its case is scored.

    Args:
        paths: label maps.
        workers: read at the same time; by itself the processors, at most 32. Fewer work where memory is short.
    """
    room = _room()

    def read(path: Path) -> frozenset[int]:
        try:
            need = _voxels_of(path) * BYTES_PER_VOXEL
            return run_in(room, need, lambda: frozenset(present_values(read_labels(path)[0])), advice=_ADVICE)
        except SagittalError:
            return frozenset()

    # Most of the time is spent in decompression and in numpy, where threads don't wait for one another.
    with ThreadPoolExecutor(_workers(workers, len(paths)), "values") as pool:
        return list(pool.map(read, paths))


def _workers(wanted: int | None, jobs: int) -> int:
    return min(wanted or os.cpu_count() or 1, MAX_WORKERS, max(1, jobs))


def _room() -> Room:
    free = available_bytes()
    return Room(None if free is None else int(SHARE * free))


def need_bytes(job: Job) -> int:
    """Return what a case takes while it is scored; 0 where its header can't be read."""
    return _voxels(job) * (BYTES_PER_VOXEL + (BYTES_PER_PROBABILITY_VOXEL if job.probabilities is not None else 0))


def _voxels(job: Job) -> int:
    return _voxels_of(job.reference)


def _voxels_of(path: Path) -> int:
    try:
        return int(np.prod(read_header(path).geometry.shape, dtype=np.int64))
    except (SagittalError, OSError):
        return 0  # It fails again, and is told, when the case is scored.


@contextmanager
def _scorers(number: int, processes: Sequence[ScoringProcess]) -> Iterator[SimpleQueue[Scorer]]:
    """Yield a queue of as many scorers, in this process or each in one of `processes`, which end with the block."""
    scorers: SimpleQueue[Scorer] = SimpleQueue()
    for scorer in [process.score for process in processes] or [score_files] * number:
        scorers.put(scorer)
    try:
        yield scorers
    finally:
        for process in processes:
            process.close()


class ScoringProcess:
    """A process that scores one case after the other: a line of JSON in, a line of JSON out."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._abandoned = False

    def score(self, job: Job) -> Outcome:
        """Return the outcome of a job.

        Raises:
            ResourceError: the process died over it, lacks what the job needs, or was abandoned.
        """
        if self._abandoned:
            raise ResourceError("the evaluation was given up.", code="abandoned")
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sagittal.report.scoring_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                process_group=0,  # Out of reach of Ctrl-C, which this process hears and ends the other one.
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(job.model_dump_json() + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.close()
            raise ResourceError("the process that scored it died, most likely for want of memory.", code="memory")
        answer = Answer.from_json(line, source="a scoring process")
        if answer.lack is not None:
            raise ResourceError(answer.lack.message, code=answer.lack.code)
        assert answer.bug is None, f"scoring {job.case} failed:\n{answer.bug}"
        assert answer.outcome is not None
        return answer.outcome

    def abandon(self) -> None:
        """End the process from another thread than the one that waits for it; no job starts another."""
        self._abandoned = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process; the next job would start another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
