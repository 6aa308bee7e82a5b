"""Two boolean masks of one structure: what every metric takes, checked once, and the small box that holds both.

Metrics cost what their box costs, and most structures fill a small part of a scan: everything that measures works on
the joint bounding box. Outside of it both masks are empty, so no value changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from sagittal.errors import DataError
from sagittal.plan.base import TripleMm

Box = tuple[slice, slice, slice]
"""Half-open start:stop along D, H, W."""


def check_masks(reference: np.ndarray, prediction: np.ndarray) -> None:
    """Refuse anything but two boolean (D, H, W) arrays of one shape.

    A label map given for a mask would count label 2 as twice as present, or as nothing: neither is ever meant.

    Raises:
        DataError: not bool, not three-dimensional, or two shapes.
    """
    for name, mask in (("reference", reference), ("prediction", prediction)):
        if mask.dtype != np.bool_:
            raise DataError(
                f"{name}: dtype {mask.dtype}, but a metric takes a boolean mask of one structure. "
                "Give `labels == value`, or use evaluate_case for label maps.",
                code="mask_dtype",
            )
        if mask.ndim != 3:
            raise DataError(f"{name}: shape {mask.shape}, but a metric takes (D, H, W).", code="mask_shape")
    if reference.shape != prediction.shape:
        raise DataError(
            f"masks differ in shape: reference {reference.shape}, prediction {prediction.shape}. "
            "Bring the prediction onto the reference's grid first.",
            code="grid_mismatch",
        )


def check_spacing(spacing_mm: Sequence[float]) -> TripleMm:
    """Return `spacing_mm` (D, H, W order) as three floats; refuse any other number of them, and what is not positive.

    Raises:
        DataError: not three finite, positive numbers.
    """
    values = [float(value) for value in spacing_mm]
    if len(values) != 3 or not all(np.isfinite(value) and value > 0 for value in values):
        raise DataError(
            f"spacing_mm {tuple(values)}: expected three positive numbers in D, H, W order.", code="spacing"
        )
    return values[0], values[1], values[2]


def bounding_box(mask: Bool[np.ndarray, "D H W"]) -> Box | None:
    """Return the smallest box that holds every True voxel, or None for an empty mask."""
    # One axis at a time, each on what the last one left: the first pass is the only one that reads the whole array.
    box = [slice(0, length) for length in mask.shape]
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        (present,) = np.nonzero(mask[tuple(box)].any(axis=others))
        if present.size == 0:
            return None
        box[axis] = slice(int(present[0]), int(present[-1]) + 1)
    return box[0], box[1], box[2]


def union_box(first: Box | None, second: Box | None) -> Box | None:
    """Return the smallest box that holds both; None stands for an empty one."""
    if first is None or second is None:
        return first if second is None else second
    joint = [slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True)]
    return joint[0], joint[1], joint[2]
