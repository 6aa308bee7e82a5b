"""Blocks of numbers in a file without a name: for what would take too much memory until it is asked for again.

And where such a file may lie: on a disk with room for it, for a folder in main memory (tmpfs) would save nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import DTypeLike

from sagittal.errors import ResourceError
from sagittal.inference.memory import gib

ROOM = 1.125
"""What a block's first size is multiplied by, so that the next ones fit in its place."""
_FREE_SHARE = 0.9
"""Of what is free on a disk, how much may be counted on: others write too."""
_KEPT_TEMPORARY = "/var/tmp"
"""What is meant for bigger temporary files and stays on the disk where the other folder is in main memory."""
_IN_MEMORY = {"tmpfs", "ramfs"}


class ScratchBlocks:
    """Blocks by key; each is written whole and read whole, a channel at a time. Not for several threads at once.

    Args:
        folder: where the file lies; it vanishes when it is closed, or with the process.
        dtype: that blocks are kept as.
        needed_bytes: of all blocks in the end, for messages.

    Raises:
        ResourceError: the folder can't be written.
    """

    def __init__(self, folder: Path, dtype: DTypeLike, needed_bytes: int = 0) -> None:
        self._folder, self._dtype, self._needed = folder, np.dtype(dtype), needed_bytes
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._shapes: dict[Hashable, tuple[int, ...]] = {}
        self._end = 0
        with _explained(folder, needed_bytes):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `close` closes it

    def close(self) -> None:
        """Take the file away."""
        self._file.close()

    def write(self, key: Hashable, block: Float32[np.ndarray, "F a b c"]) -> None:
        """Keep a block in place of the former one of this key.

        Raises:
            ResourceError: the disk is full or fails.
        """
        count = block.size * self._dtype.itemsize
        start, room = self._places.get(key, (0, -1))
        if count > room:
            # Blocks of a key differ by a row or so: one that outgrows its room gets another.
            start, room = self._end, int(count * ROOM)
            self._places[key] = start, room
            self._end += room
        self._shapes[key] = block.shape
        with _explained(self._folder, self._needed):
            self._file.seek(start)
            for channel in block:
                rest = _bytes_of(np.ascontiguousarray(channel, self._dtype))
                while rest:
                    rest = rest[self._file.write(rest) :]

    def read(self, key: Hashable) -> Iterator[Shaped[np.ndarray, "a b c"]]:
        """Yield the channels of a block that was written; each array is gone with the next one.

        Raises:
            ResourceError: the disk fails.
        """
        channels, *sizes = self._shapes[key]
        values = np.empty(prod(sizes), self._dtype)
        for channel in range(channels):
            with _explained(self._folder, self._needed):
                self._file.seek(self._places[key][0] + channel * values.nbytes)
                rest = _bytes_of(values)
                while rest:
                    count = self._file.readinto(rest)
                    assert count, "it was written before"
                    rest = rest[count:]
            yield values.reshape(sizes)


def lacking(folder: Path, count: int) -> str | None:
    """Return what keeps a folder from taking blocks of so many bytes in all, as a sentence; None where nothing does."""
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder}: no file can be made there ({error.strerror or error})."
    if ROOM * count > _FREE_SHARE * free:
        return f"{folder}: {gib(int(ROOM * count / _FREE_SHARE))} are needed there and {gib(free)} are free."
    return None


def disk_folder() -> Path | None:
    """Return the system's folder for temporary files that lies on a disk; None where there is only main memory."""
    for folder in map(Path, (tempfile.gettempdir(), _KEPT_TEMPORARY)):
        if folder.is_dir() and os.access(folder, os.W_OK) and not _is_in_memory(folder):
            return folder
    return None


def _is_in_memory(folder: Path) -> bool:
    """Return whether a folder's files take main memory; elsewhere than on Linux nobody is asked."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    above = {str(each) for each in (folder.resolve(), *folder.resolve().parents)}
    # Of several at one place, the last one counts; a space in a name is told as \\040.
    kinds = {place.replace("\\040", " "): kind for _, place, kind, *_ in mounts}
    return kinds[max(above & kinds.keys(), key=len)] in _IN_MEMORY if above & kinds.keys() else False


def _bytes_of(values: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array, of an empty one too."""
    return values.reshape(-1).view(np.uint8).data


@contextmanager
def _explained(folder: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        need = f", {gib(needed_bytes)} in all" if needed_bytes else ""
        free, first = "", "Check the disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            first = "Free space there"
            with suppress(OSError):
                free = f" {gib(shutil.disk_usage(folder).free)} are free now."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            first = "Allow writing there"
        raise ResourceError(
            f"{folder}: can't be written ({error.strerror or error}). What windows share waits there in a file where "
            f"memory is short{need}.{free} {first}, choose another folder, or allow more with --memory-gib.",
            code="disk",
        ) from None
