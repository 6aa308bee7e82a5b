"""The spacing that cases are resampled to, and the shape of the median case there (nnU-Net's default planner)."""

from __future__ import annotations

import numpy as np

from sagittal.plan import Fingerprint
from sagittal.plan.base import Triple, TripleMm
from sagittal.volumes.resampling import new_shape

_STEP_ABOVE_MM = 1e-5


def target_spacing(fingerprint: Fingerprint, anisotropy_threshold: float) -> tuple[TripleMm, str]:
    """Return the spacing in mm, D, H, W, and why.

    The median of each axis. Where the coarsest axis is more than `anisotropy_threshold` times coarser than the next and
    has that much fewer voxels than the others, it takes its 10th percentile instead, but stays coarser than the others:
    few thick slices would otherwise blur those cases that have thin ones.
    """
    spacings = np.array(fingerprint.spacings_mm, dtype=np.float64)
    median = np.median(spacings, axis=0)
    size = np.median(np.array(fingerprint.shapes_vox), axis=0)
    coarsest = int(median.argmax())
    next_mm = float(np.delete(median, coarsest).max())
    next_size = float(np.delete(size, coarsest).min())
    ratio = float(median[coarsest]) / next_mm
    cases = f"{fingerprint.num_cases} case" + ("s" if fingerprint.num_cases != 1 else "")
    reason = f"median spacing of {cases}, {_shown(median)} mm (D, H, W)"
    if ratio <= anisotropy_threshold:
        return _rounded(median), f"{reason}; not anisotropic ({ratio:.3g} <= {anisotropy_threshold:g})"
    axis = "DHW"[coarsest]
    if size[coarsest] * anisotropy_threshold >= next_size:
        reason += (
            f"; axis {axis} is {ratio:.3g} times coarser, but its {size[coarsest]:g} voxels are not "
            f"{anisotropy_threshold:g} times fewer than the {next_size:g} of the others"
        )
        return _rounded(median), reason
    tenth = float(np.percentile(spacings[:, coarsest], 10))
    median[coarsest] = tenth if tenth >= next_mm else next_mm + _STEP_ABOVE_MM
    reason += (
        f"; axis {axis} is anisotropic ({ratio:.3g} > {anisotropy_threshold:g}), so it takes its 10th percentile, "
        f"{median[coarsest]:.4g} mm"
    )
    return _rounded(median), reason


def median_shape(fingerprint: Fingerprint, spacing_mm: TripleMm) -> Triple:
    """Return the median D, H, W of the cases once they are cropped and resampled to `spacing_mm`."""
    shapes = [
        new_shape(shape, old, spacing_mm)
        for shape, old in zip(fingerprint.shapes_vox, fingerprint.spacings_mm, strict=True)
    ]
    d, h, w = (max(1, round(float(size))) for size in np.median(np.array(shapes), axis=0))
    return d, h, w


def _rounded(spacing_mm: np.ndarray) -> TripleMm:
    # Headers hold float32: 0.7950000166893005 means 0.795, and no voxel moves by a nanometre.
    d, h, w = (round(float(length), 6) for length in spacing_mm)
    return d, h, w


def _shown(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
