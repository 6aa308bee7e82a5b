"""Telling the same voxels again, also under another name, type, format or axis order, or mirrored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from sagittal.volumes.geometry import Reorientation

# Constants of splitmix64's mixing: sums of mixed voxels tell images apart whose plain sums agree.
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_OFFSET = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


@dataclass(frozen=True)
class Signature:
    """Hashes of an image's voxels.

    Attributes:
        any_order: the same for all 48 ways to turn and mirror the array.
        in_ras: the same only where the arrays agree once they are brought into RAS order.
    """

    any_order: str
    in_ras: str


def signature(values: Float32[np.ndarray, "D H W"], to_ras: Reorientation) -> Signature:
    """Return the hashes of an image, from one pass over it, plane by plane.

    Every voxel is mixed into 64 bits; the sums of these over the planes across D, H and W (which are exact, since they
    wrap) are three vectors. Turning the array only permutes and reverses them.

    Args:
        values: the image; 0 and -0 are the same.
        to_ras: how its axes get into RAS order.
    """
    sums = [np.zeros(size, np.uint64) for size in values.shape]
    for depth, plane in enumerate(values):
        mixed = _mixed(plane)
        rows = mixed.sum(axis=1, dtype=np.uint64)
        sums[0][depth] = rows.sum(dtype=np.uint64)
        sums[1] += rows
        sums[2] += mixed.sum(axis=0, dtype=np.uint64)
    turned = [
        sums[axis][::-1] if flip else sums[axis] for axis, flip in zip(to_ras.permutation, to_ras.flips, strict=True)
    ]
    either_way = sorted(min(vector.tobytes(), vector[::-1].tobytes()) for vector in sums)
    return Signature(_digest(either_way), _digest([vector.tobytes() for vector in turned]))


def _mixed(plane: Float32[np.ndarray, "H W"]) -> np.ndarray:
    mixed = (plane + np.float32(0)).view(np.uint32).astype(np.uint64)
    mixed += _OFFSET
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _FIRST
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _SECOND
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


def _digest(vectors: list[bytes]) -> str:
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(len(vector).to_bytes(8, "little"))
        digest.update(vector)
    return digest.hexdigest()
