"""Rotation, scaling and mirroring of a training patch as ONE affine map, so that voxels are interpolated at most once.

A patch is cut from a *box*: the region of the case that the rotated and scaled patch covers, with the same centre.
The draw comes first and tells the size of the box (`box_size`), so a sample that is not turned reads its patch and no
voxel more, and its voxels come out exact: a crop and flips, no interpolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor
from torch.nn import functional

from sagittal.data.draws import happens, uniform
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple, TripleMm

IN_PLANE_RATIO = 3
"""A patch longer than this many times its shortest axis is turned and scaled in the plane only (nnU-Net)."""

_ROUNDING_VOX = 1e-6


@dataclass(frozen=True, slots=True)
class SpatialDraw:
    """How one patch is turned, scaled and mirrored; all in axis order D, H, W."""

    rotation_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Angle about each axis."""
    extent_factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """How much more of the case the patch covers along each of its axes; below 1 enlarges what is seen."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_exact(self) -> bool:
        """Whether voxels are only moved, never interpolated."""
        return not any(self.rotation_rad) and self.extent_factor == (1.0, 1.0, 1.0)


def through_plane_axis(patch_size: Triple) -> int | None:
    """Return the axis of a patch that is far shorter than the others, which nothing is rotated into, else None."""
    shortest = min(range(3), key=lambda axis: patch_size[axis])
    return shortest if max(patch_size) > IN_PLANE_RATIO * patch_size[shortest] else None


def draw_spatial(generator: torch.Generator, config: Augmentation, patch_size: Triple) -> SpatialDraw:
    """Draw rotation, scale and mirroring with the probabilities and ranges of `config` (nnU-Net's rules)."""
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
    )


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
    reach = np.abs(source_matrix(draw, spacing_mm)) @ half
    d, h, w = (size + 2 * math.ceil(reach[axis] - half[axis] - _ROUNDING_VOX) for axis, size in enumerate(patch_size))
    return max(d, 1), max(h, 1), max(w, 1)


def cut_patch(
    image: Float[Tensor, "C d h w"],
    labels: Num[Tensor, "d h w"],
    draw: SpatialDraw,
    patch_size: Triple,
    spacing_mm: TripleMm,
) -> tuple[Float[Tensor, "C D H W"], Num[Tensor, "D H W"]]:
    """Cut the drawn patch out of a box around its centre: image trilinear, labels nearest; new tensors, inputs kept.

    The box may be larger than `box_size`; what lies beyond it counts as 0 in the image and background in the labels.
    """
    if draw.is_exact:
        return _cropped(image, draw, patch_size), _cropped(labels, draw, patch_size)
    box = image.shape[1:]
    matrix = source_matrix(draw, spacing_mm) * np.asarray(patch_size)[np.newaxis, :] / np.asarray(box)[:, np.newaxis]
    # grid_sample counts axes from fast to slow, and both its cubes run from -1 to 1.
    theta = torch.zeros(1, 3, 4, dtype=torch.float32)
    theta[0, :, :3] = torch.from_numpy(matrix[::-1, ::-1].copy())
    grid = functional.affine_grid(theta.to(image.device), [1, 1, *patch_size], align_corners=False)
    sampled = functional.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    nearest = functional.grid_sample(
        labels[None, None].to(torch.float32), grid, mode="nearest", padding_mode="zeros", align_corners=False
    )
    return sampled[0], nearest[0, 0].to(labels.dtype)


def _cropped(array: Tensor, draw: SpatialDraw, patch_size: Triple) -> Tensor:
    box = array.shape[-3:]
    assert all(have >= want for have, want in zip(box, patch_size, strict=True)), f"a box of {box} for {patch_size}"
    for axis, (have, want) in enumerate(zip(box, patch_size, strict=True)):
        array = array.narrow(axis - 3, (have - want) // 2, want)
    axes = [axis - 3 for axis in range(3) if draw.mirrored[axis]]
    return array.flip(axes) if axes else array.clone(memory_format=torch.contiguous_format)
