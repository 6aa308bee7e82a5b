"""What folds on many machines tell the one that gave them out, and it them: an actor that outlives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from sagittal.training.signals import StopFlag, StopReason

LOOK_EVERY_S = 0.5
"""How often a fold looks whether it is to stop."""
SILENCE_S = 60.0
"""A fold that does not reach the board for so long has lost the cluster, and ends with a checkpoint."""


@dataclass(frozen=True)
class Said:
    """A line of a fold."""

    name: str
    node: str
    line: str


class Board:
    """Collects lines, and knows which attempt at each fold counts. Ray runs it as an actor."""

    def __init__(self) -> None:
        self._lines: list[Said] = []
        self._attempts: dict[str, int] = {}
        self._arrived: set[tuple[str, int]] = set()
        self._reason: StopReason | None = None

    def begin(self, name: str, attempt: int) -> None:
        """Let this attempt at a fold count from now on; older ones are told to stop."""
        self._attempts[name] = attempt

    def arrive(self, name: str, attempt: int) -> None:
        """Take note that an attempt runs on a node, where before it may have waited for one."""
        self._arrived.add((name, attempt))

    def arrived(self) -> set[tuple[str, int]]:
        """Return the attempts that have come to a node, by fold and number."""
        return self._arrived

    def say(self, name: str, attempt: int, node: str, line: str) -> None:
        """Take a line, unless a newer attempt counts."""
        if self._attempts.get(name) == attempt:
            self._lines.append(Said(name, node, line))

    def take(self) -> list[Said]:
        """Return the lines that came since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def stop(self, reason: StopReason) -> None:
        """Tell all folds to stop."""
        self._reason = reason

    def verdict(self, name: str, attempt: int) -> StopReason | None:
        """Return why an attempt has to stop, None where it goes on.

        A node that was cut off and comes back finds another one at work on its fold.
        """
        return self._reason if self._attempts.get(name) == attempt else "terminated"


@contextmanager
def obeying(board: Any, name: str, attempt: int, stop: StopFlag) -> Iterator[None]:
    """Raise the flag when the board says so, or can't be reached for long, while the block runs.

    Args:
        board: handle of the actor.
        name, attempt: who asks.
        stop: is raised.
    """
    over = threading.Event()

    def listen() -> None:
        silent_s = 0.0
        while not over.wait(LOOK_EVERY_S) and not stop:
            try:
                verdict = ray.get(board.verdict.remote(name, attempt), timeout=LOOK_EVERY_S * 10)
                stop.reason = verdict or stop.reason  # a signal may have come meanwhile
                silent_s = 0.0
            except (ray.exceptions.RayError, TimeoutError) as error:
                silent_s += LOOK_EVERY_S * (11 if isinstance(error, TimeoutError) else 1)
                if silent_s > SILENCE_S:
                    stop.reason = "terminated"

    listener = threading.Thread(target=listen, name=f"board-{name}", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
