"""Boundary IoU: the overlap of the masks' outermost shells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from scipy.ndimage import distance_transform_edt

from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.evaluation.surface import diagonal_mm, surface
from sagittal.plan.base import TripleMm
from sagittal.volumes.crop import bounding_box

WIDTH_OF_DIAGONAL = 0.02


def boundary_iou(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    image_shape: Sequence[int] | None = None,
    *,
    width_mm: float | None = None,
) -> float | None:
    """Return the IoU of the shells of two boolean masks (D, H, W).

    A shell holds the voxels of a mask whose centre is at most `width_mm` away from the centre of a voxel outside of it,
    and its surface voxels at least. Beyond the image is outside.

    Empty masks: one of the two: 0. Both: None.

    Args:
        reference: boolean mask (D, H, W).
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order.
        image_shape: of the image that the masks were cut out of; by itself their own.
        width_mm: of a shell; by itself 2 % of the image's diagonal.

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.

    Source: B. Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021.
    """
    check_masks(reference, prediction)
    spacing = check_spacing(spacing_mm)
    if width_mm is None:
        width_mm = WIDTH_OF_DIAGONAL * diagonal_mm(image_shape or reference.shape, spacing)
    boxes = [box for box in (bounding_box(reference), bounding_box(prediction)) if box is not None]
    if not boxes:
        return None
    if len(boxes) == 1:
        return 0.0
    joint = boxes[0].union(boxes[1]).slices
    shells = [shell(mask[joint], spacing, width_mm) for mask in (reference, prediction)]
    return float(np.count_nonzero(shells[0] & shells[1]) / np.count_nonzero(shells[0] | shells[1]))


def shell(mask: Bool[np.ndarray, "D H W"], spacing_mm: TripleMm, width_mm: float) -> Bool[np.ndarray, "D H W"]:
    """Return the voxels of `mask` within `width_mm` of a voxel outside of it, and its surface voxels."""
    padded = np.pad(mask, 1)
    nearest_mm = distance_transform_edt(padded, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    # A width of 3 mm must hold three voxels of 1 mm on every machine, however the root is rounded.
    outer: Bool[np.ndarray, "D H W"] = mask & (nearest_mm <= width_mm * (1 + 1e-12)) | surface(mask)
    return outer
