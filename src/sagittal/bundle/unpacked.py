"""The temporary folders that packages are unpacked in: one is held as long as its process lives, and only a folder that
nobody holds is deleted. A server reads weights from its folder again after weeks.

A hold is a lock on the folder, which the system releases with the process however it ends, and which systemd's tidying
of temporary folders minds too. Windows has no such lock, but renames no folder in which a file is open.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sagittal.bundle.manifest import MANIFEST

_locks: Any = import_module("fcntl") if os.name == "posix" else None
_PREFIX = "sagittal-package-"
_GONE = ".gone"
_FORGOTTEN_AFTER_S = 86400.0
"""A younger folder may be about to be held."""


@dataclass(frozen=True)
class Unpacked:
    """A folder and the hold on it.

    Attributes:
        path: the folder.
        owner: the process that deletes it: a forked child leaves it to its parent.
        descriptor: of the hold; None where the system refused one.
    """

    path: Path
    owner: int
    descriptor: int | None

    def remove(self) -> None:
        """Let go of the folder and delete it."""
        if os.getpid() != self.owner:
            return
        if self.descriptor is not None:
            with suppress(OSError):
                os.close(self.descriptor)
        shutil.rmtree(self.path, ignore_errors=True)


def new_folder() -> Path:
    """Return a new empty folder, after deleting those of processes that were killed."""
    forget_abandoned()
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def hold(folder: Path) -> Unpacked:
    """Hold a folder that was filled; it stays until `Unpacked.remove`, or for a day after the process has died."""
    descriptor = None
    with suppress(OSError):
        if _locks is None:
            descriptor = os.open(folder / MANIFEST, os.O_RDONLY)
        else:
            descriptor = os.open(folder, os.O_RDONLY)
            _locks.flock(descriptor, _locks.LOCK_SH)
    return Unpacked(folder, os.getpid(), descriptor)


def forget_abandoned() -> None:
    """Delete what processes that were killed unpacked, and leave what a living one holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _FORGOTTEN_AFTER_S:
                _delete_unheld(folder)


def _delete_unheld(folder: Path) -> None:
    """Delete a folder.

    Raises:
        OSError: somebody holds it, or it is not ours.
    """
    if _locks is None:
        shutil.rmtree(folder.rename(folder.with_name(folder.name.removesuffix(_GONE) + _GONE)), ignore_errors=True)
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _locks.flock(descriptor, _locks.LOCK_EX | _locks.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
