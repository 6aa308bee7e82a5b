"""MedNeXt: a ConvNeXt-like encoder and decoder for medical volumes.

Written from arXiv 2303.09975 (MICCAI 2023) and, for the second form of GRN, arXiv 2512.17774 (MedNeXt-v2). Modules
bear the names of the official weights. Five resolutions, nine stages: encoder 0-3, bottleneck, decoder 3-0; skips are
added.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple, TypedDict, Unpack

from torch import Tensor, nn

from sagittal.errors import PlanError, did_you_mean
from sagittal.kernels import pointwise
from sagittal.networks.layout import (
    as_weight,
    check_input,
    convolution_class,
    crop_end,
    divide_up,
    pad_to_multiples,
    to_preferred_layout,
    transposed_class,
)
from sagittal.networks.mednext_blocks import (
    CHECKPOINTING,
    BlockOptions,
    Checkpointing,
    MedNeXtBlock,
    MedNeXtDownBlock,
    MedNeXtUpBlock,
)
from sagittal.networks.mednext_norms import Grn, Norm

LEVELS = 5
"""Resolutions: 1, 1/2, 1/4, 1/8, 1/16."""
STAGES = 9
"""Encoder 0-3, bottleneck, decoder 3-0."""
_BOTTLENECK = LEVELS - 1


class MedNeXtHead(nn.Module):
    """Turn features into logits: a 1x1x1 transposed convolution, as in the official weights (in, out, 1, 1, 1)."""

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv_out = transposed_class(spatial_dims)(in_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, num_classes, D, H, W)."""
        weight = self.conv_out.weight.transpose(0, 1)
        return pointwise(as_weight(x, weight), weight, self.conv_out.bias)


