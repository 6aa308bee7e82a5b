"""Normalisation of each channel over space, exact in every memory layout."""

from __future__ import annotations

import torch
from torch import Tensor

from sagittal.kernels.pointwise_conv import prefers_channels_last


def normalise_channels(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each channel of each case over space, then scale and shift it: GroupNorm, a group for every channel.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W), any memory format.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.
    """
    if not prefers_channels_last(x):
        return torch.group_norm(x, x.shape[1], weight, bias, eps)
    # In channels_last PyTorch's CPU operator adds up x and x^2 in one float32 and subtracts: on a patch of 128^3 that
    # leaves three digits, where the contiguous form keeps seven.
    y = torch.group_norm(x.contiguous(), x.shape[1], weight, bias, eps)
    return y.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
