"""MedNeXt's configuration, and the sizes that the papers name. Torch-free: `networks.build` makes a module of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sagittal.plan.network_base import NetworkBase

Nine = tuple[int, int, int, int, int, int, int, int, int]
KernelSize = Literal[3, 5, 7]
Step = Literal[1, 2]
Steps = tuple[Step, Step, Step] | tuple[Step, Step]
FlatLevels = Annotated[int, Field(ge=0, le=5)]
Checkpointing = Literal["none", "expansion", "block"]
NineCheckpointing = tuple[
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
    Checkpointing,
]

HALVINGS = 4
"""Down blocks, each between two of the five levels."""


class MedNeXtConfig(NetworkBase):
    """MedNeXt (arXiv 2303.09975) and MedNeXt-v2 (arXiv 2512.17774); stages are encoder 0-3, bottleneck, decoder 3-0."""

    kind: Literal["mednext"] = "mednext"
    channels: int = 32
    """Width of the finest level; it doubles at each of the four coarser ones."""
    expansion_ratio: int | Nine = 2
    kernel_size: KernelSize = 3
    decoder_kernel_size: KernelSize | None = None
    """Kernel of the bottleneck, the up blocks and the decoder; none: as `kernel_size`."""
    block_counts: Nine = (2, 2, 2, 2, 2, 2, 2, 2, 2)
    deep_supervision: bool = True
    norm: Literal["group", "layer"] = "group"
    grn: Literal["v2"] | bool = False
    block_residual: bool = True
    """Add each block's input to its output."""
    resampling_residual: bool = True
    """Give the down and up blocks their residual path."""
    strides: tuple[Steps, Steps, Steps, Steps] | None = None
    """By how much each of the four down blocks shrinks each axis, 1 or 2; none: every axis is halved four times."""
    flat_levels: tuple[FlatLevels, FlatLevels, FlatLevels] | tuple[FlatLevels, FlatLevels] | None = None
    """For each axis, on how many of the finest levels kernels measure 1 along it; none: nowhere."""
    spatial_dims: Literal[2, 3] = 3
    checkpointing: bool | Checkpointing | NineCheckpointing = False
    """What training computes again instead of keeping it: nothing, all after the depthwise convolution ("expansion"),
    or all of each block ("block", or true); for all stages or for each. Less memory, up to a third more time."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "decoder_kernel_size",
        "block_residual",
        "resampling_residual",
        "strides",
        "flat_levels",
    )

    @property
    def scales(self) -> int:
        """Five with deep supervision, else one."""
        return HALVINGS + 1 if self.deep_supervision else 1

    def single_scale(self) -> Self:
        """Return the configuration without the heads of deep supervision."""
        return self.replace(deep_supervision=False)

    @property
    def dims(self) -> int:
        """Spatial axes of an image."""
        return self.spatial_dims

    def for_slices(self) -> Self | None:
        """Return the same network for images of two axes; what is said of the first of three axes is left out."""
        if self.spatial_dims == 2:
            return self
        strides = self.strides and tuple(step[1:] for step in self.strides)
        return self.replace(spatial_dims=2, strides=strides, flat_levels=self.flat_levels and self.flat_levels[1:])

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each axis, what a patch's size should be a multiple of, so that no voxel is padded: 16 by default."""
        if self.strides is None:
            return (2**HALVINGS,) * self.spatial_dims
        return tuple(prod(steps) for steps in zip(*self.strides, strict=True))

    def for_stages(self, strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]]) -> Self:
        """Return the configuration that halves and convolves along the axes that a U-Net's first five stages do.

        With nnU-Net's stages for (10, 1.5, 1.5) mm and (10, 224, 224) voxels, the strides are (1, 2, 2), (1, 2, 2),
        (2, 2, 2), (1, 2, 2) and the flat levels (2, 0, 0). Stages that the U-Net lacks halve nothing.

        Args:
            strides: of each stage from fine to coarse, 1 or 2 for each axis; the first stage's are all 1.
            kernel_sizes: of each stage; of interest is only which are 1.
        """
        axes = range(self.spatial_dims)
        steps = [tuple(stage) for stage in strides[1 : HALVINGS + 1]]
        steps += [(1,) * self.spatial_dims] * (HALVINGS - len(steps))
        flat = []
        for axis in axes:
            whole = (
                stage[axis] > 1 or step[axis] > 1 for stage, step in zip(kernel_sizes[:HALVINGS], steps, strict=False)
            )
            flat.append(next((level for level, is_whole in enumerate(whole) if is_whole), HALVINGS))
        halves_all = set(steps) == {(2,) * self.spatial_dims}
        return self.replace(
            strides=None if halves_all else tuple(steps), flat_levels=tuple(flat) if any(flat) else None
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        ratios = (self.expansion_ratio,) if isinstance(self.expansion_ratio, int) else self.expansion_ratio
        if min(self.channels, *ratios, *self.block_counts) < 1:
            raise ValueError("channels, expansion ratios and block counts must be at least 1")
        for name, every in (("strides", self.strides or ()), ("flat_levels", (self.flat_levels,))):
            if any(values is not None and len(values) != self.spatial_dims for values in every):
                raise ValueError(f"{name} must have {self.spatial_dims} numbers, one per spatial axis")
        strides = self.strides or (((2,) * self.spatial_dims),) * HALVINGS
        for axis, levels in enumerate(self.flat_levels or ()):
            if any(steps[axis] > 1 for steps in strides[:levels]):
                raise ValueError(f"axis {axis} can't be halved at a level where kernels measure 1 along it")
        return self


_B_RATIO: Nine = (2, 3, 4, 4, 4, 4, 4, 3, 2)
_L_RATIO: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)
_M_BLOCKS: Nine = (3, 4, 4, 4, 4, 4, 4, 4, 3)
_L_BLOCKS: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)

_PUBLISHED: dict[str, MedNeXtConfig] = {
    "mednext-s": MedNeXtConfig(),
    "mednext-b": MedNeXtConfig(expansion_ratio=_B_RATIO),
    "mednext-m": MedNeXtConfig(expansion_ratio=_B_RATIO, block_counts=_M_BLOCKS, checkpointing=True),
    "mednext-l": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, checkpointing=True),
}

MEDNEXT: dict[str, MedNeXtConfig] = {
    **_PUBLISHED,
    **{f"{name}-k5": config.replace(kernel_size=5) for name, config in _PUBLISHED.items()},
    **{f"{name}-k7": config.replace(kernel_size=7) for name, config in _PUBLISHED.items()},
    "mednext-v2-base": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True),
    "mednext-v2-wide": MedNeXtConfig(
        channels=64, expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True
    ),
}
