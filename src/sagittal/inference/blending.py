"""Blend overlapping windows into finished blocks, keeping only what further windows still touch.

The weight of a voxel in a window is a product of one share per axis, and the shares of all windows at a voxel sum to
one along each axis (`windows.shares`). So windows can be summed one axis after the other, the innermost first: what a
window shares with its next neighbour along an axis is kept (the carry of that axis) and the rest is finished there.
With windows of d x h x w that overlap by half, a volume of D x H x W keeps d/2 x H x W + d x h/2 x W + d x h x w/2
voxels of each channel, whatever D is. Most of it waits for a whole layer of windows, and may wait in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, permutations, product
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32
from numpy.typing import DTypeLike

from sagittal.inference.scratch import ScratchBlocks
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
    a, b, c = min(orders, key=lambda order: sum(carried_voxels(tiling, (order[0], order[1], order[2]))))
    return a, b, c


def carried_voxels(tiling: Tiling, order: Triple) -> Triple:
    """Return how many voxels of each channel a `Blender` keeps for the outermost, the middle and the innermost axis."""
    shapes = (_carry_shape(tiling, order, level) for level in range(3))
    outermost, middle, innermost = (0 if shape is None else prod(shape) for shape in shapes)
    return outermost, middle, innermost


def visits(tiling: Tiling, order: Triple) -> list[Triple]:
    """Return the windows in the order in which a `Blender` takes them: their number along D, along H and along W."""
    ranges = [range(len(tiling.starts[axis])) for axis in order]
    found = []
    for numbers in product(*ranges):
        at = dict(zip(order, numbers, strict=True))
        found.append((at[0], at[1], at[2]))
    return found


class Blender:
    """Sum weighted windows; what no further window touches comes back at once. `close` it in the end.

    Args:
        tiling: the windows.
        order: the axes from the outermost to the innermost, see `visiting_order`.
        channels: channels of each window.
        dtype: of what is kept; sums themselves are float32.
        scratch: folder of a file for what is kept for the outermost axes, see `levels_in_file`.
        levels_in_file: of how many axes, the outermost first, the file takes what is kept: it costs time, not memory.

    Raises:
        ResourceError: the folder can't be written.
    """

    def __init__(
        self,
        tiling: Tiling,
        order: Triple,
        channels: int,
        dtype: DTypeLike = np.float32,
        *,
        scratch: Path | None = None,
        levels_in_file: int = 0,
    ) -> None:
        self._tiling, self._order = tiling, order
        self._shares = tuple(shares(tiling, axis) for axis in range(3))
        self._carries: list[_Carry | None] = []
        shapes = [_carry_shape(tiling, order, level) for level in range(3)]
        in_file = sum(channels * prod(shape) for shape in shapes[:levels_in_file] if shape is not None)
        for level, shape in enumerate(shapes):
            if shape is None:
                self._carries.append(None)
            elif scratch is not None and level < levels_in_file:
                self._carries.append(_CarryInFile(scratch, dtype, in_file * np.dtype(dtype).itemsize))
            else:
                self._carries.append(_CarryInMemory((channels, *shape), dtype))

    def close(self) -> None:
        """Take away what is kept, the file too."""
        for carry in self._carries:
            if carry is not None:
                carry.close()
        self._carries = [None, None, None]

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

        def along(start: int, stop: int, rest: Mapping[int, slice]) -> tuple[slice, ...]:
            spans = {**rest, axis: slice(start, stop)}
            return (slice(None), *(spans.get(other, slice(None)) for other in range(3)))

        window = self._tiling.window[axis]
        if at > 0:
            kept = starts[at - 1] + window - starts[at]
            carry.add_to(block[along(0, kept, {})], along(0, kept, inner))
        if at + 1 == len(starts):
            return block
        done = starts[at + 1] - starts[at]
        carry.keep(block[along(done, window, {})], along(0, window - done, inner))
        return block[along(0, done, {})]


class _Carry(Protocol):
    """What former windows left along an axis; places of one of its pieces differ in their rows along this axis only."""

    def add_to(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        """Add what lies there to a block."""
        ...

    def keep(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        """Keep a block in place of what lies there."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class _CarryInMemory:
    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        # Not cleared: what is read was written before.
        self._values = np.empty(shape, dtype)

    def add_to(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        block += self._values[where]

    def keep(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        self._values[where] = block

    def close(self) -> None:
        self._values = np.empty(0)


class _CarryInFile:
    """Pieces in a file, each whole as it comes and goes: what is inside of a window's span is asked for by it alone."""

    def __init__(self, folder: Path, dtype: DTypeLike, needed_bytes: int) -> None:
        self._blocks = ScratchBlocks(folder, dtype, needed_bytes)

    def add_to(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        for channel, values in enumerate(self._blocks.read(_key(where))):
            block[channel] += values

    def keep(self, block: Float32[np.ndarray, "F a b c"], where: tuple[slice, ...]) -> None:
        self._blocks.write(_key(where), block)

    def close(self) -> None:
        self._blocks.close()


def _key(where: tuple[slice, ...]) -> tuple[int, ...]:
    """Return what tells a piece from the others: where it begins."""
    return tuple(span.start or 0 for span in where)


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
