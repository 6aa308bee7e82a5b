"""What training minimises."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from sagittal.plan.base import Frozen
from sagittal.plan.quantities import NonNegative, Positive


class Loss(Frozen):
    """A weighted sum of losses: Dice and cross-entropy (softmax; sigmoid and binary for regions), and three others."""

    dice_weight: NonNegative = 1.0
    cross_entropy_weight: NonNegative = 1.0
    batch_dice: bool = False
    """Sum intersections and volumes over the batch before the ratio, in Dice and in focal Tversky."""
    dice_smooth: NonNegative = 1e-5
    deep_supervision_weights: tuple[NonNegative, ...] = (1.0,)
    """Weights of the outputs from fine to coarse; one value for a network without deep supervision."""
    top_k_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each sample's voxels, those with the largest cross-entropy, that count in it; 1 for all. Of ignored
    voxels none counts."""
    rare_class_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much the voxels of rare classes weigh in the cross-entropy: each counts as much as its class has voxels in
    the sample, to minus this power; 0 for all alike, 1 for all classes alike."""
    tversky_weight: NonNegative = 0.0
    """Weight of the focal Tversky loss (arXiv 1810.07842, where alpha is the cost of a missed voxel and 1/gamma the
    exponent: its alpha 0.7, beta 0.3 and gamma 4/3 are the defaults here)."""
    tversky_alpha: NonNegative = 0.3
    """Cost of a false positive in it."""
    tversky_beta: NonNegative = 0.7
    """Cost of a missed voxel in it."""
    tversky_gamma: Positive = 0.75
    """Exponent of it; below 1 what is nearly right weighs more, above 1 what is wrong."""
    boundary_weight: NonNegative = 0.0
    """Weight, in 1/mm, of the boundary loss (arXiv 1812.07032): probabilities times the signed distance to the true
    surface in mm, a mean over voxels and outputs. It is below 0 where all is right; use it beside another loss."""
    boundary_reach_mm: Positive = 10.0
    """Distances beyond this count as this, and so does every voxel of a patch without a surface of the class."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "top_k_fraction",
        "rare_class_power",
        "tversky_weight",
        "tversky_alpha",
        "tversky_beta",
        "tversky_gamma",
        "boundary_weight",
        "boundary_reach_mm",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        weights = ("dice_weight", "cross_entropy_weight", "tversky_weight", "boundary_weight")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, expected one above 0: there is nothing to minimise")
        if not any(self.deep_supervision_weights):
            raise ValueError("deep_supervision_weights are all 0, expected one above 0: there is nothing to minimise")
        return self
