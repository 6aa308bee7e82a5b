"""Bring finished blocks onto the cropped scan's grid by linear interpolation, across the borders of blocks.

Blocks come in the order of a `Blender`. Along each axis an output voxel has two taps, and it is made with the block
that holds the upper one; the plane before a block is kept for the taps that reach back to it. Values are those of
torch's `interpolate(mode="trilinear", align_corners=False)`: voxel centres are interpolated between, ends go on.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
from jaxtyping import Float32

from sagittal.inference.blending import Place
from sagittal.inference.windows import Tiling
from sagittal.plan.base import Triple


class AxisTaps:
    """The two neighbours of each of `n_out` voxels among `n_in`, along one axis over the same length."""

    def __init__(self, n_in: int, n_out: int) -> None:
        centre = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
        self.n_in, self.n_out = n_in, n_out
        self.lower = np.floor(centre).astype(np.int64)
        self.upper = np.minimum(self.lower + 1, n_in - 1)
        self.share = centre - self.lower

    @property
    def changes(self) -> bool:
        """Whether the two grids differ."""
        return self.n_in != self.n_out

    def made_with(self, start: int, stop: int) -> slice:
        """Return the outputs whose upper tap is one of the inputs `start` to `stop`."""
        if not self.changes:
            return slice(start, stop)
        first, last = np.searchsorted(self.upper, (start, stop))
        return slice(int(first), int(last))

    def matrix(self, start: int, stop: int) -> Float32[np.ndarray, "n_out n_in"]:
        """Return the weights of these outputs; columns are the input before `start` (where there is one) to `stop`."""
        outputs = self.made_with(start, stop)
        before = max(start - 1, 0)
        weights = np.zeros((outputs.stop - outputs.start, stop - before), np.float32)
        rows = np.arange(len(weights))
        weights[rows, self.lower[outputs] - before] += (1 - self.share[outputs]).astype(np.float32)
        weights[rows, self.upper[outputs] - before] += self.share[outputs].astype(np.float32)
        return weights


class BlockResampler:
    """Resample blocks one after the other; each call gives the part of the result that it completes.

    Args:
        tiling: of the network's grid.
        order: the axes from the outermost to the innermost, as the blocks come.
        shape: D, H, W of the network's grid, without padding.
        target: D, H, W of the result.
        channels: channels of a block.
    """

    def __init__(self, tiling: Tiling, order: Triple, shape: Triple, target: Triple, channels: int) -> None:
        self._order = order
        self.taps = tuple(AxisTaps(n_in, n_out) for n_in, n_out in zip(shape, target, strict=True))
        self._matrix = lru_cache(maxsize=64)(lambda axis, start, stop: self.taps[axis].matrix(start, stop))
        self._halos: dict[int, np.ndarray] = {}
        shapes = halo_shapes(tiling, order, shape, target)
        for axis, halo in shapes.items():
            self._halos[axis] = np.empty((channels, *halo), np.float32)
        self._first_row = 0

    def resample(
        self, place: Place, block: Float32[np.ndarray, "F a b c"], layer_start: int
    ) -> tuple[Place, Float32[np.ndarray, "F d e f"]]:
        """Return what a block completes and its place in the result.

        Args:
            place: of the block on the network's grid. Along the outermost axis it may be part of a layer of blocks; the
                parts of one block come one after the other.
            block: its values.
            layer_start: where the layer begins along the outermost axis.
        """
        outputs = [self.taps[axis].made_with(where.start, where.stop) for axis, where in enumerate(place)]
        done = list(place)
        first_row = self.taps[self._order[0]].made_with(layer_start, layer_start).start
        for axis in self._order:
            if self.taps[axis].changes:
                halo = self._halos[axis]
                there = list(done)
                outer = self._order[0]
                if outer != axis:
                    there[outer] = slice(outputs[outer].start - first_row, outputs[outer].stop - first_row)
                # Every halo is one plane thick, and the one of the innermost axis as wide as the row of blocks.
                if axis == self._order[2]:
                    middle = self._order[1]
                    start = outputs[middle].start
                    there[middle] = slice(0, outputs[middle].stop - start)
                there[axis] = slice(0, 1)
                block = self._along(axis, place[axis], block, halo[(slice(None), *there)])
            done[axis] = outputs[axis]
        return (outputs[0], outputs[1], outputs[2]), block

    def _along(self, axis: int, where: slice, block: np.ndarray, halo: np.ndarray) -> np.ndarray:
        """Resample a block along one axis, with the plane before it, and keep its last plane as the next halo."""
        joined = np.concatenate([halo, block], axis=axis + 1) if where.start > 0 else block
        last: list[slice] = [slice(None)] * 4
        last[axis + 1] = slice(-1, None)
        halo[...] = block[tuple(last)]
        return multiply(joined, self._matrix(axis, where.start, where.stop), axis)


def multiply(
    values: Float32[np.ndarray, "F d h w"], matrix: Float32[np.ndarray, "m n"], axis: int
) -> Float32[np.ndarray, "F a b c"]:
    """Return `values` with `matrix` applied along one of the axes D, H, W."""
    channels, depth, height, width = values.shape
    if axis == 2:
        lines = values.reshape(-1, width)
        return np.asarray(lines @ matrix.T).reshape(channels, depth, height, len(matrix))
    if axis == 1:
        return np.asarray(matrix @ values)
    planes = values.reshape(channels, depth, height * width)
    return np.asarray(matrix @ planes).reshape(channels, len(matrix), height, width)


def halo_shapes(tiling: Tiling, order: Triple, shape: Triple, target: Triple) -> dict[int, Triple]:
    """Return the D, H, W of the planes that a `BlockResampler` keeps, for each axis that is resampled."""
    found: dict[int, Triple] = {}
    for level, axis in enumerate(order):
        if shape[axis] == target[axis]:
            continue
        halo = list(shape)
        halo[axis] = 1
        for outer in order[:level]:
            halo[outer] = most_outputs(tiling, outer, shape[outer], target[outer])
        found[axis] = (halo[0], halo[1], halo[2])
    return found


def most_outputs(tiling: Tiling, axis: int, n_in: int, n_out: int) -> int:
    """Return an upper bound of the output voxels that one block completes along an axis."""
    return min(n_out, -(-(min(n_in, tiling.window[axis]) + 1) * n_out // n_in) + 2)


def halo_voxels(tiling: Tiling, order: Triple, shape: Triple, target: Triple) -> int:
    """Return how many voxels of each channel a `BlockResampler` keeps."""
    return sum(prod(halo) for halo in halo_shapes(tiling, order, shape, target).values())
