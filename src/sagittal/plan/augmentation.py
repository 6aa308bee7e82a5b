"""Random changes to training patches: how likely and how strong."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sagittal.plan.base import Frozen
from sagittal.plan.quantities import Count, NonNegative, Positive, Probability


class Augmentation(Frozen):
    """Probabilities and ranges of the random changes to a training patch (nnU-Net's defaults)."""

    rotation_probability: Probability = 0.2
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0
    scaling_probability: Probability = 0.2
    scaling_range: tuple[Positive, Positive] = (0.7, 1.4)
    mirror_axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    """Axes of the network's arrays that are mirrored, each with probability 0.5."""
    noise_probability: Probability = 0.1
    noise_variance: tuple[NonNegative, NonNegative] = (0.0, 0.1)
    blur_probability: Probability = 0.2
    blur_sigma_vox: tuple[Positive, Positive] = (0.5, 1.0)
    brightness_probability: Probability = 0.15
    brightness_range: tuple[Positive, Positive] = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    contrast_range: tuple[Positive, Positive] = (0.75, 1.25)
    low_resolution_probability: Probability = 0.25
    low_resolution_range: tuple[Positive, Positive] = (0.5, 1.0)
    gamma_probability: Probability = 0.3
    gamma_inverted_probability: Probability = 0.1
    gamma_range: tuple[Positive, Positive] = (0.7, 1.5)
    elastic_probability: Probability = 0.0
    elastic_sigma: tuple[Positive, Positive] = (0.1, 0.2)
    """How smooth the random displacements are: standard deviation of their blur, as a share of the patch's size."""
    elastic_magnitude: tuple[NonNegative, NonNegative] = (0.0, 0.05)
    """How far they reach at most along each axis, as a share of the patch's size along it."""
    swapped_labels: tuple[tuple[Literal[0, 1, 2], Count, Count], ...] = ()
    """(axis, label value, label value): two labels that change places where this axis of the network's arrays is
    mirrored, such as left and right kidney. Prediction changes them back (`inference.mirror_axes`)."""
    channel_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a channel is left out of a patch, 0 in every voxel, but never all of them. A network that was
    trained so predicts without channels that are declared missing (`sagittal predict --missing`)."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "elastic_probability",
        "elastic_sigma",
        "elastic_magnitude",
        "swapped_labels",
        "channel_dropout",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("elastic_sigma", "elastic_magnitude"):
            lower, upper = getattr(self, name)
            if lower > upper:
                raise ValueError(f"{name} must ascend, got {[lower, upper]}")
        places = [(axis, value) for axis, *pair in self.swapped_labels for value in pair]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            axis, value = twice[0]
            raise ValueError(f"swapped_labels: value {value} must be in one pair of axis {axis}, of two values")
        return self
