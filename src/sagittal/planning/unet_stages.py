"""The stages of a U-Net by nnU-Net's rules, in which MedNeXt's levels follow them too where axes are coarse or short.

Halve every axis that is long enough and whose voxels are not much longer than the shortest ones, until no axis is left;
convolve along an axis only once its voxels are of about the others' length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

Numbers = tuple[int, ...]
"""One number for each axis: three, or two where the network sees slices."""

SMALLEST_EDGE = 4
"""No axis of a feature map becomes shorter by halving."""
SPACING_RATIO = 2.0
"""An axis takes part once its voxels are less than this much longer than the shortest."""


@dataclass(frozen=True)
class Stages:
    """A U-Net's stages from fine to coarse, the last one the bottleneck."""

    strides: tuple[Numbers, ...]
    kernel_sizes: tuple[Numbers, ...]


def unet_stages(spacing_mm: Sequence[float], patch_size: Sequence[int]) -> Stages:
    """Return the stages that nnU-Net gives a U-Net for a patch.

    Where no axis can be halved by the rules, one stage halves them all: a U-Net has at least two.

    Args:
        spacing_mm: of the voxels along each axis.
        patch_size: voxels along each axis.
    """
    spacing, size = list(spacing_mm), list(patch_size)
    dims = range(len(size))
    one, two, three = ((number,) * len(size) for number in (1, 2, 3))
    kernel = one
    strides: list[Numbers] = [one]
    kernels: list[Numbers] = []
    while axes := _to_halve(spacing, size):
        fine = SPACING_RATIO * min(spacing)
        kernel = tuple(3 if edge < fine else old for edge, old in zip(spacing, kernel, strict=True))
        kernels.append(kernel)
        strides.append(tuple(2 if axis in axes else 1 for axis in dims))
        for axis in axes:
            spacing[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    if not kernels:
        return Stages((one, two), (three, three))
    return Stages(tuple(strides), (*kernels, three))


def coarse_axes(spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Return the axes whose voxels are so much longer than the shortest that the first stage leaves them alone."""
    return tuple(axis for axis, edge in enumerate(spacing_mm) if edge >= SPACING_RATIO * min(spacing_mm))


def _to_halve(spacing_mm: list[float], size: list[int]) -> list[int]:
    """Return the axes that the next stage halves; none ends the network."""
    long_enough = [axis for axis, edge in enumerate(size) if edge >= 2 * SMALLEST_EDGE]
    if not long_enough:
        return []
    shortest = min(spacing_mm[axis] for axis in long_enough)
    axes = [axis for axis in long_enough if spacing_mm[axis] < SPACING_RATIO * shortest]
    # A single axis is halved only where something is left of it.
    return [] if len(axes) == 1 and size[axes[0]] < 3 * SMALLEST_EDGE else axes
