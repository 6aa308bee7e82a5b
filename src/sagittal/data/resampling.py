"""Resampling images and labels to another grid: one small matrix per axis, applied as float32.

The rules are nnU-Net's (default_resampling.py): images by cubic spline, clamped to their range; labels by linear
interpolation of each label apart, the largest share wins; where voxels are much longer than wide, the long axis takes
the nearest plane and only the planes are interpolated.

Volumes are worked through in pieces: besides input and result there is one array between the two grids. numpy computes,
so that a prediction needs no torch; where a GPU is at hand, `device_resampling` hands its products in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt

from sagittal.plan.base import Triple
from sagittal.volumes.resampling import Order, axis_weights

Where = tuple[slice, slice, slice]
Values = Callable[[Shaped[np.ndarray, "D H W"], Where], Float32[np.ndarray, "D H W"]]
"""From a piece of a channel and its place to what is resampled: normalisation, a piece at a time."""
AxisMatrix = tuple[int, Float32[np.ndarray, "_ _"]]
"""An axis of D, H, W, and what is applied along it, (voxels afterwards, voxels before)."""
Products = Callable[[Float32[np.ndarray, "D H W"], Sequence[AxisMatrix]], Float32[np.ndarray, "d h w"]]
"""Applies matrices one after the other, each along its axis; `multiply_axes` is one."""
PIECE_BYTES = 64 << 20
_BLOCK_ROWS = 64
"""Output voxels per product: few enough that their splines leave most of a long axis out."""
_FLOAT_BYTES = 4
_BORDER_BYTES = 16
"""How much more memory a voxel at a border of labels takes than one of an image."""


def separate_axis(
    spacing_mm: Sequence[float], new_spacing_mm: Sequence[float], anisotropy_threshold: float
) -> int | None:
    """Return the axis (of D, H, W) that is resampled apart from the plane, or None.

    It is the one coarsest axis of the old spacing, or else of the new one, where largest / smallest spacing exceeds
    the threshold. Two equally coarse axes are not kept apart.
    """
    for spacing in (spacing_mm, new_spacing_mm):
        if max(spacing) / min(spacing) > anisotropy_threshold:
            coarsest = [axis for axis, length in enumerate(spacing) if length == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_image(
    image: Float32[np.ndarray, "C D H W"], shape: Triple, *, apart: int | None = None
) -> Float32[np.ndarray, "C d h w"]:
    """Return the image on a grid of `shape` over the same space, by cubic spline, clamped to its range.

    Args:
        image: (C, D, H, W); each channel is clamped to its own range, with `apart` each plane to its own.
        shape: d, h, w of the result.
        apart: axis of D, H, W that takes the nearest plane instead; see `separate_axis`.
    """
    if image.shape[1:] == shape:
        return image
    out = np.empty((image.shape[0], *shape), np.float32)
    for channel, resampled in zip(image, out, strict=True):
        resample_channel(channel, resampled, as_float32, apart=apart)
    return out


def as_float32(piece: Shaped[np.ndarray, "D H W"], where: Where) -> Float32[np.ndarray, "D H W"]:
    """Return the piece as it is, in C order."""
    return np.ascontiguousarray(piece, np.float32)


def resample_channel(
    channel: Shaped[np.ndarray, "D H W"],
    out: Float[np.ndarray, "d h w"],
    values: Values,
    *,
    apart: int | None = None,
    products: Products | None = None,
) -> None:
    """Resample one channel into `out`, by cubic spline, clamped to its range.

    Args:
        channel: (D, H, W) of any dtype and memory order; it is not changed.
        out: where the result goes, float32 or float16; its shape is the new grid's.
        values: applied to each piece of the channel, once, before it is resampled.
        apart: axis that takes the nearest plane instead; see `separate_axis`.
        products: what computes; `multiply_axes` where it is None.
    """
    products = multiply_axes if products is None else products
    if channel.shape == out.shape:
        for where in pieces(channel.shape, 0):
            out[where] = values(channel[where], where)
    elif apart is not None:
        _resample_planes(channel, out, values, apart, products)
    elif out.shape[0] * channel.shape[1] * channel.shape[2] <= channel.shape[0] * out.shape[1] * out.shape[2]:
        _resample_in_two(channel, out, values, (0,), products)
    else:
        _resample_in_two(channel, out, values, (1, 2), products)


def multiply_axes(values: Float32[np.ndarray, "D H W"], matrices: Sequence[AxisMatrix]) -> Float32[np.ndarray, "d h w"]:
    """Return `values` with each matrix applied along its axis, one after the other, on the CPU.

    Args:
        values: (D, H, W); it is returned itself where there is no matrix.
        matrices: those of a spline use few columns per row; what a block of rows does not use is left out.
    """
    for axis, matrix in matrices:
        values = _multiply(values, matrix, axis)
    return values


def _resample_in_two(
    channel: Shaped[np.ndarray, "D H W"],
    out: Float[np.ndarray, "d h w"],
    values: Values,
    first: tuple[int, ...],
    products: Products,
) -> None:
    """Resample the axes `first` (D, or H and W) piece by piece, then the others."""
    second = tuple(axis for axis in range(3) if axis not in first)
    between = np.empty([(out if axis in first else channel).shape[axis] for axis in range(3)], np.float32)
    low, high = np.inf, -np.inf
    for where in pieces(channel.shape, second[0]):
        piece = values(channel[where], where)
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
        # `where` cuts an axis that this product leaves as it is, so it is also the piece's place in the result.
        between[where] = products(piece, _matrices(piece.shape, out.shape, first))
    for where in pieces(between.shape, first[0]):
        piece = np.ascontiguousarray(between[where])
        np.clip(products(piece, _matrices(piece.shape, out.shape, second)), low, high, out=out[where])


def _resample_planes(
    channel: Shaped[np.ndarray, "D H W"],
    out: Float[np.ndarray, "d h w"],
    values: Values,
    apart: int,
    products: Products,
) -> None:
    """Resample the planes across `apart`, each clamped to its own range, and repeat or skip them along it."""
    plane = tuple(axis for axis in range(3) if axis != apart)
    source = nearest(channel.shape[apart], out.shape[apart])
    for where in pieces(channel.shape, apart):
        wanted = np.flatnonzero((source >= where[apart].start) & (source < where[apart].stop))
        if not wanted.size:
            continue
        piece = values(channel[where], where)
        low, high = piece.min(axis=plane, keepdims=True), piece.max(axis=plane, keepdims=True)
        resampled = np.clip(products(piece, _matrices(piece.shape, out.shape, plane)), low, high)
        there: list[slice] = [slice(None)] * 3
        there[apart] = slice(int(wanted[0]), int(wanted[-1]) + 1)
        out[tuple(there)] = resampled.take(source[wanted] - where[apart].start, axis=apart)


def resample_labels(
    labels: UInt[np.ndarray, "D H W"], shape: Triple, *, apart: int | None = None
) -> UInt[np.ndarray, "d h w"]:
    """Return the label indices on a grid of `shape` over the same space.

    Each index, background too, is interpolated linearly by itself; a voxel gets the one with the largest share. Among
    equal shares the nearest voxel's index wins if it is one of them, else the smallest (batchgenerators 0.25.5's
    resize_segmentation, which nnU-Net 2.8 calls). `apart` as for `resample_image`. Where all eight neighbours of a
    voxel agree they decide; only the others, at the borders of labels, are computed, so neither time nor memory grows
    with the number of labels.
    """
    if labels.shape == shape:
        return labels
    taps = [_taps(n, m, apart == axis) for axis, (n, m) in enumerate(zip(labels.shape, shape, strict=True))]
    out = np.empty(shape, labels.dtype)
    for where in pieces(shape, 0, PIECE_BYTES // _BORDER_BYTES):
        rows = where[0]
        lower, upper, share, closest = (tap[rows] for tap in taps[0])
        start, stop = int(lower.min()), int(upper.max()) + 1
        local = _Taps(lower - start, upper - start, share, closest - start)
        out[rows] = _labels_of_slab(labels[start:stop], (local, taps[1], taps[2]))
    return out


class _Taps(NamedTuple):
    """Of each output plane along an axis: its two neighbours, the share of the upper one, and the nearest plane."""

    lower: np.ndarray
    upper: np.ndarray
    share: np.ndarray
    closest: np.ndarray


def _labels_of_slab(labels: UInt[np.ndarray, "D H W"], taps: Sequence[_Taps]) -> UInt[np.ndarray, "d h w"]:
    least = most = labels
    for axis in (2, 1, 0):
        lower, upper = taps[axis].lower, taps[axis].upper
        one, other = least.take(lower, axis), least.take(upper, axis)
        if least is most:
            least, most = np.minimum(one, other), np.maximum(one, other)
        else:
            least, most = np.minimum(one, other), np.maximum(most.take(lower, axis), most.take(upper, axis))
    border = np.nonzero(least != most)
    if border[0].size:
        least[border] = _largest_share(labels, border, taps)
    return least


def _largest_share(
    labels: UInt[np.ndarray, "D H W"], places: tuple[Int64[np.ndarray, " n"], ...], taps: Sequence[_Taps]
) -> UInt[np.ndarray, " n"]:
    """Return for each of the output voxels `places` the index with the largest share among its eight neighbours."""
    count = places[0].size
    seen = np.empty((8, count), labels.dtype)
    weights = np.empty((8, count))
    for corner in range(8):
        index, weight = [], np.ones(count)
        for axis, (lower, upper, share, _) in enumerate(taps):
            is_upper = corner >> axis & 1
            index.append((upper if is_upper else lower)[places[axis]])
            weight *= share[places[axis]] if is_upper else 1 - share[places[axis]]
        seen[corner], weights[corner] = labels[tuple(index)], weight
    totals = np.stack([np.where(seen == mine, weights, 0.0).sum(axis=0) for mine in seen])
    # Equal shares differ by 1e-16 when they are summed in another order.
    tied = totals >= totals.max(axis=0) - 1e-12
    smallest = np.where(tied, seen, np.iinfo(labels.dtype).max).min(axis=0)
    closest = labels[tuple(tap.closest[there] for tap, there in zip(taps, places, strict=True))]
    return np.asarray(np.where((tied & (seen == closest)).any(axis=0), closest, smallest))


def nearest(n_in: int, n_out: int) -> Int64[np.ndarray, " n"]:
    """Return which of `n_in` planes each of `n_out` takes by spline of order 0."""
    return np.asarray(axis_weights(n_in, n_out, 0).argmax(axis=1))


def _taps(n_in: int, n_out: int, only_nearest: bool) -> _Taps:
    """Return the neighbours of each output plane; beyond the ends the last plane goes on."""
    closest = nearest(n_in, n_out)
    if only_nearest:
        return _Taps(closest, closest, np.zeros(n_out), closest)
    centre = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    lower = np.floor(centre).astype(np.int64)
    return _Taps(lower, np.minimum(lower + 1, n_in - 1), centre - lower, closest)


def pieces(shape: Sequence[int], axis: int, size_bytes: int = PIECE_BYTES) -> Iterator[Where]:
    """Yield the places that cut a float32 volume along `axis` into pieces of at most `size_bytes`, or a plane."""
    plane = _FLOAT_BYTES * int(np.prod(shape)) // shape[axis]
    step = max(1, size_bytes // plane)
    for start in range(0, shape[axis], step):
        where = [slice(None)] * 3
        where[axis] = slice(start, min(start + step, shape[axis]))
        yield where[0], where[1], where[2]


@lru_cache(maxsize=32)
def _axis_matrix(n_in: int, n_out: int, order: Order) -> Float32[np.ndarray, "n_out n_in"]:
    weights = axis_weights(n_in, n_out, order)
    # A spline's weights decay by a factor of 3.7 per voxel: the denormal ones slow the product tenfold, and none of
    # those dropped here reaches the last digit of float32.
    matrix = np.where(np.abs(weights) > 1e-9, weights, 0.0).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def _matrices(old: Sequence[int], new: Sequence[int], axes: Sequence[int]) -> list[AxisMatrix]:
    """Return what takes those of `axes` whose lengths differ from `old` to `new`, by cubic spline."""
    # The axis that shrinks most goes first: the later products are smaller.
    order = sorted(axes, key=lambda axis: new[axis] / old[axis])
    return [(axis, _axis_matrix(old[axis], new[axis], 3)) for axis in order if old[axis] != new[axis]]


def _multiply(
    values: Float32[np.ndarray, "D H W"], matrix: Float32[np.ndarray, "n_out n_in"], axis: int
) -> Float32[np.ndarray, "d h w"]:
    """Return (D, H, W) `values` with `matrix` applied along `axis`."""
    shape = list(values.shape)
    shape[axis] = len(matrix)
    out = np.empty(shape, np.float32)
    for start in range(0, len(matrix), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        used = np.flatnonzero(matrix[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        block = matrix[rows, columns]
        if axis == 2:
            flat, target = values.reshape(-1, values.shape[2]), out.reshape(-1, shape[2])
            np.matmul(flat[:, columns], block.T, out=target[:, rows])
        elif axis == 1:
            np.matmul(block, values[:, columns], out=out[:, rows])
        else:
            flat, target = values.reshape(len(values), -1), out.reshape(shape[0], -1)
            np.matmul(block, flat[columns], out=target[rows])
    return out
