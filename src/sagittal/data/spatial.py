"""How a training patch is rotated, scaled, bent and mirrored, all in one map, and how much of the case that needs.

A patch is cut (data/cutting.py) from a *box*: the region of the case that the turned patch covers, with the same
centre. The draw comes first and tells the size of the box (`box_size`), so a sample that is not turned reads its patch
and no voxel more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float64

from sagittal.data.draws import happens, new_seed, uniform
from sagittal.data.elastic import Elastic
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple, TripleMm

IN_PLANE_RATIO = 3
"""A patch longer than this many times its shortest axis is turned and scaled in the plane only (nnU-Net)."""

_ROUNDING_VOX = 1e-6


@dataclass(frozen=True, slots=True)
class SpatialDraw:
    """How one patch is turned, scaled, bent and mirrored; all in axis order D, H, W."""

    rotation_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Angle about each axis."""
    extent_factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """How much more of the case the patch covers along each of its axes; below 1 enlarges what is seen."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    elastic: Elastic | None = None

    @property
    def is_exact(self) -> bool:
        """Whether voxels are only moved, never interpolated."""
        return not any(self.rotation_rad) and self.extent_factor == (1.0, 1.0, 1.0) and self.elastic is None

    @property
    def mirrored_axes(self) -> tuple[int, ...]:
        """The mirrored ones of the axes 0, 1, 2."""
        return tuple(axis for axis in range(3) if self.mirrored[axis])


def through_plane_axis(patch_size: Triple) -> int | None:
    """Return the axis of a patch that is far shorter than the others, which nothing is rotated into, else None."""
    shortest = min(range(3), key=lambda axis: patch_size[axis])
    return shortest if max(patch_size) > IN_PLANE_RATIO * patch_size[shortest] else None


def draw_spatial(generator: torch.Generator, config: Augmentation, patch_size: Triple) -> SpatialDraw:
    """Draw rotation, scale, mirroring and bending as `config` says (nnU-Net's rules)."""
    thin = through_plane_axis(patch_size)
    rotation, factors, mirrored = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [False, False, False]
    if happens(generator, config.rotation_probability):
        limit = math.radians(config.rotation_degrees)
        for axis in (0, 1, 2) if thin is None else (thin,):
            rotation[axis] = uniform(generator, -limit, limit)
    if happens(generator, config.scaling_probability):
        factor = uniform(generator, *config.scaling_range)
        factors = [1.0 if axis == thin else factor for axis in range(3)]
    for axis in config.mirror_axes:
        mirrored[axis] = happens(generator, 0.5)
    return SpatialDraw(
        rotation_rad=cast(tuple[float, float, float], tuple(rotation)),
        extent_factor=cast(tuple[float, float, float], tuple(factors)),
        mirrored=cast(tuple[bool, bool, bool], tuple(mirrored)),
        elastic=_draw_elastic(generator, config, patch_size),
    )


def _draw_elastic(generator: torch.Generator, config: Augmentation, patch_size: Triple) -> Elastic | None:
    # Nothing is drawn where it is off, so that switching it on later leaves other plans' samples as they were.
    if not config.elastic_probability or not happens(generator, config.elastic_probability):
        return None
    thin = through_plane_axis(patch_size)
    sigma = uniform(generator, *config.elastic_sigma)
    shares = [uniform(generator, *config.elastic_magnitude) for _ in range(3)]
    d, h, w = (0.0 if axis == thin else share * patch_size[axis] for axis, share in enumerate(shares))
    return Elastic(sigma=sigma, reach_vox=(d, h, w), seed=new_seed(generator))


def source_matrix(draw: SpatialDraw, spacing_mm: TripleMm) -> Float64[np.ndarray, "3 3"]:
    """Return the matrix from voxels of the patch to voxels of its box, both counted from their centres.

    It turns in millimetres: an organ stays rigid where spacings differ, which a rotation of voxel indices would shear.
    """
    matrix = np.eye(3)
    for axis, angle in enumerate(draw.rotation_rad):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    signs = np.where(draw.mirrored, -1.0, 1.0)
    scaled = np.asarray(draw.extent_factor) * spacing * signs
    return np.asarray(matrix * scaled[np.newaxis, :] / spacing[:, np.newaxis], dtype=np.float64)


def box_size(draw: SpatialDraw, patch_size: Triple, spacing_mm: TripleMm) -> Triple:
    """Return the size of the box that holds every voxel the drawn patch needs, odd or even as the patch is.

    With equal parity the centres of box and patch lie on the same voxel lattice, so an unturned patch is a plain crop.
    """
    if draw.is_exact:
        return patch_size
    half = (np.asarray(patch_size, dtype=np.float64) - 1) / 2
    moved = np.zeros(3) if draw.elastic is None else np.asarray(draw.elastic.reach_vox)
    reach = np.abs(source_matrix(draw, spacing_mm)) @ (half + moved)
    d, h, w = (size + 2 * math.ceil(reach[axis] - half[axis] - _ROUNDING_VOX) for axis, size in enumerate(patch_size))
    return max(d, 1), max(h, 1), max(w, 1)
