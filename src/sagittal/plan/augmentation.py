"""Random changes to training patches: how likely and how strong."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

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
    """How far they reach at most, as a share of the patch's size."""
    swapped_labels: tuple[tuple[Literal[0, 1, 2], Count, Count], ...] = ()
    """(axis, label value, label value): two labels that change places where this axis of the network's arrays is
    mirrored, such as left and right kidney."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "elastic_probability",
        "elastic_sigma",
        "elastic_magnitude",
        "swapped_labels",
    )