class MedNeXt(nn.Module):
    """MedNeXt for images of any size.

    The end of each axis is padded by edge replication to a multiple of its strides' product (16 by default) and cropped
    from the output.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        channels: width of the finest level; it doubles at each of the four coarser ones.
        expansion_ratio: one for all stages, or nine (encoder 0-3, bottleneck, decoder 3-0). Down block i has the ratio
            of the stage it leads to, up block i that of decoder i.
        kernel_size: odd size of the depthwise kernels.
        decoder_kernel_size: that of the bottleneck, the up blocks and the decoder (the official code's division); None
            means `kernel_size`.
        block_counts: blocks in each of the nine stages.
        deep_supervision: add heads at the four coarser levels.
        norm: "group" (per channel over space) or "layer" (per voxel over channels).
        grn: global response normalisation: False, True (v1's form; not in the first down block) or "v2" (in every
            block).
        block_residual: add each block's input to its output.
        resampling_residual: give the down and up blocks their residual path (`res_conv`).
        strides: by how much each of the four down blocks shrinks each axis, 1 or 2: four triples (pairs in 2D). None
            halves every axis four times.
        flat_levels: for each axis, on how many of the finest levels the depthwise kernels measure 1 along it, 0 to 5:
            (2, 0, 0) convolves over D from the third level on. Down and up blocks go by the finer of their two levels.
            None means nowhere.
        spatial_dims: 3 or 2.
        checkpointing: what training computes again instead of keeping it, as in `MedNeXtBlock`: one for all stages, or
            nine; down and up blocks go with the stage whose ratio they have. False is "none", True is "block".

    Attributes:
        scale_factors: for each of the five levels, how many voxels of the image one of its voxels spans, per axis.

    Raises:
        PlanError: an argument makes no sense.
    """

    encoder_prefixes = ("stem.", "enc_block_", "down_", "bottleneck.")

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 32,
        expansion_ratio: int | Sequence[int] = 2,
        kernel_size: int = 3,
        decoder_kernel_size: int | None = None,
        block_counts: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        deep_supervision: bool = False,
        norm: Norm = "group",
        grn: Grn = False,
        block_residual: bool = True,
        resampling_residual: bool = True,
        strides: Sequence[Sequence[int]] | None = None,
        flat_levels: Sequence[int] | None = None,
        spatial_dims: int = 3,
        checkpointing: bool | Checkpointing | Sequence[bool | Checkpointing] = False,
    ) -> None:
        super().__init__()
        ratios = (expansion_ratio,) * STAGES if isinstance(expansion_ratio, int) else tuple(expansion_ratio)
        _check_numbers(in_channels, num_classes, channels, ratios, tuple(block_counts))
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.deep_supervision = deep_supervision
        self.spatial_dims = spatial_dims
        self.checkpointing = _checked_checkpointing(checkpointing)
        self.strides = _checked_strides(strides, spatial_dims)
        flat = _checked_flat_levels(flat_levels, self.strides, spatial_dims)
        self.scale_factors = tuple(
            tuple(prod(steps[axis] for steps in self.strides[:level]) for axis in range(spatial_dims))
            for level in range(LEVELS)
        )

        encoder, decoder = kernel_size, kernel_size if decoder_kernel_size is None else decoder_kernel_size

        def options(index: int, level: int, *, kernel_size: int, residual: bool) -> BlockOptions:
            return {
                "expansion_ratio": ratios[index],
                "kernel_size": tuple(1 if level < levels else kernel_size for levels in flat),
                "norm": norm,
                "grn": grn,
                "spatial_dims": spatial_dims,
                "residual": residual,
                "checkpointing": self.checkpointing[index],
            }

        def stage(level: int, index: int) -> nn.Sequential:
            size = encoder if index < _BOTTLENECK else decoder
            shared = options(index, level, kernel_size=size, residual=block_residual)
            width = channels << level
            return nn.Sequential(*(MedNeXtBlock(width, width, **shared) for _ in range(block_counts[index])))

        def down(level: int) -> MedNeXtDownBlock:
            shared = options(level + 1, level, kernel_size=encoder, residual=resampling_residual)
            if level == 0 and grn is True:
                # v1's code has no GRN in this block, and its weights must fit.
                shared["grn"] = False
            return MedNeXtDownBlock(channels << level, channels << (level + 1), stride=self.strides[level], **shared)

        def up(level: int, index: int) -> MedNeXtUpBlock:
            shared = options(index, level, kernel_size=decoder, residual=resampling_residual)
            return MedNeXtUpBlock(channels << (level + 1), channels << level, stride=self.strides[level], **shared)

        self.stem = convolution_class(spatial_dims)(in_channels, channels, kernel_size=1)
        for level in range(_BOTTLENECK):
            self.add_module(f"enc_block_{level}", stage(level, level))
            self.add_module(f"down_{level}", down(level))
        self.bottleneck = stage(_BOTTLENECK, _BOTTLENECK)
        for level in reversed(range(_BOTTLENECK)):
            index = STAGES - 1 - level
            self.add_module(f"up_{level}", up(level, index))
            self.add_module(f"dec_block_{level}", stage(level, index))
        for level in range(LEVELS if deep_supervision else 1):
            self.add_module(f"out_{level}", MedNeXtHead(channels << level, num_classes, spatial_dims))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W).

        In train mode with deep supervision: the list of `multiscale`.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        if self.training and self.deep_supervision:
            return self.multiscale(x)
        return self._logits(x, scales=1)[0]

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return the logits of every head, finest first, in train and eval mode alike.

        Scale s has ceil(n / f) voxels along an axis of n, where f is that axis's `scale_factors[s]`: 2^s unless
        `strides` say otherwise. Without deep supervision there is only scale 0.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        return self._logits(x, scales=LEVELS if self.deep_supervision else 1)

    def _logits(self, x: Tensor, *, scales: int) -> list[Tensor]:
        check_input(x, self.in_channels, self.spatial_dims, "MedNeXt")
        sizes = tuple(x.shape[2:])
        features = self._features(pad_to_multiples(x, self.scale_factors[-1]))
        return [
            crop_end(self.get_submodule(f"out_{scale}")(features[scale]), self._sizes(sizes, self.scale_factors[scale]))
            for scale in range(scales)
        ]

    @staticmethod
    def _sizes(sizes: tuple[int, ...], factors: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(divide_up(size, factor) for size, factor in zip(sizes, factors, strict=True))

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return what the heads see, finest first: decoder 0-3 and the bottleneck."""
        x = pointwise(to_preferred_layout(x), self.stem.weight, self.stem.bias)
        skips = []
        for level in range(_BOTTLENECK):
            x = self.get_submodule(f"enc_block_{level}")(x)
            skips.append(x)
            x = self.get_submodule(f"down_{level}")(x)
        x = self.bottleneck(x)
        features = [x]
        for level in reversed(range(_BOTTLENECK)):
            x = self.get_submodule(f"up_{level}")(x, skips.pop())
            x = self.get_submodule(f"dec_block_{level}")(x)
            features.append(x)
        return features[::-1]


class MedNeXtOptions(TypedDict, total=False):
    """What `create_mednext` passes on to `MedNeXt`, which explains it."""

    channels: int
    kernel_size: int
    decoder_kernel_size: int | None
    deep_supervision: bool
    norm: Norm
    grn: Grn
    block_residual: bool
    resampling_residual: bool
    strides: Sequence[Sequence[int]] | None
    flat_levels: Sequence[int] | None
    spatial_dims: int


class _Size(NamedTuple):
    block_counts: tuple[int, ...]
    expansion_ratio: tuple[int, ...]
    checkpointing: bool


_TWO = (2, 2, 2, 2, 2, 2, 2, 2, 2)
_SIZES = {
    "S": _Size(_TWO, _TWO, checkpointing=False),
    "B": _Size(_TWO, (2, 3, 4, 4, 4, 4, 4, 3, 2), checkpointing=False),
    "M": _Size((3, 4, 4, 4, 4, 4, 4, 4, 3), (2, 3, 4, 4, 4, 4, 4, 3, 2), checkpointing=True),
    "L": _Size((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3), checkpointing=True),
}


def create_mednext(
    size: Literal["S", "B", "M", "L"],
    *,
    in_channels: int,
    num_classes: int,
    checkpointing: bool | Checkpointing | Sequence[bool | Checkpointing] | None = None,
    **options: Unpack[MedNeXtOptions],
) -> MedNeXt:
    """Build one of the four networks of the paper (arXiv 2303.09975, table 1).

    MedNeXt-v2 (arXiv 2512.17774) is "L" with grn="v2": Base with 32 channels, Wide with 64.

    Args:
        size: "S", "B", "M" or "L": block counts, expansion ratios and checkpointing as published.
        in_channels: channels of the image.
        num_classes: channels of the logits.
        checkpointing: as in `MedNeXt`; None means as published: "block" in M and L, "none" in S and B.
        **options: everything else that `MedNeXt` takes, for example kernel_size=5 (3 and 5 in the paper).

    Raises:
        PlanError: an unknown size, or an argument that makes no sense.
    """
    if size not in _SIZES:
        raise PlanError(f"{size!r} is not a size of MedNeXt.{did_you_mean(str(size), _SIZES)}", code="unknown_network")
    published = _SIZES[size]
    return MedNeXt(
        in_channels,
        num_classes,
        expansion_ratio=published.expansion_ratio,
        block_counts=published.block_counts,
        checkpointing=published.checkpointing if checkpointing is None else checkpointing,
        **options,
    )


def _check_numbers(
    in_channels: int,
    num_classes: int,
    channels: int,
    ratios: tuple[int, ...],
    block_counts: tuple[int, ...],
) -> None:
    for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("channels", channels)):
        if value < 1:
            raise PlanError(f"MedNeXt({name}={value}): expected at least 1.")
    for name, values in (("expansion_ratio", ratios), ("block_counts", block_counts)):
        if len(values) != STAGES or min(values) < 1:
            raise PlanError(
                f"MedNeXt({name}={values}): expected {STAGES} numbers of at least 1, one per stage "
                "(encoder 0-3, bottleneck, decoder 3-0)."
            )


def _checked_checkpointing(
    checkpointing: bool | Checkpointing | Sequence[bool | Checkpointing],
) -> tuple[Checkpointing, ...]:
    every = (checkpointing,) * STAGES if isinstance(checkpointing, int | str) else tuple(checkpointing)
    styles = tuple(("block" if style else "none") if isinstance(style, bool) else style for style in every)
    if len(styles) != STAGES or not set(styles) <= set(CHECKPOINTING):
        raise PlanError(
            f"MedNeXt(checkpointing={checkpointing!r}): expected {', '.join(CHECKPOINTING)}, True or False, "
            f"one for all or {STAGES}, one per stage (encoder 0-3, bottleneck, decoder 3-0)."
        )
    return styles


def _checked_strides(strides: Sequence[Sequence[int]] | None, spatial_dims: int) -> tuple[tuple[int, ...], ...]:
    if strides is None:
        return ((2,) * spatial_dims,) * _BOTTLENECK
    steps = tuple(tuple(step) for step in strides)
    if len(steps) != _BOTTLENECK or any(len(step) != spatial_dims or not set(step) <= {1, 2} for step in steps):
        raise PlanError(
            f"MedNeXt(strides={steps}): expected {_BOTTLENECK} times {spatial_dims} numbers of 1 or 2, "
            "one per down block and spatial axis."
        )
    return steps


def _checked_flat_levels(
    flat_levels: Sequence[int] | None, strides: tuple[tuple[int, ...], ...], spatial_dims: int
) -> tuple[int, ...]:
    if flat_levels is None:
        return (0,) * spatial_dims
    flat = tuple(flat_levels)
    if len(flat) != spatial_dims or not all(0 <= levels <= LEVELS for levels in flat):
        raise PlanError(
            f"MedNeXt(flat_levels={flat}): expected {spatial_dims} numbers from 0 to {LEVELS}, one per spatial axis."
        )
    for axis, levels in enumerate(flat):
        if any(step[axis] > 1 for step in strides[:levels]):
            raise PlanError(
                f"MedNeXt(flat_levels={flat}, strides={strides}): axis {axis} is halved where kernels measure 1 along "
                "it, which drops every second voxel unseen. Begin halving it no earlier than convolving over it."
            )
    return flat
