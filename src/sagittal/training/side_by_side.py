"""Folds of a run side by side, each in a process of its own: what the parent does. `fold_process` is the other end.

Each process gets its task on standard input, where it then listens for the word to stop, or for the end of the stream,
which comes even from a parent that was killed. It answers with one JSON object per line; everything else that it prints
goes into OUT.run/fold_N/output.log.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagittal.errors import ResourceError
from sagittal.training.signals import StopFlag

OUTPUT_LOG = "output.log"
FOLD_BUNDLE = "bundle"
"""Where in a fold's folder its process leaves weights and entry, for the parent to join with the others'."""
LENGTH_BYTES = 8
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Place:
    """Where one fold at a time is trained, and with how many threads."""

    number: int
    device: torch.device
    threads: int


@dataclass(frozen=True)
class Ending:
    """How the process of a fold ended: `report` is its last message, None where it died without one."""

    name: str
    report: Mapping[str, Any] | None
    code: int


def places_on(devices: Sequence[torch.device]) -> tuple[Place, ...]:
    """Return a place on each device; they share the threads that this process has."""
    threads = max(1, torch.get_num_threads() // len(devices))
    return tuple(Place(number, device, threads) for number, device in enumerate(devices))


def train_side_by_side(
    names: Sequence[str],
    places: Sequence[Place],
    task_of: Callable[[str, Place, int], Any],
    folder: Path,
    stop: StopFlag,
    say: Callable[[str], None],
) -> Iterator[Ending]:
    """Train folds, as many at a time as there are places, and yield how each ended as soon as it has.

    Args:
        names: the folds, in the order in which they are begun.
        places: where.
        task_of: returns what a process is sent; called with a fold, its place, and how many folds have not ended.
        folder: the run folder.
        stop: a raised flag is passed on to every process, and no further fold begins.
        say: receives lines for a person, with the fold they come from.

    Raises:
        ResourceError: a process can't be started.
    """
    events: queue.Queue[tuple[_Child, Mapping[str, Any] | None]] = queue.Queue()
    waiting, running = list(names), dict[int, _Child]()
    told = False
    try:
        while running or (waiting and not stop):
            for place in places:
                if place.number not in running and waiting and not stop:
                    left = len(waiting) + len(running)
                    name = waiting.pop(0)
                    running[place.number] = _Child(name, place, task_of(name, place, left), folder, events)
            if stop and not told:
                told = True
                for child in running.values():
                    child.tell(str(stop.reason))
            try:
                child, message = events.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                continue
            if message is None:
                del running[child.place.number]
                yield child.ending()
            elif "say" in message:
                say(f"fold {child.name} | {message['say']}")
    finally:
        for child in running.values():
            child.kill()


class _Child:
    """The process of one fold, and a thread that reads what it says."""

    def __init__(
        self, name: str, place: Place, task: Any, folder: Path, events: queue.Queue[tuple[_Child, Any]]
    ) -> None:
        self.name, self.place, self._events = name, place, events
        self._report: Mapping[str, Any] | None = None
        fold_folder = folder / f"fold_{name}"
        try:
            fold_folder.mkdir(parents=True, exist_ok=True)
            self._log = (fold_folder / OUTPUT_LOG).open("a", encoding="utf-8")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sagittal.training.fold_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "OMP_NUM_THREADS": str(place.threads)},
            )
        except OSError as error:
            raise ResourceError(f"fold {name}: its process can't be started ({error}).", code="process") from None
        content = pickle.dumps(task)
        self._send(len(content).to_bytes(LENGTH_BYTES, "big") + content)
        self._reader = threading.Thread(target=self._read, name=f"fold-{name}", daemon=True)
        self._reader.start()

    def tell(self, reason: str) -> None:
        """Ask for an end."""
        self._send(f"{reason}\n".encode())

    def kill(self) -> None:
        """End it at once; its last checkpoint stays."""
        self._process.kill()
        self._process.wait()
        self._close()

    def ending(self) -> Ending:
        """Return how it ended, once its output has."""
        code = self._process.wait()
        self._close()
        return Ending(self.name, self._report, code)

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone, and the end of its output tells how
            self._process.stdin.write(content)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                message = json.loads(line)
                if "say" in message:
                    with suppress(OSError):  # the disk is full, and the line is told all the same
                        self._log.write(f"{message['say']}\n")
                        self._log.flush()
                else:
                    self._report = message
                self._events.put((self, message))
        except ValueError:
            pass  # a line that a kill cut short, and the last one
        finally:
            self._events.put((self, None))

    def _close(self) -> None:
        self._reader.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # what was still to be sent is for nobody
            self._process.stdin.close()
        self._process.stdout.close()
        with suppress(OSError):  # the disk is full
            self._log.close()
