"""Optimisers that a plan can name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sagittal.plan.base import Frozen
from sagittal.plan.quantities import KeptShare, NonNegative, Positive


class AdamW(Frozen):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive
    weight_decay: NonNegative
    eps: Positive = 1e-8
    betas: tuple[KeptShare, KeptShare] = (0.9, 0.999)


class SGD(Frozen):
    """Stochastic gradient descent with Nesterov momentum."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: Positive
    weight_decay: NonNegative
    momentum: KeptShare = 0.99


class Muon(Frozen):
    """Muon (kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal before they are applied.

    Matrices are the pointwise and dense convolutions and linear layers between stem and head; everything else
    (depthwise kernels, norms, biases, stem and heads) is trained by AdamW with the same rate.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: Positive
    """Each update of a matrix has the root mean square of an AdamW update of this rate (arXiv 2502.16982)."""
    weight_decay: NonNegative
    momentum: KeptShare = 0.95
    eps: Positive = 1e-8
    """AdamW's, for what is no matrix."""
    betas: tuple[KeptShare, KeptShare] = (0.9, 0.999)
    """AdamW's, for what is no matrix."""


Optimizer = Annotated[AdamW | SGD | Muon, Field(discriminator="kind")]
