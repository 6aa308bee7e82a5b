"""Several networks as one: the mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of its members' logits, member by member.

    Blending windows is linear, so taking the mean in each window gives the mean of whole predictions while only one
    prediction has to be held. Members are in eval mode and give one tensor each.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        assert members, "an ensemble needs a member"
        self.members = nn.ModuleList(members)

    def forward(self, x: Float[Tensor, "N C D H W"]) -> Float[Tensor, "N K D H W"]:
        """Return the mean logits (N, K, D, H, W) of images (N, C, D, H, W)."""
        first, *others = self.members
        total: Tensor = first(x)
        for member in others:
            total = total + member(x)
        return total / len(self.members)
