"""A worker as the service sees it: a process that is told lines of JSON and says some, and that can be ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sagittal.serve.worker import Task

_OWN_VARIABLES = "SAGITTAL_"
Command = tuple[str, ...]


class WorkerProcess:
    """A worker process, and a thread that reads what it says."""

    def __init__(self, command: Command, task: Task, debug: bool) -> None:
        # Unlike any other's, in every run of the service: the store tells attempts apart by it.
        self.name = uuid.uuid4().hex[:16]
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Libraries may name files there; --debug shows it.
            stderr=None if debug else subprocess.DEVNULL,
            env=worker_environment(os.environ, task.threads),
            # Ctrl-C in a terminal is for the service, which ends its workers itself.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="worker-reader", daemon=True)
        self._reader.start()
        self.send(task.model_dump(mode="json"))

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def has_said_all(self) -> bool:
        """Whether it ended and everything that it said was read."""
        return not self._reader.is_alive() and self._messages.empty()

    @property
    def how_it_ended(self) -> str:
        """The signal or the exit code, in words."""
        code = self._process.poll()
        return "no code" if code is None else f"signal {-code}" if code < 0 else f"code {code}"

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a line; where it is gone, the end of its output tells."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return what it says next; None where that is nothing for so long."""
        with suppress(queue.Empty):
            return self._messages.get(timeout=seconds if self._reader.is_alive() else 0.01)
        return None

    def end(self) -> None:
        """Kill it and wait until it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Of a process that is killed while it speaks the last line is cut off.
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self._messages.put(message)


def worker_environment(given: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """Return the environment of a worker: without the service's own variables, which may hold keys."""
    kept = {name: value for name, value in given.items() if not name.startswith(_OWN_VARIABLES)}
    counted = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return kept | {"OMP_WAIT_POLICY": "passive"} | counted
