"""The voxel size that planning will choose, known before any voxel is read: what is smaller than it may be erased."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sagittal.plan.base import Triple, TripleMm

ANISOTROPY_THRESHOLD = 3.0
_STEP_ABOVE_MM = 1e-5


def planned_spacing(spacings_mm: Sequence[TripleMm], shapes_vox: Sequence[Triple]) -> TripleMm:
    """Return the spacing that nnU-Net's default planner would choose: the rule of `planning.spacing.target_spacing`.

    That rule works on a fingerprint, which needs every voxel; this one works on headers. A test holds the two together.

    Args:
        spacings_mm: of each case, along D, H, W in RAS order.
        shapes_vox: of each case, in the same order.
    """
    spacings = np.array(spacings_mm, np.float64)
    median, size = np.median(spacings, axis=0), np.median(np.array(shapes_vox), axis=0)
    coarsest = int(median.argmax())
    next_mm, next_size = float(np.delete(median, coarsest).max()), float(np.delete(size, coarsest).min())
    is_long = median[coarsest] > ANISOTROPY_THRESHOLD * next_mm
    if is_long and size[coarsest] * ANISOTROPY_THRESHOLD < next_size:
        tenth = float(np.percentile(spacings[:, coarsest], 10))
        median[coarsest] = tenth if tenth >= next_mm else next_mm + _STEP_ABOVE_MM
    d, h, w = (float(length) for length in median)
    return d, h, w
