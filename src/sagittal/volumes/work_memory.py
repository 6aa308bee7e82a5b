"""Many cases at a time, as far as the memory goes: what a case will take is estimated, and workers wait for room.

A worker that runs out of memory all the same tries once more when it is alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sagittal.errors import ResourceError

MIB = 1 << 20
SHARE = 0.8
"""Of the memory that is free at the beginning, so that a wrong estimate does no harm at once."""

Result = TypeVar("Result")


class Room:
    """Memory that workers share: each takes what it needs and waits while others hold too much of it.

    A worker whose need exceeds all there is waits until it is alone, and then tries.
    """

    def __init__(self, total_bytes: int | None) -> None:
        self.total_bytes = total_bytes
        self._taken = 0
        self._workers = 0
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, size_bytes: int) -> Iterator[None]:
        """Hold `size_bytes` for the duration of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._fits(size_bytes))
            self._taken += size_bytes
            self._workers += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size_bytes
                self._workers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other worker holds anything, and let none begin before the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._workers == 0)
            try:
                yield
            finally:
                self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._workers == 0 or self.total_bytes is None or self._taken + size_bytes <= self.total_bytes


def run_in(
    room: Room, need_bytes: int, work: Callable[[], Result], *, advice: str = "Use a machine with more memory."
) -> Result:
    """Return `work()`, done while the room holds its need; where memory runs out, once more alone.

    Raises:
        ResourceError: it runs out even then; the message has the numbers.
    """
    try:
        with room.taking(need_bytes):
            return work()
    except (MemoryError, ResourceError) as error:
        if not _is_lack(error):
            raise
    with room.alone():
        try:
            return work()
        except (MemoryError, ResourceError) as error:
            if not _is_lack(error):
                raise
            free = available_bytes()
            there = "" if free is None else f"; {free / MIB:,.0f} MiB are free"
            raise ResourceError(
                f"does not fit into memory, even as the only case at work: it takes about {need_bytes / MIB:,.0f} MiB"
                f"{there}. {advice}",
                code="memory",
            ) from None


def available_bytes() -> int | None:
    """Return the memory that this process may still take: the machine's or its control group's; None if unknown."""
    limits = [limit for limit in (_free_on_machine(), _free_in_group()) if limit is not None]
    return min(limits, default=None)


def _is_lack(error: MemoryError | ResourceError) -> bool:
    return isinstance(error, MemoryError) or error.code == "memory"


def _free_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _free_in_group() -> int | None:
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = (group / "memory.current").read_text(encoding="ascii")
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
