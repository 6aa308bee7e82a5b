"""The normalisations inside a block of MedNeXt: per channel over space, or per voxel over channels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels import normalise_channels

Norm = Literal["group", "layer"]
Grn = bool | Literal["v2"]


class ChannelGroupNorm(nn.GroupNorm):
    """Normalise each channel of each case over space: GroupNorm with one group per channel, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=channels, num_channels=channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...); one voxel in a batch of one gives the bias, where `nn.GroupNorm` raises."""
        return normalise_channels(x, self.weight, self.bias, self.eps)


class ChannelLayerNorm(nn.LayerNorm):
    """Normalise each voxel over its channels, in 2D and 3D, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...) over C."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def channel_norm(norm: Norm, channels: int) -> ChannelGroupNorm | ChannelLayerNorm:
    """Return the normalisation called `norm`; raise PlanError for an unknown name."""
    if norm == "group":
        return ChannelGroupNorm(channels)
    if norm == "layer":
        return ChannelLayerNorm(channels)
    raise PlanError(f"norm={norm!r} is not a normalisation of MedNeXt. Expected 'group' or 'layer'.")
