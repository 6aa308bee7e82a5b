"""Convolution with a kernel of one voxel, in the form that suits where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.kernels import choice, native
from sagittal.kernels.bf16 import autocasting, outside_autocast

_FEW = 8
"""Channels of an image: as many may lie apart in the memory while they are read."""


def prefers_channels_last(x: Tensor) -> bool:
    """Tell whether channels_last suits `x`: on the CPU, and where Triton kernels compute on a GPU.

    Not in an exported graph, whose runtime lays out itself.
    """
    return not torch.compiler.is_exporting() and (x.device.type in ("cpu", "meta") or choice.takes_kernels(x))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve `x` with a 1x1(x1) kernel: a matrix product where channels_last suits `x`, a convolution elsewhere.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W).
        weight: (out, C), with or without the trailing axes of size 1 that a convolution's has.
        bias: (out,) or None.
    """
    if autocasting(x):
        # With one channel or a few classes on a side the memory sets the time, and bfloat16 would add two conversions.
        with outside_autocast():
            return pointwise(x.float(), weight, bias)
    if _is_stem(x, weight) and not torch.is_grad_enabled() and native.usable(x, weight, bias):
        return native.stem(x, weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    if prefers_channels_last(x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    return convolve(x, weight.reshape(*weight.shape[:2], *(1,) * (x.ndim - 2)), bias)


def _is_stem(x: Tensor, weight: Tensor) -> bool:
    return x.ndim == 5 and x.shape[1] <= _FEW and weight.shape[0] % native.LANES == 0
