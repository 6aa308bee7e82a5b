"""A folder shared between devices: a process for each, which asks for the next case when it is free.

What the parent does; `case_process` is the other end. Each case is handed out once. Where a process dies, by the
kernel's hand for want of memory for example, the case that it was at is told as failed and its others go to the rest.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagittal.data.dataset import Case
from sagittal.errors import ResourceError, SagittalError
from sagittal.inference.engines.engine import KernelMode
from sagittal.inference.engines.sharing import threads_each
from sagittal.inference.memory import GIB, budget_bytes, gib, own_bytes
from sagittal.inference.pipeline import Job
from sagittal.inference.run_report import CasePrediction

_PARENT_GROWS_BYTES = 16 << 20
"""Of this process while it waits: what is known of thousands of cases, and its threads."""


@dataclass(frozen=True)
class Place:
    """Where one process computes.

    Attributes:
        device: as the engine takes it; `cpu` may come several times.
        threads: for its computing.
    """

    device: str
    threads: int


def places_on(devices: Sequence[str], threads: int | None = None) -> tuple[Place, ...]:
    """Return a place for each device; they share `threads`, or else the processors that this process may use."""
    each = threads_each(len(devices), threads) if devices else 1
    return tuple(Place(device, each) for device in devices)


@dataclass(frozen=True)
class Loading:
    """How each process loads the model; `others` are the bundles that it is averaged with.

    `kernels` is the position of the kernels' switch there, None without PyTorch, and `known_kernels` the file that
    keeps what was timed.
    """

    bundle: Path
    engine: str
    cache_folder: Path | None = None
    others: tuple[Path, ...] = ()
    kernels: KernelMode | None = None
    known_kernels: Path | None = None


def predict_on(
    places: Sequence[Place],
    loading: Loading,
    job: Job,
    cases: Sequence[Case],
    tell: Callable[[CasePrediction], None],
    on_window: Callable[[str, int, int], None] | None = None,
) -> None:
    """Predict cases on several devices at a time.

    Args:
        places: where.
        loading: how the model is loaded there.
        job: what is made of each case; its memory is shared between the processes.
        cases: each is computed once.
        tell: called with what became of each case, from this thread.
        on_window: called now and then with a case's id, windows done and windows in all, from this thread.

    Raises:
        SagittalError: the disk is full, the model can't be loaded on one of the devices, or the memory of the job does
            not even suffice for this process.
        ResourceError: no process is left, and the last one died before it took a case.
    """
    if not cases:
        return
    waiting = deque(cases)
    events: queue.Queue[tuple[_Child, Mapping[str, Any] | None]] = queue.Queue()
    children: list[_Child] = []
    try:
        for place in places[: len(cases)]:
            children.append(_Child(place, _task(place, loading, job, min(len(places), len(cases))), events))
        running = set(children)
        while running:
            child, message = events.get()
            if message is None:
                running.discard(child)
                _take_back(child, waiting, running, tell)
                if waiting and not running:
                    # The others had been told that there are no more before a case came back from one that died.
                    children.append(_Child(child.place, child.task, events))
                    running.add(children[-1])
            elif "want" in message:
                child.give(waiting.popleft() if waiting else None)
            elif "window" in message:
                if on_window is not None:
                    on_window(*message["window"])
            elif "case" in message:
                case = CasePrediction.from_json(json.dumps(message["case"]))
                child.done(case.case)
                tell(case)
            elif "fatal" in message:
                raise _error(message["fatal"])
    finally:
        for child in children:
            child.end()


def _take_back(
    child: _Child, waiting: deque[Case], running: set[_Child], tell: Callable[[CasePrediction], None]
) -> None:
    """Tell of the case that a dead process was at, and give back those that it had only been handed."""
    lost = child.lost()
    if not lost and child.code == 0:
        return
    how = f"by signal {-child.code}" if child.code < 0 else f"with code {child.code}"
    cause = f"its process on {child.place.device} ended {how}, most likely for want of memory"
    if lost:
        first, *others = lost
        message = f"{first.id}: {cause}. Give --memory-gib, or fewer devices at a time."
        tell(CasePrediction(case=first.id, status="failed", seconds=0.0, message=message, code="process"))
        waiting.extendleft(reversed(others))
    elif waiting and not running:
        # Not even a case was begun, so another one would end the same way; where one was, each costs a case at most.
        raise ResourceError(
            f"{cause}; no other is left. Give --memory-gib, or fewer devices at a time.", code="process"
        )


def _task(place: Place, loading: Loading, job: Job, processes: int) -> dict[str, Any]:
    return {
        "bundles": [str(path) for path in (loading.bundle, *loading.others)],
        "device": place.device,
        "threads": place.threads,
        "debug": logging.getLogger("sagittal").isEnabledFor(logging.DEBUG),
        "engine": loading.engine,
        "kernels": loading.kernels,
        "known_kernels": None if loading.known_kernels is None else str(loading.known_kernels),
        "cache_folder": None if loading.cache_folder is None else str(loading.cache_folder),
        "folder": str(job.folder),
        "choices": job.choices.model_dump(mode="json"),
        "bundle_sha256": job.bundle_sha256,
        "memory_gib": _share_gib(job.memory_gib, processes),
        "threshold": list(job.threshold),
    }


def _share_gib(memory_gib: float | None, processes: int) -> float | None:
    """Return what each process may use of a budget for all of them and this one, which waits and takes its part.

    Without a budget it is a share of what is available, since all take it at once; this process is there already.

    Raises:
        ResourceError: this process leaves nothing.
    """
    if memory_gib is None:
        available = budget_bytes(None) if processes > 1 else None
        return None if available is None else available / GIB / processes
    left = memory_gib * GIB - own_bytes() - _PARENT_GROWS_BYTES
    if left <= 0:
        raise ResourceError(
            f"--memory-gib {memory_gib:g}: the process that hands out the cases takes {gib(own_bytes())} by itself, so "
            f"nothing is left for {processes} that predict. Allow more, or give one device.",
            code="memory",
        )
    return left / GIB / processes


def _error(given: Mapping[str, str]) -> SagittalError:
    kinds = {kind.__name__: kind for kind in SagittalError.__subclasses__()}
    return kinds.get(given["type"], SagittalError)(given["message"], code=given["code"])


class _Child:
    """A process, and a thread that reads what it says."""

    def __init__(
        self, place: Place, task: Mapping[str, Any], events: queue.Queue[tuple[_Child, Mapping[str, Any] | None]]
    ) -> None:
        self.place, self.task, self._events = place, task, events
        self._cases: dict[str, Case] = {}
        threads = str(place.threads)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sagittal.inference.case_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"},
            )
        except OSError as error:
            raise ResourceError(f"a process for {place.device} can't be started ({error}).", code="process") from None
        self._send(task)
        self._reader = threading.Thread(target=self._read, name=f"predict-{place.device}", daemon=True)
        self._reader.start()

    @property
    def code(self) -> int:
        """Its exit code, once its output has ended; negative for a signal."""
        return self._process.wait()

    def give(self, case: Case | None) -> None:
        """Hand out a case; None says that there are no more."""
        assert self._process.stdin is not None
        if case is None:
            with suppress(OSError):
                self._process.stdin.close()
            return
        self._cases[case.id] = case
        # The child may stand in another folder than the parent's user thinks of.
        self._send({"id": case.id, "images": [str(image.absolute()) for image in case.images]})

    def done(self, case: str) -> None:
        """Note that it has told of a case."""
        self._cases.pop(case, None)

    def lost(self) -> list[Case]:
        """Return the cases that it was handed and did not tell of, in order."""
        return list(self._cases.values())

    def end(self) -> None:
        """End it at once; its outputs are whole or not there."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # what was still to be sent is for nobody
            self._process.stdin.close()
        self._process.stdout.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone, and the end of its output tells how
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                # Of a process that is killed while it speaks the last line is cut off.
                with suppress(ValueError):
                    self._events.put((self, json.loads(line)))
        finally:
            self._events.put((self, None))
