"""Resampling images and labels to another grid: one small matrix per axis, applied in torch as float32.

The rules are nnU-Net's (default_resampling.py): images by cubic spline, clamped to their range; labels by linear
interpolation of each label apart, written where it reaches one half; where voxels are much longer than wide, the long
axis takes the nearest plane and only the planes are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, UInt

from sagittal.plan.base import Triple
from sagittal.volumes.resampling import Order, axis_weights


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
    plane = [axis for axis in range(3) if axis != apart]
    out = np.empty((image.shape[0], *shape), np.float32)
    for channel, resampled in zip(image, out, strict=True):
        # One channel at a time: the matrix products' copies are of one channel, not of all.
        values = torch.from_numpy(np.ascontiguousarray(channel))
        over = tuple(plane)
        low, high = values.amin(over, keepdim=True), values.amax(over, keepdim=True)
        values = _resample_axes(values, shape, dict.fromkeys(plane, 3)).clamp_(low, high)
        if apart is not None:
            values = _resample_axes(values, shape, {apart: 0})
        resampled[...] = values.numpy()
    return out


def resample_labels(
    labels: UInt[np.ndarray, "D H W"], shape: Triple, *, apart: int | None = None
) -> UInt[np.ndarray, "d h w"]:
    """Return the label indices on a grid of `shape` over the same space.

    Each index above 0 is interpolated linearly by itself and written where it reaches one half, in ascending order;
    elsewhere stays 0. `apart` as for `resample_image`.
    """
    if labels.shape == shape:
        return labels
    weights = [
        _axis_matrix(n, m, 0 if axis == apart else 1)
        for axis, (n, m) in enumerate(zip(labels.shape, shape, strict=True))
    ]
    out = np.zeros(shape, labels.dtype)
    for index in indices_present(labels):
        mask = labels == index
        # A label often fills a small part of the volume: only its box and the voxels that see it are computed.
        sources = [_range(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
        targets = [
            _range((matrix[:, source] != 0).any(dim=1).numpy()) for matrix, source in zip(weights, sources, strict=True)
        ]
        if any(target.start == target.stop for target in targets):
            continue
        share = torch.from_numpy(mask[tuple(sources)].astype(np.float32))
        for axis in range(3):
            share = _multiply(share, weights[axis][targets[axis], sources[axis]], axis)
        out[tuple(targets)][(share >= 0.5).numpy()] = index
    return out


def indices_present(labels: UInt[np.ndarray, "D H W"]) -> tuple[int, ...]:
    """Return the distinct values above 0 in ascending order."""
    found: set[int] = set()
    for plane in labels:
        # Counting needs 8-byte copies: a plane at a time keeps them small.
        found.update(np.flatnonzero(np.bincount(plane.reshape(-1))).tolist())
    return tuple(sorted(found - {0}))


def _axis_matrix(n_in: int, n_out: int, order: Order) -> torch.Tensor:
    weights = axis_weights(n_in, n_out, order)
    # A spline's weights decay by a factor of 3.7 per voxel: the denormal ones slow the product tenfold, and none of
    # those dropped here reaches the last digit of float32.
    return torch.from_numpy(np.where(np.abs(weights) > 1e-9, weights, 0.0).astype(np.float32))


def _resample_axes(values: torch.Tensor, shape: Triple, orders: dict[int, Order]) -> torch.Tensor:
    # The axis that shrinks most goes first: the later products are smaller.
    for axis in sorted(orders, key=lambda axis: shape[axis] / values.shape[axis]):
        if values.shape[axis] != shape[axis]:
            values = _multiply(values, _axis_matrix(values.shape[axis], shape[axis], orders[axis]), axis)
    return values


def _multiply(values: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Return (D, H, W) `values` with `matrix` (n_out, n_in) applied along `axis`."""
    if axis == 2:
        return values @ matrix.T
    if axis == 1:
        return matrix @ values
    return (matrix @ values.reshape(values.shape[0], -1)).reshape(matrix.shape[0], *values.shape[1:])


def _range(used: np.ndarray) -> slice:
    """Return the slice from the first to the last true entry; empty where there is none."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)
