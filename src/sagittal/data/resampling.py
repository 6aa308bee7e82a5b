"""Resampling images and labels to another grid: one small matrix per axis, applied in torch as float32.

The rules are nnU-Net's (default_resampling.py): images by cubic spline, clamped to their range; labels by linear
interpolation of each label apart, the largest share wins; where voxels are much longer than wide, the long axis takes
the nearest plane and only the planes are interpolated.

Volumes are worked through in pieces: besides input and result there is one array between the two grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt
from torch import Tensor

from sagittal.plan.base import Triple
from sagittal.volumes.resampling import Order, axis_weights

Where = tuple[slice, slice, slice]
Values = Callable[[Shaped[np.ndarray, "D H W"], Where], Float32[np.ndarray, "D H W"]]
"""From a piece of a channel and its place to what is resampled: normalisation, a piece at a time."""
PIECE_BYTES = 64 << 20
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
    device: torch.device | str = "cpu",
) -> None:
    """Resample one channel into `out`, by cubic spline, clamped to its range.

    Args:
        channel: (D, H, W) of any dtype and memory order; it is not changed.
        out: where the result goes, float32 or float16; its shape is the new grid's.
        values: applied to each piece of the channel, once, before it is resampled.
        apart: axis that takes the nearest plane instead; see `separate_axis`.
        device: where the matrix products run.
    """
    if channel.shape == out.shape:
        for where in pieces(channel.shape, 0):
            out[where] = values(channel[where], where)
    elif apart is not None:
        _resample_planes(channel, out, values, apart, device)
    elif out.shape[0] * channel.shape[1] * channel.shape[2] <= channel.shape[0] * out.shape[1] * out.shape[2]:
        _resample_in_two(channel, out, values, (0,), device)
    else:
        _resample_in_two(channel, out, values, (1, 2), device)


def _resample_in_two(
    channel: Shaped[np.ndarray, "D H W"],
    out: Float[np.ndarray, "d h w"],
    values: Values,
    first: tuple[int, ...],
    device: torch.device | str,
) -> None:
    """Resample the axes `first` (D, or H and W) piece by piece, then the others."""
    second = tuple(axis for axis in range(3) if axis not in first)
    between = torch.empty([(out if axis in first else channel).shape[axis] for axis in range(3)])
    result = torch.from_numpy(out)
    low, high = np.inf, -np.inf
    for where in pieces(channel.shape, second[0]):
        piece = torch.from_numpy(values(channel[where], where)).to(device)
        least, most = torch.aminmax(piece)
        low, high = min(low, float(least)), max(high, float(most))
        # `where` cuts an axis that this product leaves as it is, so it is also the piece's place in the result.
        between[where].copy_(_resample_axes(piece, out.shape, first))
    for where in pieces(between.shape, first[0]):
        piece = between[where].to(device).contiguous()
        result[where].copy_(_resample_axes(piece, out.shape, second).clamp_(low, high))


def _resample_planes(
    channel: Shaped[np.ndarray, "D H W"],
    out: Float[np.ndarray, "d h w"],
    values: Values,
    apart: int,
    device: torch.device | str,
) -> None:
    """Resample the planes across `apart`, each clamped to its own range, and repeat or skip them along it."""
    plane = tuple(axis for axis in range(3) if axis != apart)
    source = nearest(channel.shape[apart], out.shape[apart])
    for where in pieces(channel.shape, apart):
        wanted = np.flatnonzero((source >= where[apart].start) & (source < where[apart].stop))
        if not wanted.size:
            continue
        piece = torch.from_numpy(values(channel[where], where)).to(device)
        low, high = piece.amin(plane, keepdim=True), piece.amax(plane, keepdim=True)
        resampled = _resample_axes(piece, out.shape, plane).clamp_(low, high).cpu().numpy()
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
def _axis_matrix(n_in: int, n_out: int, order: Order) -> Tensor:
    weights = axis_weights(n_in, n_out, order)
    # A spline's weights decay by a factor of 3.7 per voxel: the denormal ones slow the product tenfold, and none of
    # those dropped here reaches the last digit of float32.
    return torch.from_numpy(np.where(np.abs(weights) > 1e-9, weights, 0.0).astype(np.float32))


def _resample_axes(values: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Return (D, H, W) `values` with `axes` resampled to their lengths in `shape` by cubic spline."""
    # The axis that shrinks most goes first: the later products are smaller.
    for axis in sorted(axes, key=lambda axis: shape[axis] / values.shape[axis]):
        if values.shape[axis] != shape[axis]:
            values = _multiply(values, _axis_matrix(values.shape[axis], shape[axis], 3).to(values.device), axis)
    return values


def _multiply(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Return (D, H, W) `values` with `matrix` (n_out, n_in) applied along `axis`."""
    if axis == 2:
        return values @ matrix.T
    if axis == 1:
        return matrix @ values
    return (matrix @ values.reshape(values.shape[0], -1)).reshape(matrix.shape[0], *values.shape[1:])
