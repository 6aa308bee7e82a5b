"""A lock among processes of one machine, which the system releases with the process however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

_locks: Any = import_module("fcntl") if os.name == "posix" else None


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Run the block while no other process or thread runs one with the same file, which is made and stays.

    Windows, and disks that have no locks or can't be written, keep nobody out: what is guarded must be work that would
    be done twice, or that its reader checks.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = stack.enter_context(file.open("ab"))
            if _locks is not None:
                _locks.flock(opened, _locks.LOCK_EX)
        yield
