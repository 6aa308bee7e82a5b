"""How a process that computes for another one tells it what happens: lines of JSON on standard output."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Send = Callable[..., None]
"""Sends one message, its fields given by name; any thread may call it."""


@contextmanager
def sent_by_standard_output() -> Iterator[Send]:
    """Give what sends messages; meanwhile what libraries print, and a traceback, goes to standard error instead."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        lock = threading.Lock()

        def send(**message: object) -> None:
            with lock:
                channel.write(json.dumps(message) + "\n")
                channel.flush()

        yield send
