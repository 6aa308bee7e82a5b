"""The normalised surface Dice: one metric per tolerance, in the two definitions that go by this name.

On the same two masks they give 0.42 and 0.57: whoever compares must name which.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from sagittal.evaluation.metrics import FALSE_ALARM_IS_ZERO, MISS_IS_ZERO, SURFACE_VOXEL, UNDEFINED
from sagittal.evaluation.pair import MaskPair, Metric


def nsd_metric(tolerance_mm: float, *, surfel: bool = False) -> Metric:
    """Return the NSD at one tolerance: of surface voxels, or of surface elements weighted by their area."""
    return _metric(partial(_nsd, tolerance_mm=tolerance_mm, surfel=surfel), f"{tolerance_mm:g} mm", surfel)


def nsd_own_metric(tolerances_mm: Mapping[str, float], otherwise_mm: float, *, surfel: bool = False) -> Metric:
    """Return the NSD in which each class has its own tolerance; `otherwise_mm` is for those not named."""
    told = ", ".join(f"{name} {tolerance:g} mm" for name, tolerance in tolerances_mm.items())
    compute = partial(_nsd_own, tolerances_mm=dict(tolerances_mm), otherwise_mm=otherwise_mm, surfel=surfel)
    return _metric(compute, f"a tolerance of each class ({told}; others {otherwise_mm:g} mm)", surfel)


def _nsd(pair: MaskPair, *, tolerance_mm: float, surfel: bool) -> float | None:
    if pair.outcome == "absent":
        return None
    if pair.outcome != "present":
        return 0.0
    if surfel:
        assert pair.surfels is not None
        return pair.surfels.nsd(tolerance_mm)
    assert pair.distances is not None
    return pair.distances.nsd(tolerance_mm)


def _nsd_own(pair: MaskPair, *, tolerances_mm: Mapping[str, float], otherwise_mm: float, surfel: bool) -> float | None:
    return _nsd(pair, tolerance_mm=tolerances_mm.get(pair.name, otherwise_mm), surfel=surfel)


def _metric(compute: partial[float | None], tolerance: str, surfel: bool) -> Metric:
    if surfel:
        return Metric(
            title=f"NSD, surfels, {tolerance}" if tolerance[0].isdigit() else "NSD, surfels, own tolerances",
            unit="",
            higher_is_better=True,
            digits=3,
            compute=compute,
            definition="Share of both surfaces' area that lies at most the tolerance away from the other surface. A "
            "surface is cut into elements, one for every eight voxels around a corner where inside and outside meet, "
            "with the area that marching cubes gives it; distances are between these corners in mm. Beyond the image "
            f"is outside. Tolerance: {tolerance}. 1 is perfect.",
            empty_reference=FALSE_ALARM_IS_ZERO,
            empty_prediction=MISS_IS_ZERO,
            both_empty=UNDEFINED,
            source="S. Nikolov et al., Journal of Medical Internet Research 23 (2021). As DeepMind's surface-distance, "
            "compute_surface_dice_at_tolerance.",
            group="surface",
        )
    return Metric(
        title=f"NSD, {tolerance}" if tolerance[0].isdigit() else "NSD, own tolerances",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=compute,
        definition="Share of both masks' surface voxels that lie at most the tolerance away from a surface voxel of "
        f"the other mask, between voxel centres in mm. {SURFACE_VOXEL} Tolerance: {tolerance}. 1 is perfect.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="As MONAI's compute_surface_dice and Metrics Reloaded (Maier-Hein et al., Nature Methods 21, 2024). "
        "DeepMind's surface-distance weights surface elements by their area: its values differ.",
        group="surface",
    )
