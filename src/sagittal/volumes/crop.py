"""Cutting boxes out of volumes and padding them, with every voxel's place in the world kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray

from sagittal.plan.base import Triple
from sagittal.volumes.geometry import shifted
from sagittal.volumes.volume import Volume


@dataclass(frozen=True)
class Box:
    """A half-open box of voxels: `start` belongs to it, `stop` does not. Order D, H, W."""

    start: Triple
    stop: Triple

    @property
    def shape(self) -> Triple:
        """Voxels along D, H, W."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the box in a (D, H, W) array; for channels use `array[:, *box.slices]`."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return slice(a, d), slice(b, e), slice(c, f)

    @classmethod
    def whole(cls, shape: Triple) -> Box:
        """Return the box of all voxels."""
        return cls((0, 0, 0), shape)

    def union(self, other: Box) -> Box:
        """Return the smallest box that holds both."""
        (a, b, c), (d, e, f) = self.start, self.stop
        (u, v, w), (x, y, z) = other.start, other.stop
        return Box((min(a, u), min(b, v), min(c, w)), (max(d, x), max(e, y), max(f, z)))


def bounding_box(mask: Bool[np.ndarray, "D H W"]) -> Box | None:
    """Return the smallest box that holds all true voxels, or None where there are none."""
    planes = np.flatnonzero(mask.any(axis=(1, 2)))
    if planes.size == 0:
        return None
    first, last = int(planes[0]), int(planes[-1])
    # One pass over the planes that matter, then two over a single plane.
    shadow = np.asarray(mask[first : last + 1].any(axis=0))
    rows = np.flatnonzero(shadow.any(axis=1))
    columns = np.flatnonzero(shadow.any(axis=0))
    start = (first, int(rows[0]), int(columns[0]))
    return Box(start, (last + 1, int(rows[-1]) + 1, int(columns[-1]) + 1))


def nonzero_box(channels: Sequence[Shaped[np.ndarray, "D H W"]] | Shaped[np.ndarray, "C D H W"]) -> Box:
    """Return the smallest box outside of which every channel is zero; the whole volume where all voxels are zero.

    nnU-Net's crop (cropping.py): the union over channels of `data != 0`. It also fills holes, which can't move the box.
    """
    found: Box | None = None
    for channel in channels:
        box = bounding_box(np.not_equal(channel, 0))
        if box is not None:
            found = box if found is None else found.union(box)
    depth, height, width = channels[0].shape
    return found if found is not None else Box.whole((depth, height, width))


def crop(volume: Volume, box: Box) -> Volume:
    """Return the voxels of `box` as a view; the affine moves with its first voxel.

    The box lies within the volume and is not empty.
    """
    inside = all(0 <= a < b <= n for a, b, n in zip(box.start, box.stop, volume.geometry.shape, strict=True))
    assert inside, f"{box} is not a box within {volume.geometry.shape}"
    d, h, w = box.slices
    return Volume(volume.array[:, d, h, w], shifted(volume.affine, box.start), volume.header)


def pad(volume: Volume, before: Triple, after: Triple, value: float | int = 0) -> Volume:
    """Return the volume with `before` and `after` voxels of `value` added along D, H, W; the affine moves along."""
    assert min(before + after) >= 0, f"padding {before}, {after} must not be negative"
    widths = [(0, 0), *zip(before, after, strict=True)]
    array = np.pad(volume.array, widths, constant_values=volume.array.dtype.type(value))
    return Volume(array, shifted(volume.affine, [-count for count in before]), volume.header)


def uncrop(array: NDArray[Any], box: Box, shape: Triple, value: float | int = 0) -> NDArray[Any]:
    """Put the (..., D, H, W) voxels of `box` back into a volume of `shape`, filled with `value` elsewhere."""
    assert array.shape[-3:] == box.shape, f"{array.shape} are not the voxels of {box}"
    whole = np.full((*array.shape[:-3], *shape), value, dtype=array.dtype)
    d, h, w = box.slices
    whole[..., d, h, w] = array
    return whole
