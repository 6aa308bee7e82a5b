"""Structures so thin that resampling to the planned spacing may erase them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from sagittal.data.doctor.target import ANISOTROPY_THRESHOLD
from sagittal.data.resampling import separate_axis
from sagittal.plan.base import Triple, TripleMm
from sagittal.volumes.crop import Box
from sagittal.volumes.resampling import Order, axis_weights, new_shape

_TOLERANCE = 1e-3
"""Spacings that differ by less are the same spacing, written by two tools."""
MAX_TRACED = 1000
"""Thin structures per label and case that are followed through the resampling; noise has more of them."""
_TOUCHING = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class ThinStructures:
    """What the planned spacing would do to one label of one case.

    Attributes:
        structures: connected pieces (26 neighbours) of the label.
        thin: those whose extent along some axis is below one planned voxel.
        erased: thin ones of which no planned voxel would be left; at most `MAX_TRACED` were tried.
        thinnest_mm: extent of the thinnest piece, measured in planned voxels.
        planned_mm: the planned voxel along that axis.
    """

    structures: int
    thin: int
    erased: int
    thinnest_mm: float
    planned_mm: float


def may_erase(spacing_mm: TripleMm, target_mm: TripleMm) -> bool:
    """Whether any axis gets coarser: if none does, no structure is thinner than a planned voxel."""
    return any(new > old * (1 + _TOLERANCE) for old, new in zip(spacing_mm, target_mm, strict=True))


def thin_structures(
    mask: Bool[np.ndarray, "d h w"], box: Box, shape: Triple, spacing_mm: TripleMm, target_mm: TripleMm
) -> ThinStructures | None:
    """Return what the spacing `target_mm` would do to the pieces of a label, or None where none is thin.

    A piece is erased where no voxel of the new grid has half of its weight in it: labels are interpolated linearly, but
    take the nearest plane along an axis with much longer voxels (nnU-Net's rule). Where a piece touches other labels
    this is a close estimate, else exact.

    Args:
        mask: the label within `box`.
        box: place of the mask in the label map.
        shape: of the label map.
        spacing_mm, target_mm: old and new, along the label map's own axes.
    """
    pieces, count = ndimage.label(mask, structure=_TOUCHING)
    places = ndimage.find_objects(pieces)
    extents = np.array([[where.stop - where.start for where in place] for place in places], np.float64)
    relative = extents * np.array(spacing_mm) / np.array(target_mm)
    thin = np.flatnonzero(relative.min(axis=1) < 1 - _TOLERANCE)
    if not thin.size:
        return None
    grid = new_shape(shape, spacing_mm, target_mm)
    apart = separate_axis(spacing_mm, target_mm, ANISOTROPY_THRESHOLD)
    erased = 0
    for number in thin[:MAX_TRACED]:
        piece = pieces[places[number]] == number + 1
        start = tuple(where.start + first for where, first in zip(places[number], box.start, strict=True))
        erased += not _survives(piece, start, shape, grid, apart)
    worst, axis = np.unravel_index(relative.argmin(), relative.shape)
    return ThinStructures(
        structures=int(count),
        thin=int(thin.size),
        erased=erased,
        thinnest_mm=float(extents[worst, axis] * spacing_mm[axis]),
        planned_mm=float(target_mm[axis]),
    )


def _survives(
    piece: Integer[np.ndarray, "d h w"] | Bool[np.ndarray, "d h w"],
    start: tuple[int, ...],
    shape: Triple,
    grid: Triple,
    apart: int | None,
) -> bool:
    share = piece.astype(np.float64)
    for axis in range(3):
        order: Order = 0 if axis == apart else 1
        weights = axis_weights(shape[axis], grid[axis], order)[:, start[axis] : start[axis] + piece.shape[axis]]
        reached = np.flatnonzero(weights.any(axis=1))
        if not reached.size:
            return False
        share = np.moveaxis(np.tensordot(weights[reached[0] : reached[-1] + 1], share, (1, axis)), 0, axis)
    return bool(share.max() >= 0.5 - 1e-9)
