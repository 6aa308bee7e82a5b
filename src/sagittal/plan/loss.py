"""What training minimises."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from sagittal.plan.base import Frozen
from sagittal.plan.quantities import NonNegative, Positive


class Loss(Frozen):
    """A weighted sum of losses: Dice and cross-entropy (softmax; sigmoid and binary for regions), and three others."""

    dice_weight: NonNegative = 1.0
    cross_entropy_weight: NonNegative = 1.0
    batch_dice: bool = False
    """Sum intersections and volumes over the batch before the ratio."""
    dice_smooth: NonNegative = 1e-5
    deep_supervision_weights: tuple[NonNegative, ...] = (1.0,)
    """Weights of the outputs from fine to coarse; one value for a network without deep supervision."""
    top_k_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the voxels, those with the largest cross-entropy, that count in it; 1 for all."""
    tversky_weight: NonNegative = 0.0
    """Weight of the focal Tversky loss (arXiv 1810.07842)."""
    tversky_alpha: NonNegative = 0.3
    """Cost of a false positive in it."""
    tversky_beta: NonNegative = 0.7
    """Cost of a missed voxel in it."""
    tversky_gamma: Positive = 0.75
    """Exponent of it; below 1 what is nearly right weighs more, above 1 what is wrong."""
    boundary_weight: NonNegative = 0.0
    """Weight of the boundary loss (arXiv 1812.07032): probabilities times the signed distance to the true surface."""
    boundary_reach_mm: Positive = 10.0
    """Distances beyond this count as this."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "top_k_fraction",
        "tversky_weight",
        "tversky_alpha",
        "tversky_beta",
        "tversky_gamma",
        "boundary_weight",
        "boundary_reach_mm",
    )
