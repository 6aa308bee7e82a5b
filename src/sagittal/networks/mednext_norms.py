"""The normalisations inside a block of MedNeXt: per channel over space, per voxel over channels, and of responses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels import normalise_channels

Norm = Literal["group", "layer"]
Grn = bool | Literal["v2"]

_GRN_EPS = 1e-6


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


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, by_sum: bool) -> Tensor:
    """Scale each channel by its share of the response: gamma * (x * n) + beta + x.

    n is the channel's L2 norm over space, divided by the mean of all channels' norms (MedNeXt v1's code, ConvNeXt-V2)
    or by their sum (`by_sum`, MedNeXt-v2, arXiv 2512.17774), plus 1e-6.

    Args:
        x: (N, C, ...).
        gamma: (1, C, 1, ...), like `beta`.
        beta: (1, C, 1, ...).
        by_sum: divide by the sum instead of the mean.
    """
    # A sum of squares over a whole volume overflows float16 and loses bits in bfloat16.
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    response = torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)), keepdim=True, dtype=dtype)
    total = response.sum(dim=1, keepdim=True) if by_sum else response.mean(dim=1, keepdim=True)
    scale = 1 + gamma * (response / (total + _GRN_EPS))
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))
