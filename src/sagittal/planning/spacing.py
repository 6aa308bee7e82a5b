"""The spacing that cases are resampled to, and the shape of the median case there (nnU-Net's default planner)."""

from __future__ import annotations

import numpy as np

from sagittal.plan import Fingerprint
from sagittal.plan.base import Triple, TripleMm
from sagittal.volumes.resampling import new_shape

_STEP_ABOVE_MM = 1e-5
_AXES = "DHW"


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
        return _triple(median), f"{reason}; not anisotropic ({ratio:.3g} <= {anisotropy_threshold:g})"
    axis = _AXES[coarsest]
    if size[coarsest] * anisotropy_threshold >= next_size:
        reason += (
            f"; axis {axis} is {ratio:.3g} times coarser, but its {size[coarsest]:g} voxels are not "
            f"{anisotropy_threshold:g} times fewer than the {next_size:g} of the others"
        )
        return _triple(median), reason
    tenth = float(np.percentile(spacings[:, coarsest], 10))
    median[coarsest] = tenth if tenth >= next_mm else next_mm + _STEP_ABOVE_MM
    reason += (
        f"; axis {axis} is anisotropic ({ratio:.3g} > {anisotropy_threshold:g}), so it takes its 10th percentile, "
        f"{median[coarsest]:.4g} mm"
    )
    return _triple(median), reason


def transposition(spacing_mm: TripleMm) -> tuple[Triple, str]:
    """Return the order in which the network takes the axes D, H, W, the coarsest first, and why (nnU-Net's rule)."""
    coarsest = int(np.argmax(spacing_mm))
    if coarsest == 0:
        return (0, 1, 2), "axis D has the largest spacing, or no axis has a larger one (nnU-Net's rule)"
    first, second = (axis for axis in range(3) if axis != coarsest)
    told = f"axis {_AXES[coarsest]} has the largest spacing, {spacing_mm[coarsest]:.4g} mm, so it comes first (nnU-Net)"
    return (coarsest, first, second), told


def in_network_order(fingerprint: Fingerprint, transpose: Triple) -> Fingerprint:
    """Return the fingerprint with shapes and spacings along the network's axes."""
    first, second, third = transpose
    return fingerprint.replace(
        shapes_vox=tuple((shape[first], shape[second], shape[third]) for shape in fingerprint.shapes_vox),
        spacings_mm=tuple((mm[first], mm[second], mm[third]) for mm in fingerprint.spacings_mm),
    )


def median_shape(fingerprint: Fingerprint, spacing_mm: TripleMm, *, keeps_slices: bool = False) -> Triple:
    """Return the median shape of the cases once they are cropped and resampled; all in the order of `fingerprint`.

    With `keeps_slices` they keep their own spacing along the first axis.
    """
    shapes = [
        new_shape(shape, old, (old[0], *spacing_mm[1:]) if keeps_slices else spacing_mm)
        for shape, old in zip(fingerprint.shapes_vox, fingerprint.spacings_mm, strict=True)
    ]
    d, h, w = (max(1, round(float(size))) for size in np.median(np.array(shapes), axis=0))
    return d, h, w


def _triple(spacing_mm: np.ndarray) -> TripleMm:
    d, h, w = (float(length) for length in spacing_mm)
    return d, h, w


def _shown(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
