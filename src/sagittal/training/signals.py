"""Ctrl-C and SIGTERM end training after the step in progress; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

StopReason = Literal["interrupted", "terminated"]
ONE_STOP_S = 1.0
"""A Ctrl-C so soon after a first signal belongs to it: `torchrun` passes on to its processes what they had anyway."""


class StopFlag:
    """Remembers that the user or the job scheduler asked for an end."""

    def __init__(self) -> None:
        self.reason: StopReason | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@contextmanager
def graceful_stop() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag while the block runs (in the main thread; elsewhere the flag stays down)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    first_s: float | None = None

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        now_s = time.monotonic()
        if first_s is not None and now_s - first_s > ONE_STOP_S:
            raise KeyboardInterrupt
        first_s = first_s or now_s
        flag.reason = flag.reason or "interrupted"

    def on_terminate(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        first_s = first_s or time.monotonic()
        flag.reason = "terminated"

    previous = signal.signal(signal.SIGINT, on_interrupt), signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous[0])
        signal.signal(signal.SIGTERM, previous[1])
