"""Resampling a regular grid as one small matrix per axis.

Spline interpolation between two regular grids is linear and separable: resizing the identity along one axis gives that
axis's weights, and a volume is resampled by one matrix product per axis. This equals scikit-image's
`resize(order=3, mode="edge", anti_aliasing=False, clip=False)`, because that calls the same function of scipy on the
whole volume; nnU-Net uses it with `clip`, which clamps to the input's range afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float64
from scipy import ndimage

from sagittal.plan.base import Triple

Order = Literal[0, 1, 3]


@lru_cache(maxsize=64)
def axis_weights(n_in: int, n_out: int, order: Order) -> Float64[np.ndarray, "n_out n_in"]:
    """Return the matrix that resamples an axis of `n_in` voxels to `n_out` by spline of order 0, 1 or 3.

    Both grids cover the same length: voxel borders agree, not voxel centres. Beyond the border the last voxel goes on.
    Every row sums to 1. The matrix is cached and can't be written to.
    """
    assert n_in >= 1 and n_out >= 1, f"axes of {n_in} and {n_out} voxels"
    weights = np.empty((n_out, n_in))
    unit = np.zeros(n_in)
    for column in range(n_in):
        unit[column] = 1.0
        weights[:, column] = ndimage.zoom(unit, n_out / n_in, order=order, mode="nearest", grid_mode=True)
        unit[column] = 0.0
    weights.setflags(write=False)
    return weights


def new_shape(shape: Sequence[int], spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> Triple:
    """Return the D, H, W of a grid of `new_spacing_mm` over the same volume: nnU-Net's rounding, at least one voxel.

    Source: nnU-Net's compute_new_shape (default_resampling.py), round(spacing / new spacing * size), halves to even.
    """
    sizes = [
        max(1, round(float(old) / float(new) * size))
        for size, old, new in zip(shape, spacing_mm, new_spacing_mm, strict=True)
    ]
    return sizes[0], sizes[1], sizes[2]
