"""Where the time of a prediction goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

Phase = Literal["reading", "preparing", "network", "blending", "finishing", "writing"]


class Timings:
    """Seconds by phase, and from the beginning to the last `stop`.

    Phases overlap where windows are blended while the network computes the next ones, so that their sum may exceed the
    total. Reading is from files, preparing is crop, normalisation and resampling, network is the engine's own time,
    blending is everything between windows, finishing makes labels of what is blended, and writing is to a file.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}
        self.total_s = 0.0
        self._began = time.perf_counter()
        self._lock = Lock()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the block, in any thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: Phase, seconds: float) -> None:
        """Count time that was measured elsewhere, from any thread."""
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def stop(self) -> None:
        """Set the total to the time since the beginning."""
        self.total_s = time.perf_counter() - self._began

    @property
    def outside_network_s(self) -> float:
        """The time in which the network did not compute."""
        return max(0.0, self.total_s - self.seconds.get("network", 0.0))
