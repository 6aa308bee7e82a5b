"""Two boolean masks of one structure and the size of a voxel: what every metric takes, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sagittal.errors import DataError
from sagittal.plan.base import TripleMm


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
