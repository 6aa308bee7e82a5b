"""Probabilities from a file, class after class: CASE.npz as `sagittal predict --probabilities` and nnU-Net write it."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sagittal.errors import DataError
from sagittal.plan.base import Triple

_KEY = "probabilities"
_MEMBER = f"{_KEY}.npy"


@dataclass(frozen=True)
class StoredProbabilities:
    """The probabilities in a file: `len` is their number K, and each iteration reads the file once, from the start.

    One class is in memory at a time.
    """

    path: Path
    shape: Triple
    """Voxels along D, H, W, as the scan is stored."""
    outputs: int
    dtype: np.dtype[np.floating]

    def __len__(self) -> int:
        """Return K."""
        return self.outputs

    def __iter__(self) -> Iterator[Float[np.ndarray, "D H W"]]:
        """Yield the probabilities of one class or region after the other, (D, H, W).

        Raises:
            DataError: the file is damaged or has vanished.
        """
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_MEMBER) as member:
                _read_header(member)
                for _ in range(self.outputs):
                    content = member.read(size)
                    if len(content) != size:
                        raise _unusable(self.path, "ends early")
                    yield np.frombuffer(content, self.dtype).reshape(self.shape)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _unusable(self.path, f"is damaged ({error})") from None


def read_probabilities(path: str | os.PathLike[str]) -> StoredProbabilities:
    """Open CASE.npz; the numbers are read when they are asked for.

    Args:
        path: an npz with the key `probabilities`: floats (K, D, H, W), C order.

    Raises:
        DataError: no such file, or no such array in it.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as member:
            shape, fortran, dtype = _read_header(member)
    except OSError as error:
        raise _unusable(path, f"can't be read ({error.strerror})") from None
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _unusable(path, f"holds no array '{_KEY}' ({error})") from None
    if len(shape) != 4 or dtype.kind != "f" or fortran:
        order = "Fortran" if fortran else "C"
        raise _unusable(path, f"holds {dtype} of shape {shape} in {order} order")
    return StoredProbabilities(path, (shape[1], shape[2], shape[3]), shape[0], dtype)


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[np.floating]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _unusable(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}. Expected an npz with '{_KEY}', floats (K, D, H, W), as 'sagittal predict --probabilities' "
        "writes it.",
        code="probabilities",
    )
