"""Distances between the surfaces of two masks, in millimetres.

They cost what their box costs, and most structures fill a small part of a scan: everything works on the joint bounding
box of both masks. Outside of it both are empty, so no value changes.

Both directed sets of distances are measured once; HD, HD95, ASSD and the NSD of voxels are all drawn from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from sagittal.evaluation.distances import nearest_mm
from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.volumes.crop import bounding_box


class SurfaceDistances(NamedTuple):
    """For each surface voxel of one mask the distance in mm to the nearest surface voxel of the other, unordered."""

    from_reference_mm: Float64[np.ndarray, " R"]
    from_prediction_mm: Float64[np.ndarray, " P"]

    @property
    def hd95_mm(self) -> float:
        """The larger of the two directed 95th percentiles."""
        return max(float(np.percentile(directed, 95)) for directed in self)

    @property
    def hd_mm(self) -> float:
        """The greatest distance in either direction."""
        return max(float(directed.max()) for directed in self)

    @property
    def assd_mm(self) -> float:
        """The mean of all distances, both directions pooled."""
        return sum(float(directed.sum()) for directed in self) / sum(directed.size for directed in self)

    def nsd(self, tolerance_mm: float) -> float:
        """Return the share of all surface voxels whose distance is at most `tolerance_mm`."""
        within = sum(int(np.count_nonzero(directed <= tolerance_mm)) for directed in self)
        return within / sum(directed.size for directed in self)


def surface(mask: Bool[np.ndarray, "D H W"]) -> Bool[np.ndarray, "D H W"]:
    """Return the voxels of `mask` that have one of their six neighbours outside; beyond the array is outside."""
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(3):
        for start in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(window)]
    outer: Bool[np.ndarray, "D H W"] = mask & ~inside
    return outer


def surface_distances_mm(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> SurfaceDistances | None:
    """Measure both directed sets of surface distances between two boolean masks (D, H, W).

    Args:
        reference: boolean mask (D, H, W).
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order.

    Returns:
        The distances between voxel centres, or None where either mask is empty (a distance to nothing does not exist).

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.
    """
    check_masks(reference, prediction)
    spacing = check_spacing(spacing_mm)
    reference_box, prediction_box = bounding_box(reference), bounding_box(prediction)
    if reference_box is None or prediction_box is None:
        return None
    joint = reference_box.union(prediction_box).slices
    reference_surface, prediction_surface = surface(reference[joint]), surface(prediction[joint])
    return SurfaceDistances(
        from_reference_mm=nearest_mm(reference_surface, prediction_surface, spacing),
        from_prediction_mm=nearest_mm(prediction_surface, reference_surface, spacing),
    )


def diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Return the length in mm of the diagonal of an image of `shape` (D, H, W): no distance inside it is longer."""
    return math.hypot(*(length * size for length, size in zip(shape, spacing_mm, strict=True)))


def hd95_mm(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> float | None:
    """Return the symmetric 95th-percentile Hausdorff distance of two boolean masks (D, H, W), in mm.

    The larger of the two directed 95th percentiles (linear interpolation) of the distances from the surface voxels of
    one mask to the nearest surface voxel of the other. This is the definition of MONAI's
    `compute_hausdorff_distance(percentile=95)` and of Metrics Reloaded; medpy (and with it nnFormer) pools both sets
    before it takes the percentile, and DeepMind's surface-distance weights surface elements: theirs are other numbers.
    Surface: voxels of the mask with one of their six neighbours outside of it or beyond the image.

    Empty masks: one of the two empty: the diagonal of the image, the worst that the image allows, so that a miss or a
    false alarm can never improve a mean. Both empty: None; a mean counts it apart and leaves it out.

    Args:
        reference: boolean mask (D, H, W).
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order; there is no default.

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.
    """
    distances = surface_distances_mm(reference, prediction, spacing_mm)
    if distances is not None:
        return distances.hd95_mm
    if reference.any() or prediction.any():
        return diagonal_mm(reference.shape, check_spacing(spacing_mm))
    return None
