"""Blend overlapping windows into finished blocks, keeping only what further windows still touch.

The weight of a voxel in a window is a product of one share per axis, and the shares of all windows at a voxel sum to
one along each axis (`windows.shares`). So windows can be summed one axis after the other, the innermost first: what a
window shares with its next neighbour along an axis is kept (the carry of that axis) and the rest is finished there.
With windows of d x h x w that overlap by half, a volume of D x H x W keeps d/2 x H x W + d x h/2 x W + d x h x w/2
voxels of each channel, whatever D is.
"""

from __future__ import annotations

from itertools import pairwise, permutations, product
from math import prod

import numpy as np
from jaxtyping import Float32
from numpy.typing import DTypeLike

from sagittal.inference.windows import Tiling, shares
from sagittal.plan.base import Triple

Place = tuple[slice, slice, slice]
"""Where a block lies in the padded volume."""


def visiting_order(tiling: Tiling, first: int | None = None) -> Triple:
    """Return the axes (of D, H, W) from the outermost to the innermost for which the least has to be kept.

    Args:
        tiling: the windows.
        first: an axis that has to be the outermost.
    """
    orders = [order for order in permutations((0, 1, 2)) if first is None or order[0] == first]
    a, b, c = min(orders, key=lambda order: carried_voxels(tiling, (order[0], order[1], order[2])))
    return a, b, c


def carried_voxels(tiling: Tiling, order: Triple) -> int:
    """Return how many voxels of each channel a `Blender` keeps."""
    return sum(prod(shape) for shape in (_carry_shape(tiling, order, level) for level in range(3)) if shape)


def visits(tiling: Tiling, order: Triple) -> list[Triple]:
    """Return the windows in the order in which a `Blender` takes them: their number along D, along H and along W."""
    ranges = [range(len(tiling.starts[axis])) for axis in order]
    found = []
    for numbers in product(*ranges):
        at = dict(zip(order, numbers, strict=True))
        found.append((at[0], at[1], at[2]))
    return found


class Blender:
    """Sum weighted windows; what no further window touches comes back at once.

    Args:
        tiling: the windows.
        order: the axes from the outermost to the innermost, see `visiting_order`.
        channels: channels of each window.
        dtype: of what is kept; sums themselves are float32.
    """

    def __init__(self, tiling: Tiling, order: Triple, channels: int, dtype: DTypeLike = np.float32) -> None:
        self._tiling, self._order = tiling, order
        self._shares = tuple(shares(tiling, axis) for axis in range(3))
        shapes = [_carry_shape(tiling, order, level) for level in range(3)]
        # Not cleared: what is read was written before.
        self._carries = [np.empty((channels, *shape), dtype) if shape else None for shape in shapes]

    def add(
        self, number: Triple, window: Float32[np.ndarray, "F d h w"]
    ) -> tuple[Place, Float32[np.ndarray, "F a b c"]]:
        """Add one window and return what it finishes, with its place in the padded volume.

        The blocks of all windows, taken in the order of `visits`, cover the volume once.

        Args:
            number: of the window along D, H and W.
            window: its values; they are changed, and the block is a view of them.
        """
        if self._tiling.num_windows > 1:
            d, h, w = (axis_shares[at] for axis_shares, at in zip(self._shares, number, strict=True))
            window *= d[:, None, None] * h[:, None] * w
        block = window
        for level in (2, 1, 0):
            block = self._finish(level, number, block)
        d_place, h_place, w_place = (_span(self._tiling, axis, number[axis]) for axis in range(3))
        return (d_place, h_place, w_place), block

    def _finish(self, level: int, number: Triple, block: Float32[np.ndarray, "F a b c"]) -> np.ndarray:
        """Add what former windows left along the axis of `level`, keep what the next one shares, return the rest."""
        axis = self._order[level]
        carry, starts, at = self._carries[level], self._tiling.starts[axis], number[axis]
        if carry is None:
            return block
        inner = {other: _span(self._tiling, other, number[other]) for other in self._order[level + 1 :]}

        def where(start: int, stop: int, rest: dict[int, slice]) -> tuple[slice, ...]:
            along = {**rest, axis: slice(start, stop)}
            return (slice(None), *(along.get(other, slice(None)) for other in range(3)))

        if at > 0:
            kept = starts[at - 1] + self._tiling.window[axis] - starts[at]
            block[where(0, kept, {})] += carry[where(0, kept, inner)]
        if at + 1 == len(starts):
            return block
        done = starts[at + 1] - starts[at]
        carry[where(0, self._tiling.window[axis] - done, inner)] = block[where(done, self._tiling.window[axis], {})]
        return block[where(0, done, {})]


def _span(tiling: Tiling, axis: int, number: int) -> slice:
    """Return what the window `number` finishes along an axis: from its start to the next one's."""
    starts = tiling.starts[axis]
    last = number + 1 == len(starts)
    return slice(starts[number], starts[number] + tiling.window[axis] if last else starts[number + 1])


def _carry_shape(tiling: Tiling, order: Triple, level: int) -> Triple | None:
    """Return the voxels that are kept for the axis of `level`, None where it has one window only."""
    starts = tiling.starts[order[level]]
    if len(starts) == 1:
        return None
    window = tiling.window
    shape = [0, 0, 0]
    for position, axis in enumerate(order):
        if position < level:
            shape[axis] = window[axis]
        elif position > level:
            shape[axis] = tiling.starts[axis][-1] + window[axis]
        else:
            shape[axis] = window[axis] - min(b - a for a, b in pairwise(starts))
    return shape[0], shape[1], shape[2]
