"""Depthwise convolutions whose kernel and stride differ between the axes, for volumes with one coarse axis.

Where all axes have the same, the fused kernels compute; the Triton kernels of a GPU take any mixture. On a CPU, where
nothing is mixed along D (a kernel and a stride of 1 there), each plane is a picture, and the same kernels compute in
2D. What is left runs as PyTorch's own convolution.
Letters: N batch, C channels, D H W space, slow to fast; in 2D there is no D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.errors import PlanError
from sagittal.kernels import depthwise_conv, depthwise_conv_transpose, native, prefers_channels_last
from sagittal.kernels.bf16 import unconverted
from sagittal.kernels.depthwise import per_axis_on_gpu, plain_conv, plain_transpose

PerAxis = int | Sequence[int]
"""One number for all spatial axes, or one for each, D, H, W."""


def per_axis(value: PerAxis, spatial_dims: int, name: str) -> tuple[int, ...]:
    """Return one number per spatial axis; raise PlanError, which calls it `name`, where there are more or fewer."""
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims:
        raise PlanError(f"{name}={values}: expected one number, or {spatial_dims}, one per spatial axis.")
    return values


def strided(x: Tensor, strides: Sequence[int], *, start: int = 0) -> Tensor:
    """Return the view of every s-th voxel of (N, C, ...) along each axis; strided axes (s > 1) begin at `start`."""
    steps = (slice(start if stride > 1 else 0, None, stride) for stride in strides)
    return x[(slice(None), slice(None), *steps)]


def pad_front(y: Tensor, strides: Sequence[int], odd: Tensor | None = None) -> Tensor:
    """Put a plane of zeros before (N, C, ...) along each axis of stride 2, then add `odd` to the odd voxels.

    Args:
        y: (N, C, ...).
        strides: 1 or 2 for each spatial axis.
        odd: (N, C, ...), half as long as the result along the axes of stride 2, or None.
    """
    if odd is None:
        return F.pad(y, [side for stride in reversed(strides) for side in (stride - 1, 0)])
    with unconverted(y):
        if native.eager(y, odd):
            placed: Tensor = _Placed.apply(y, odd, strides)  # type: ignore[no-untyped-call]
            return placed
    y = pad_front(y, strides)
    strided(y, strides, start=1).add_(odd)
    return y


def _behind_front(x: Tensor, strides: Sequence[int]) -> Tensor:
    return x[(slice(None), slice(None), *(slice(stride - 1, None) for stride in strides))]


class _Placed(torch.autograd.Function):
    """`pad_front` without the copies of the whole volume that autograd makes for a change in place, there and back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, odd: Tensor, strides: Sequence[int]) -> Tensor:
        ctx.strides = strides
        sizes = [size + stride - 1 for size, stride in zip(y.shape[2:], strides, strict=True)]
        padded = y.new_empty((y.shape[0], *sizes, y.shape[1])).movedim(-1, 1)
        for axis, stride in enumerate(strides, start=2):
            padded.narrow(axis, 0, stride - 1).zero_()
        _behind_front(padded, strides).copy_(y)
        strided(padded, strides, start=1).add_(odd)
        return padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _behind_front(grad, ctx.strides), strided(grad, ctx.strides, start=1), None


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, strides: tuple[int, ...]) -> Tensor:
    """Convolve each channel with its own kernel, padding k // 2: a size n becomes n, or ceil(n / 2) with stride 2.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W).
        weight: (C, 1, kd, kh, kw) or (C, 1, kh, kw), each k odd.
        bias: (C,) or None.
        strides: 1 or 2 for each spatial axis.

    Raises:
        DataError: the shapes do not fit.
    """
    sizes = tuple(weight.shape[2:])
    if len(set(sizes)) == len(set(strides)) == 1:
        return depthwise_conv(x, weight, bias, stride=strides[0])
    y = per_axis_on_gpu(x, weight, bias, strides, transposed=False)
    if y is not None:
        return y
    if _is_stack(x, sizes, strides):
        return _by_plane(x, lambda planes: depthwise(planes, weight.squeeze(2), bias, strides[1:]))
    return plain_conv(x, weight, bias, strides)


def depthwise_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, strides: tuple[int, ...]) -> Tensor:
    """Convolve each channel, transposed, padding k // 2: a size n becomes n, or 2n - 1 with stride 2.

    Arguments and errors as in `depthwise`.
    """
    sizes = tuple(weight.shape[2:])
    if len(set(sizes)) == 1 and set(strides) == {2}:
        return depthwise_conv_transpose(x, weight, bias)
    y = per_axis_on_gpu(x, weight, bias, strides, transposed=True)
    if y is not None:
        return y
    if _is_stack(x, sizes, strides):
        return _by_plane(x, lambda planes: depthwise_transpose(planes, weight.squeeze(2), bias, strides[1:]))
    return plain_transpose(x, weight, bias, strides)


def _is_stack(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether planes can be convolved apart at no cost: D is left alone, and lies next to N in memory."""
    return x.ndim == 5 and sizes[0] == strides[0] == 1 and prefers_channels_last(x)


def _by_plane(x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `convolve` to the planes (N * D, C, H, W) of (N, C, D, H, W); in channels_last_3d nothing is copied."""
    planes = convolve(x.movedim(2, 1).flatten(0, 1))
    return planes.view(x.shape[0], x.shape[2], *planes.shape[1:]).movedim(1, 2)
