"""Smooth random displacements of a patch's voxels, and how they bend its sampling grid.

The field is a cubic B-spline over random numbers on a coarse lattice: white noise blurred by a kernel whose standard
deviation is 1/sqrt(3) of the lattice's spacing, for the price of a few thousand random numbers instead of three of them
and a wide blur for every voxel. It is scaled on the processor, so what must be read is known before it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sagittal.data.draws import seeded
from sagittal.plan.base import Triple

_BETWEEN_KNOTS = 4
"""Places per knot where the field is looked at to find how far it reaches."""

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Elastic:
    """One random field of displacements; all in axis order D, H, W."""

    sigma: float
    """How smooth: standard deviation of the blur, as a share of the patch's size."""
    reach_vox: tuple[float, float, float]
    """How far a voxel moves at most along each axis."""
    seed: int


@dataclass(frozen=True, slots=True)
class Field:
    """A field in pieces: values on the lattice, and how much of each of them every voxel gets, axis by axis."""

    knots: Float64[np.ndarray, "3 k k k"]
    """Displacements in voxels along D, H, W, on the lattice."""
    weights: tuple[Float64[np.ndarray, "D k"], Float64[np.ndarray, "H k"], Float64[np.ndarray, "W k"]]


def field(elastic: Elastic, patch_size: Triple) -> Field:
    """Return the field of a draw; the same seed gives the same field on every device."""
    spacing = math.sqrt(3) * elastic.sigma
    steps = math.ceil(1 / spacing - _TINY)
    count = steps + 3
    generator = seeded(elastic.seed)
    noise = torch.randn((3, count, count, count), generator=generator, dtype=torch.float64).numpy()
    looked_at = _weights(np.linspace(0, 1, steps * _BETWEEN_KNOTS + 1), spacing, count)
    # Not optimised into matrix products: their last bits could depend on the number of threads.
    seen = noise
    for _ in range(3):
        seen = np.einsum("xk,cijk->cxij", looked_at, seen)
    reach = np.asarray(elastic.reach_vox) / np.maximum(np.abs(seen).max(axis=(1, 2, 3)), _TINY)
    d, h, w = (_weights((np.arange(size) + 0.5) / size, spacing, count) for size in patch_size)
    return Field(noise * reach[:, np.newaxis, np.newaxis, np.newaxis], (d, h, w))


def _weights(places: Float64[np.ndarray, " P"], spacing: float, count: int) -> Float64[np.ndarray, "P k"]:
    """Return the cubic B-spline of each knot (the first lies one spacing before 0) at `places` in 0..1."""
    distance = np.abs(places[:, np.newaxis] / spacing - (np.arange(count) - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


def displacements(
    knots: Float[Tensor, "N 3 k k k"],
    weights: tuple[Float[Tensor, "N D k"], Float[Tensor, "N H k"], Float[Tensor, "N W k"]],
    reach_vox: Float[Tensor, "N 3"],
) -> Float[Tensor, "N 3 D H W"]:
    """Return the displacement of every voxel in voxels, clipped to `reach_vox`.

    Sums of whole slices, not matrix products: their bits are the same for any number of threads.
    """
    values = knots
    for axis in range(3):
        shape = [len(knots), 1, 1, 1, 1]
        shape[axis + 2] = -1
        total: Tensor | None = None
        for knot in range(knots.shape[axis + 2]):
            share = weights[axis][:, :, knot].reshape(shape)
            part = values.narrow(axis + 2, knot, 1)
            total = part * share if total is None else total.addcmul_(part, share)
        assert total is not None
        values = total
    # Between the places that were looked at the field can go a little further.
    limit = reach_vox[:, :, None, None, None]
    return torch.minimum(torch.maximum(values, -limit), limit)
