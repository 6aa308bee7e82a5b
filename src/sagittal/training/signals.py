"""Ctrl-C and SIGTERM end training after the step in progress; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

StopReason = Literal["interrupted", "terminated"]


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

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.reason = "interrupted"

    def on_terminate(number: int, frame: FrameType | None) -> None:
        flag.reason = "terminated"

    previous = signal.signal(signal.SIGINT, on_interrupt), signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous[0])
        signal.signal(signal.SIGTERM, previous[1])
