"""Normalising intensities: a clip, a shift and a scale per channel, found in one pass and applied piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import assert_never

import numpy as np
from jaxtyping import Bool, Float32, Shaped
from scipy import ndimage

from sagittal.plan.plan import CTNormalization, NoNormalization, Normalization, RescaleToUnit, ZScore

_STD_FLOOR = 1e-8
_MASK_BYTES = 6


@dataclass(frozen=True, eq=False)
class Scaling:
    """(clip(x) - shift) / scale; 0 outside of `mask` where there is one."""

    lower: float = -inf
    upper: float = inf
    shift: float = 0.0
    scale: float = 1.0
    mask: Bool[np.ndarray, "D H W"] | None = None

    def apply(
        self, piece: Shaped[np.ndarray, "d h w"], where: tuple[slice, slice, slice]
    ) -> Float32[np.ndarray, "d h w"]:
        """Return the piece of the channel that lies at `where`, normalised, as a new array in C order."""
        values = np.array(piece, np.float32, order="C")
        if self.lower > -inf or self.upper < inf:
            np.clip(values, np.float32(self.lower), np.float32(self.upper), out=values)
        if self.shift != 0.0:
            values -= np.float32(self.shift)
        if self.scale != 1.0:
            values /= np.float32(self.scale)
        if self.mask is not None:
            values[~self.mask[where]] = 0
        return values

    def bounds(self, channel: Shaped[np.ndarray, "D H W"]) -> tuple[float, float]:
        """Return limits that no normalised value of `channel` exceeds."""
        ends = np.clip([float(channel.min()), float(channel.max())], self.lower, self.upper)
        low, high = ((float(end) - self.shift) / self.scale for end in ends)
        return (min(low, 0.0), max(high, 0.0)) if self.mask is not None else (low, high)


def scaling(
    channel: Shaped[np.ndarray, "D H W"], scheme: Normalization, mask: Bool[np.ndarray, "D H W"] | None
) -> Scaling:
    """Return how `scheme` normalises one channel.

    Args:
        channel: (D, H, W), cropped, of any dtype and memory order.
        scheme: the plan's.
        mask: `nonzero_mask` of all channels, for z-scores inside of it; other schemes ignore it.
    """
    match scheme:
        case ZScore():
            inside = mask if scheme.nonzero_only else None
            mean, std = _moments(channel, inside)
            return Scaling(shift=mean, scale=max(std, _STD_FLOOR), mask=inside)
        case CTNormalization():
            return Scaling(scheme.lower, scheme.upper, scheme.mean, max(scheme.std, _STD_FLOOR))
        case RescaleToUnit():
            low, high = float(channel.min()), float(channel.max())
            return Scaling(shift=low, scale=max(high - low, _STD_FLOOR))
        case NoNormalization():
            return Scaling()
        case _:
            assert_never(scheme)


def nonzero_mask(channels: list[Shaped[np.ndarray, "D H W"]]) -> Bool[np.ndarray, "D H W"]:
    """Return where any channel is not zero, with enclosed holes filled (nnU-Net's create_nonzero_mask).

    A hole is a region of zeros that no path through the faces of voxels joins to the border.
    """
    zero = channels[0] == 0
    for channel in channels[1:]:
        zero &= channel == 0
    # Scipy's binary_fill_holes dilates step by step; one labelling of the zeros finds the same holes at once.
    regions, count = ndimage.label(zero)
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            outside[np.unique(regions.take(side, axis=axis))] = True
    outside[0] = False
    mask: Bool[np.ndarray, "D H W"] = zero
    inside = ~outside
    for depth, plane in enumerate(regions):
        # Plane by plane, into what is no longer needed: a look-up makes indices of eight bytes for each voxel.
        mask[depth] = inside[plane]
    return mask


def mask_bytes(voxels: int) -> int:
    """Return the memory that `nonzero_mask` takes: two bytes and the number of a region for each voxel."""
    return _MASK_BYTES * voxels


def _moments(channel: Shaped[np.ndarray, "D H W"], mask: Bool[np.ndarray, "D H W"] | None) -> tuple[float, float]:
    """Return mean and standard deviation, (0, 0) of no voxel.

    Intensities beyond 1e6 exist: sums of float32 lose them, so both are summed in float64, a plane at a time.
    """
    count = channel.size if mask is None else int(np.count_nonzero(mask))
    if count == 0:
        return 0.0, 0.0

    def planes() -> Iterator[np.ndarray]:
        for depth, plane in enumerate(channel):
            yield plane if mask is None else plane[mask[depth]]

    mean = sum(float(plane.sum(dtype=np.float64)) for plane in planes()) / count
    spread = sum(float(np.square(plane.astype(np.float64) - mean).sum()) for plane in planes())
    return mean, float(np.sqrt(spread / count))
