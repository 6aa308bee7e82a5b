"""Blend networks that end in a linear interpolation, from what is interpolated: a fraction of the memory and time.

SegFormer3D computes logits at a quarter of the resolution and interpolates them to its window. Interpolation, the
weights of the blend and the way to the scan's grid are all separable and linear, so each axis has one small matrix from
the coarse voxels of all windows that touch a piece of the scan to that piece. Coarse logits of windows are kept as they
come, until the last piece that they touch is made; nothing is ever kept at the image's resolution.

In a piece every logit is a mean of coarse logits with weights that are not negative and sum to one. A class whose
highest coarse logit is below the lowest one of another class can't win there, and is left out: exactly, not nearly.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import DTypeLike

from sagittal.inference.blending import Place, visits
from sagittal.inference.slabs import AxisTaps, multiply
from sagittal.inference.windows import Tiling, shares
from sagittal.plan.base import Triple

PIECE = 32
"""Voxels of the result along each axis that are made at once."""
Write = Callable[[Place, Float32[np.ndarray, "k d h w"], Int64[np.ndarray, " k"]], None]
_FLOAT_BYTES = 4


class _Part(NamedTuple):
    """What one window along an axis gives to a piece: some of its coarse voxels."""

    window: int
    nodes: slice


class _Piece(NamedTuple):
    """Some outputs along one axis, and what makes them: outputs = matrix @ the nodes of all parts."""

    outputs: slice
    parts: tuple[_Part, ...]
    matrix: Float32[np.ndarray, "n nodes"]


class CoarseBlender:
    """Keep coarse logits of windows and make the result of them, block by block.

    Args:
        tiling: the windows.
        order: the axes from the outermost to the innermost, as the windows come.
        stride: by how much the logits are coarser than the windows; it divides their sides.
        grids: D, H, W of the network's grid without padding, and of the result.
        dtype: of what is kept.
    """

    def __init__(
        self,
        tiling: Tiling,
        order: Triple,
        stride: int,
        grids: tuple[Triple, Triple],
        dtype: DTypeLike = np.float32,
    ) -> None:
        shape, target = grids
        self._dtype = dtype
        self._pieces = [_pieces_of(tiling, axis, stride, shape[axis], target[axis]) for axis in range(3)]
        self._release = _releases(tiling, order, [_last_uses(pieces) for pieces in self._pieces])
        self._kept: dict[Triple, np.ndarray] = {}

    def add(self, number: Triple, logits: Float32[np.ndarray, "K d h w"], write: Write, *, bound: float | None) -> None:
        """Take a window's coarse logits and write all pieces that it completes.

        Args:
            number: of the window along D, H and W.
            logits: its coarse logits.
            write: gets the place of a piece in the result, its logits and their classes.
            bound: leave out what stays at or below it, for regions; None leaves out classes that another one exceeds;
                minus infinity leaves out nothing.
        """
        self._kept[number] = logits.astype(self._dtype)
        d_pieces, h_pieces, w_pieces = (pieces[at] for pieces, at in zip(self._pieces, number, strict=True))
        for d_piece in d_pieces:
            for h_piece in h_pieces:
                for w_piece in w_pieces:
                    self._make((d_piece, h_piece, w_piece), write, bound)
        for done in self._release.pop(number, ()):
            del self._kept[done]

    def _make(self, pieces: tuple[_Piece, _Piece, _Piece], write: Write, bound: float | None) -> None:
        d, h, w = pieces
        nodes = self._gathered(pieces)
        highest = nodes.max(axis=(1, 2, 3))
        if bound is None:
            classes = np.flatnonzero(highest >= nodes.min(axis=(1, 2, 3)).max())
        else:
            classes = np.flatnonzero(highest > bound)
        values = nodes if len(classes) == len(nodes) else nodes[classes]
        for axis, piece in ((2, w), (1, h), (0, d)):
            values = multiply(values, piece.matrix, axis)
        write((d.outputs, h.outputs, w.outputs), values, classes)

    def _gathered(self, pieces: tuple[_Piece, _Piece, _Piece]) -> Float32[np.ndarray, "K a b c"]:
        """Return the coarse logits of all windows that touch a piece, side by side along each axis."""
        d, h, w = pieces
        channels = len(next(iter(self._kept.values())))
        nodes = np.empty((channels, d.matrix.shape[1], h.matrix.shape[1], w.matrix.shape[1]), np.float32)
        for d_part, d_there in _side_by_side(d):
            for h_part, h_there in _side_by_side(h):
                for w_part, w_there in _side_by_side(w):
                    kept = self._kept[d_part.window, h_part.window, w_part.window]
                    nodes[:, d_there, h_there, w_there] = kept[:, d_part.nodes, h_part.nodes, w_part.nodes]
        return nodes


def kept_windows(tiling: Tiling, order: Triple, stride: int, grids: tuple[Triple, Triple]) -> int:
    """Return how many windows a `CoarseBlender` holds at the most."""
    shape, target = grids
    uses = [_last_uses(_pieces_of(tiling, axis, stride, shape[axis], target[axis])) for axis in range(3)]
    release = _releases(tiling, order, uses)
    held = most = 0
    for number in visits(tiling, order):
        held += 1
        most = max(most, held)
        held -= len(release.get(number, ()))
    return most


def piece_bytes(channels: int, stride: int) -> int:
    """Return the memory for one piece: its nodes, what is between, and its logits twice, where no class is left out."""
    # Two windows touch a voxel along each axis, a third one at borders.
    nodes = min(3 * (PIECE // stride + 2), 3 * PIECE)
    return _FLOAT_BYTES * channels * (2 * nodes**3 + nodes**2 * PIECE + nodes * PIECE**2 + 2 * PIECE**3)


def _side_by_side(piece: _Piece) -> list[tuple[_Part, slice]]:
    found, start = [], 0
    for part in piece.parts:
        stop = start + part.nodes.stop - part.nodes.start
        found.append((part, slice(start, stop)))
        start = stop
    return found


def _pieces_of(tiling: Tiling, axis: int, stride: int, n_in: int, n_out: int) -> list[list[_Piece]]:
    """Return for each window along an axis the pieces that it completes."""
    starts, window, before = tiling.starts[axis], tiling.window[axis], tiling.before[axis]
    taps, own = AxisTaps(n_in, n_out), AxisTaps(window // stride, window)
    upsampling = own.matrix(0, window // stride) if stride > 1 else np.eye(window, dtype=np.float32)
    given = [share[:, None] * upsampling for share in shares(tiling, axis)]
    found = []
    for number, start in enumerate(starts):
        # In the volume without padding, where one window spans an axis that is padded.
        stop = starts[number + 1] if number + 1 < len(starts) else start + window
        outputs = taps.made_with(max(start - before, 0), min(stop - before, n_in))
        pieces = []
        for first in range(outputs.start, outputs.stop, PIECE):
            piece = slice(first, min(first + PIECE, outputs.stop))
            pieces.append(_piece(piece, taps, given[: number + 1], starts, before))
        found.append(pieces)
    return found


def _piece(outputs: slice, taps: AxisTaps, given: list[np.ndarray], starts: tuple[int, ...], before: int) -> _Piece:
    rows = np.arange(outputs.start, outputs.stop)
    lower, upper, share = (
        (taps.lower[rows], taps.upper[rows], taps.share[rows].astype(np.float32))
        if taps.changes
        else (rows, rows, np.zeros(len(rows), np.float32))
    )
    parts, matrices = [], []
    for number, matrix in enumerate(given):
        weights = np.zeros((len(rows), matrix.shape[1]), np.float32)
        for at, weight in ((lower, 1 - share), (upper, share)):
            inside = at + before - starts[number]
            valid = (inside >= 0) & (inside < len(matrix))
            weights[valid] += weight[valid, None] * matrix[inside[valid]]
        nodes = np.flatnonzero(weights.any(axis=0))
        if nodes.size:
            used = slice(int(nodes[0]), int(nodes[-1]) + 1)
            parts.append(_Part(number, used))
            matrices.append(weights[:, used])
    return _Piece(outputs, tuple(parts), np.concatenate(matrices, axis=1))


def _last_uses(pieces: list[list[_Piece]]) -> list[int]:
    """Return for each window along an axis the last one whose pieces it touches."""
    last = list(range(len(pieces)))
    for number, made in enumerate(pieces):
        for piece in made:
            for part in piece.parts:
                last[part.window] = max(last[part.window], number)
    return last


def _releases(tiling: Tiling, order: Triple, last: list[list[int]]) -> dict[Triple, list[Triple]]:
    """Return which windows are no longer needed after each window."""
    found: dict[Triple, list[Triple]] = {}
    for d, h, w in visits(tiling, order):
        found.setdefault((last[0][d], last[1][h], last[2][w]), []).append((d, h, w))
    return found


def coarse_voxels(window: Triple, stride: int) -> int:
    """Return the voxels of a window's coarse logits."""
    return prod(size // stride for size in window)
