"""Memory layout, size and axes of the volumes inside a network.

On a CPU the networks keep their volumes in channels_last_3d: the same tensor is then, as a free view, (N, D, H, W,
C), on which a 1x1x1 convolution is one matrix product and a LayerNorm runs over contiguous memory. Letters as
everywhere: N batch, C channels, D H W the array axes of space, slow to fast; in 2D there is no D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sagittal.errors import DataError, PlanError
from sagittal.kernels import prefers_channels_last

Size = tuple[int, int, int]
"""D, H, W."""


def to_preferred_layout(x: Tensor) -> Tensor:
    """Return (N, C, ...) `x` in the memory format that its device is fastest with; the values stay the same."""
    if not prefers_channels_last(x):
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)


def as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` in the dtype of a weight that was kept in float32 for it; as it is under autocast."""
    if x.dtype == weight.dtype or (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return x
    return x.to(weight.dtype)


def divide_up(size: int, by: int) -> int:
    """Return size / by, rounded up.

    Written without the negative numbers of the usual form: ONNX, where a size may be open, rounds those towards zero.
    """
    return (size + by - 1) // by


def round_up(size: int, to: int) -> int:
    """Return the least multiple of `to` that is not below `size`."""
    return divide_up(size, to) * to


def pad_to_multiples(x: Tensor, multiples: Sequence[int]) -> Tensor:
    """Pad each spatial axis at its end, as `pad_end` does, to a multiple of its number."""
    return pad_end(x, tuple(round_up(size, to) for size, to in zip(x.shape[2:], multiples, strict=True)))


def pad_end(x: Tensor, targets: tuple[int, ...]) -> Tensor:
    """Repeat the last plane of each spatial axis until the axes measure `targets`; longer axes stay as they are."""
    for axis, target in enumerate(targets, start=2):
        size = x.shape[axis]
        if _symbolic(target):
            x = x.index_select(axis, torch.arange(target, device=x.device).clamp(max=size - 1))
        elif target > size:
            shape = list(x.shape)
            shape[axis] = target - size
            # nn.functional.pad(mode="replicate") lacks some dtypes and is not deterministic on every device.
            x = torch.cat([x, x.narrow(axis, size - 1, 1).expand(shape)], dim=axis)
    return x


def crop_end(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the first `sizes` voxels of each spatial axis, as a contiguous tensor."""
    for axis, size in enumerate(sizes, start=2):
        x = x.index_select(axis, torch.arange(size, device=x.device)) if _symbolic(size) else x.narrow(axis, 0, size)
    return x.contiguous()


def _symbolic(size: int) -> bool:
    """Tell whether an export leaves this size open.

    Whether to pad or crop, and whether a view is dense, would then be questions to a number that is not there yet; a
    selection by index asks none. In a compiled graph the questions are guards, and the views stay cheap.
    """
    return torch.compiler.is_exporting() and isinstance(size, torch.SymInt)


def check_input(x: Tensor, in_channels: int, spatial_dims: int, network: str) -> None:
    """Raise DataError unless `x` is a non-empty floating-point batch (N, in_channels, then `spatial_dims` axes)."""
    letters = "N, C, D, H, W" if spatial_dims == 3 else "N, C, H, W"
    given = f"{network} was given a tensor of shape {tuple(x.shape)}"
    if x.ndim != spatial_dims + 2:
        raise DataError(
            f"{given}: {x.ndim} axes. Expected {spatial_dims + 2}: ({letters}). "
            "Add the missing batch or channel axis, for example with x[None].",
            code="input_axes",
        )
    if x.shape[1] != in_channels:
        raise DataError(
            f"{given}: {x.shape[1]} channels. Expected {in_channels}, the in_channels it was built with "
            f"(axes are {letters}). Pass the channels it was built for, or build it with another in_channels.",
            code="input_channels",
        )
    if min(x.shape) == 0:
        raise DataError(f"{given}: it is empty. Expected at least one voxel along every axis.", code="input_empty")
    if not x.is_floating_point():
        raise DataError(
            f"{given} and dtype {x.dtype}. Expected floating-point intensities: call x.float().", code="input_dtype"
        )


def triple(values: Iterable[int]) -> Size:
    """Return the three values, of D, H, W."""
    d, h, w = values
    return d, h, w


def convolution_class(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """Return the convolution of 2 or 3 spatial axes; raise PlanError for any other number."""
    if spatial_dims == 3:
        return nn.Conv3d
    if spatial_dims == 2:
        return nn.Conv2d
    raise PlanError(f"spatial_dims={spatial_dims!r}: expected 3 (volumes) or 2 (slices).")


def transposed_class(spatial_dims: int) -> type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]:
    """Return the transposed convolution of 2 or 3 spatial axes; raise PlanError for any other number."""
    return nn.ConvTranspose3d if convolution_class(spatial_dims) is nn.Conv3d else nn.ConvTranspose2d
