"""Probabilities of all classes as CASE.npz, written with a memory that does not grow with the number of classes.

An npz holds one array after the other, and the array is asked for as (K, D, H, W) in the scan's stored order, class
after class. Logits come slab by slab, all classes at a time, in the network's order of axes. So each class's piece of a
slab is packed into a scratch file beside the output as it comes (probabilities are mostly 0 or 1, so it stays small);
at the end the pieces of one class at a time are unpacked, turned into the scan's order and written.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from isal import isal_zlib
from jaxtyping import Float16, Float32

from sagittal.data.preprocessing import Frame
from sagittal.plan.base import cannot_write
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.crop import uncrop

KEY = "probabilities"
SUFFIX = ".npz"
_TILE = 1 << 20
_PACK_LEVEL = 1


class ProbabilityFile:
    """Takes logits slab by slab and writes probabilities: a consumer of `Predictor.predict`. Use it in a `with`.

    The file has the key `probabilities`: float16, (K, D, H, W) on the scan's stored grid, the softmax over all classes
    with the background first, or the sigmoid of each region. Outside of the crop, where the network saw nothing, it is
    background.

    Args:
        path: CASE.npz; it appears whole or not at all, when `finish` is called.
        spec: the model's classes or regions.
        frame: where the cropped scan lies.

    Raises:
        ResourceError: the disk is full or the folder can't be written.
    """

    def __init__(self, path: Path, spec: DatasetSpec, frame: Frame) -> None:
        self._path, self._spec, self._frame = path, spec, frame
        self._pieces: list[list[tuple[slice, int, int]]] = [[] for _ in range(spec.num_outputs)]
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # It has no name on POSIX, so that a killed run leaves nothing; `__exit__` closes it.
            self._scratch = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - see above

    def __enter__(self) -> ProbabilityFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Take the scratch file away."""
        self._scratch.close()

    def __call__(self, rows: slice, logits: Float32[np.ndarray, "K d H W"]) -> None:
        """Take in a slab: rows of the network's first axis of the cropped scan."""
        shares = shares_of(logits, has_regions=self._spec.has_regions)
        with _explained(self._path):
            for output, piece in enumerate(shares):
                packed = isal_zlib.compress(piece.data, _PACK_LEVEL)
                self._pieces[output].append((rows, self._scratch.tell(), len(packed)))
                self._scratch.write(packed)

    def finish(self) -> Path:
        """Write the file and return its path."""
        shape = (self._spec.num_outputs, *self._frame.stored_shape)
        temporary: str | None = None
        with _explained(self._path):
            try:
                descriptor, temporary = tempfile.mkstemp(
                    dir=self._path.parent, prefix=f".{self._path.name}.", suffix=".part"
                )
                with os.fdopen(descriptor, "wb") as file:
                    with (
                        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
                        # The size is not known before it is packed, and may exceed 2 GiB.
                        archive.open(f"{KEY}.npy", "w", force_zip64=True) as member,
                    ):
                        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                        for output in range(len(self._pieces)):
                            for plane in self._class_on_grid(output):
                                member.write(np.ascontiguousarray(plane, "<f2").data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                Path(temporary).replace(self._path)
            finally:
                if temporary is not None:
                    Path(temporary).unlink(missing_ok=True)
        return self._path

    def _class_on_grid(self, output: int) -> Float16[np.ndarray, "D H W"]:
        """Return one class on the scan's stored grid."""
        cropped = np.empty(self._frame.cropped_shape, np.float16)
        for rows, start, length in self._pieces[output]:
            self._scratch.seek(start)
            piece = isal_zlib.decompress(self._scratch.read(length))
            cropped[rows] = np.frombuffer(piece, np.float16).reshape(cropped[rows].shape)
        outside = 1 if output == 0 and not self._spec.has_regions else 0
        turned = self._frame.reorientation
        whole = uncrop(cropped, self._frame.box, turned.shape(self._frame.stored_shape), outside)
        return np.asarray(turned.inverse().apply(whole))


def shares_of(logits: Float32[np.ndarray, "K d H W"], *, has_regions: bool) -> Float16[np.ndarray, "K d H W"]:
    """Return the softmax over the first axis, or the sigmoid of each output, as float16."""
    out = np.empty(logits.shape, np.float16)
    step = max(1, _TILE // (logits.shape[0] * logits.shape[3]))
    for depth in range(logits.shape[1]):
        for start in range(0, logits.shape[2], step):
            tile = logits[:, depth, start : start + step]
            shares = probabilities_of(tile, has_regions=has_regions)
            out[:, depth, start : start + step] = shares
    return out


def probabilities_of(logits: Float32[np.ndarray, "K ..."], *, has_regions: bool) -> Float32[np.ndarray, "K ..."]:
    """Return the softmax over the first axis, or the sigmoid of each output; for as many voxels as fit the cache."""
    if has_regions:
        # Half of one plus a hyperbolic tangent: a sigmoid that never overflows.
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits), np.float32)
    shares = np.exp(logits - logits.max(axis=0))
    shares /= shares.sum(axis=0)
    return np.asarray(shares)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, code="disk") from None
