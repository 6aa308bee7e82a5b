"""The matrix products of resampling on a GPU; on the CPU numpy's are as fast, and need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32

from sagittal.data.resampling import AxisMatrix, Products, multiply_axes


def products_on(device: torch.device | str) -> Products:
    """Return what applies the matrices of resampling on `device`; pieces are copied there and back."""
    where = torch.device(device)
    return multiply_axes if where.type == "cpu" else partial(multiply_axes_on, where)


def multiply_axes_on(
    device: torch.device, values: Float32[np.ndarray, "D H W"], matrices: Sequence[AxisMatrix]
) -> Float32[np.ndarray, "d h w"]:
    """Return `values` with each matrix applied along its axis, one after the other, computed on `device` in float32."""
    piece = torch.from_numpy(values).to(device)
    for axis, weights in matrices:
        # A copy, since torch warns of arrays that can't be written to; the matrices are cached and shared.
        matrix = torch.from_numpy(weights.copy()).to(device)
        if axis == 2:
            piece = piece @ matrix.T
        elif axis == 1:
            piece = matrix @ piece
        else:
            piece = (matrix @ piece.reshape(piece.shape[0], -1)).reshape(len(matrix), *piece.shape[1:])
    return piece.cpu().numpy()
