"""Blocks of numbers in a file without a name: for what would take too much memory until it is asked for again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import DTypeLike

from sagittal.errors import ResourceError

ROOM = 1.125
"""What a block's first size is multiplied by, so that the next ones fit in its place."""
_FREE_SHARE = 0.9
"""Of what is free on a disk, how much may be counted on: others write too."""


class ScratchBlocks:
    """Blocks by key; each is written whole and read whole, a channel at a time. Not for several threads at once.

    Args:
        folder: where the file lies; it vanishes when it is closed, or with the process.
        dtype: that blocks are kept as.

    Raises:
        ResourceError: the folder can't be written.
    """

    def __init__(self, folder: Path, dtype: DTypeLike) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._shapes: dict[Hashable, tuple[int, ...]] = {}
        self._end = 0
        with _explained(folder):
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
        with _explained(self._folder):
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
            with _explained(self._folder):
                self._file.seek(self._places[key][0] + channel * values.nbytes)
                rest = _bytes_of(values)
                while rest:
                    count = self._file.readinto(rest)
                    assert count, "it was written before"
                    rest = rest[count:]
            yield values.reshape(sizes)


def has_room(folder: Path, count: int) -> bool:
    """Return whether the disk of a folder takes blocks of so many bytes in all."""
    try:
        return ROOM * count <= _FREE_SHARE * shutil.disk_usage(folder).free
    except OSError:
        return False


def _bytes_of(values: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array, of an empty one too."""
    return values.reshape(-1).view(np.uint8).data


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{folder}: can't be written ({error.strerror}). What windows share waits there for a while where memory "
            "is short. Free space, choose another folder, or allow more with --memory-gib.",
            code="disk",
        ) from None
