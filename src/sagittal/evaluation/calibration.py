"""Calibration: of the voxels that a model calls liver with 0.8, are eight out of ten liver?

Nearly all voxels of a scan are background that no model doubts. Over the whole scan every model therefore looks
calibrated; so everything is also counted near the foreground alone.
"""

from __future__ import annotations

from typing import Literal

from sagittal.plan.base import Frozen


class ReliabilityBins(Frozen):
    """Probabilities in equal bins from 0 to 1: how many, their sum, and how many came true. They add up over cases."""

    voxels: tuple[int, ...]
    probability_sums: tuple[float, ...]
    true: tuple[int, ...]


class CalibrationCounts(Frozen):
    """What calibration is computed from, over one set of voxels. It adds up over cases."""

    voxels: int
    brier_sums: dict[str, float]
    """By class the sum over voxels of the squared difference of its probability and of what is true (1 or 0)."""
    classes: dict[str, ReliabilityBins]
    """By class the probability that it is there, against whether it is."""
    top: ReliabilityBins | None
    """Probability of the most probable class, against whether it is the right one; None for regions, which overlap."""


class CalibrationScore(Frozen):
    """How well the probabilities of one case, or of many together, agree with what is true."""

    kind: Literal["softmax", "sigmoid"]
    whole: CalibrationCounts
    """All voxels that the reference doesn't ignore."""
    near_foreground: CalibrationCounts
    """Those near the foreground of reference or prediction alone."""
    margin_mm: float
    """How near, in mm along each axis."""
