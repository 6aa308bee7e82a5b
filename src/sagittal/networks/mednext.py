"""MedNeXt: a ConvNeXt-like encoder and decoder for medical volumes.

Written from arXiv 2303.09975 (MICCAI 2023) and, for the second form of GRN, arXiv 2512.17774 (MedNeXt-v2). Modules
bear the names of the official weights. Five resolutions, nine stages: encoder 0-3, bottleneck, decoder 3-0; skips are
added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagittal.errors import PlanError, did_you_mean
from sagittal.networks.layout import check_input, crop_end, pad_end, pointwise, to_preferred_layout
from sagittal.networks.mednext_blocks import (
    BlockOptions,
    Grn,
    MedNeXtBlock,
    MedNeXtDownBlock,
    MedNeXtUpBlock,
    Norm,
    convolution_class,
    transposed_class,
)

LEVELS = 5
"""Resolutions: 1, 1/2, 1/4, 1/8, 1/16."""
STAGES = 9
"""Encoder 0-3, bottleneck, decoder 3-0."""
DIVISOR = 2 ** (LEVELS - 1)
"""Every axis is padded at its end to a multiple of this."""


class MedNeXtHead(nn.Module):
    """Turn features into logits: a 1x1x1 transposed convolution, as in the official weights (in, out, 1, 1, 1)."""

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv_out = transposed_class(spatial_dims)(in_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, num_classes, D, H, W)."""
        return pointwise(x, self.conv_out.weight.transpose(0, 1), self.conv_out.bias)


class MedNeXt(nn.Module):
    """MedNeXt for images of any size.

    The end of each axis is padded by edge replication to a multiple of 16 and cropped from the output.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        channels: width of the finest level; it doubles at each of the four coarser ones.
        expansion_ratio: one for all stages, or nine (encoder 0-3, bottleneck, decoder 3-0). Down block i has the ratio
            of the stage it leads to, up block i that of decoder i.
        kernel_size: odd size of the depthwise kernels.
        block_counts: blocks in each of the nine stages.
        deep_supervision: add heads at 1/2, 1/4, 1/8 and 1/16 of the resolution.
        norm: "group" (per channel over space) or "layer" (per voxel over channels).
        grn: global response normalisation: False, True (v1's form; not in the first down block) or "v2" (in every
            block).
        spatial_dims: 3 or 2.
        checkpointing: recompute each block's activations in the backward pass: less memory, about a third more time.

    Raises:
        PlanError: an argument makes no sense.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 32,
        expansion_ratio: int | Sequence[int] = 2,
        kernel_size: int = 3,
        block_counts: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        deep_supervision: bool = False,
        norm: Norm = "group",
        grn: Grn = False,
        spatial_dims: int = 3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        ratios = (expansion_ratio,) * STAGES if isinstance(expansion_ratio, int) else tuple(expansion_ratio)
        _check_config(in_channels, num_classes, channels, ratios, tuple(block_counts))
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.deep_supervision = deep_supervision
        self.spatial_dims = spatial_dims
        self.checkpointing = checkpointing

        def options(index: int) -> BlockOptions:
            return {
                "expansion_ratio": ratios[index],
                "kernel_size": kernel_size,
                "norm": norm,
                "grn": grn,
                "spatial_dims": spatial_dims,
            }

        def stage(level: int, index: int) -> nn.Sequential:
            width = channels << level
            return nn.Sequential(*(MedNeXtBlock(width, width, **options(index)) for _ in range(block_counts[index])))

        self.stem = convolution_class(spatial_dims)(in_channels, channels, kernel_size=1)
        for level in range(LEVELS - 1):
            self.add_module(f"enc_block_{level}", stage(level, level))
            resampling = options(level + 1)
            if level == 0 and grn is True:
                # v1's code has no GRN in this block, and its weights must fit.
                resampling["grn"] = False
            down = MedNeXtDownBlock(channels << level, channels << (level + 1), **resampling)
            self.add_module(f"down_{level}", down)
        self.bottleneck = stage(LEVELS - 1, LEVELS - 1)
        for level in reversed(range(LEVELS - 1)):
            index = STAGES - 1 - level
            up = MedNeXtUpBlock(channels << (level + 1), channels << level, **options(index))
            self.add_module(f"up_{level}", up)
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

        Scale s has ceil(n / 2^s) voxels along an axis of n; without deep supervision there is only scale 0.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        return self._logits(x, scales=LEVELS if self.deep_supervision else 1)

    def _logits(self, x: Tensor, *, scales: int) -> list[Tensor]:
        check_input(x, self.in_channels, self.spatial_dims, "MedNeXt")
        sizes = tuple(x.shape[2:])
        x = pad_end(x, tuple(-(-size // DIVISOR) * DIVISOR for size in sizes))
        features = self._features(x)
        return [
            crop_end(self.get_submodule(f"out_{scale}")(features[scale]), tuple(-(-size >> scale) for size in sizes))
            for scale in range(scales)
        ]

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return what the heads see, finest first: decoder 0-3 and the bottleneck."""
        x = pointwise(to_preferred_layout(x), self.stem.weight, self.stem.bias)
        skips = []
        for level in range(LEVELS - 1):
            x = self._run(self.get_submodule(f"enc_block_{level}").children(), x)
            skips.append(x)
            x = self._run([self.get_submodule(f"down_{level}")], x)
        x = self._run(self.bottleneck, x)
        features = [x]
        for level in reversed(range(LEVELS - 1)):
            x = skips.pop() + self._run([self.get_submodule(f"up_{level}")], x)
            x = self._run(self.get_submodule(f"dec_block_{level}").children(), x)
            features.append(x)
        return features[::-1]

    def _run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        for block in blocks:
            if self.checkpointing and self.training:
                # No block draws random numbers, so there is no state of the generator to keep.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


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
    kernel_size: int = 3,
    deep_supervision: bool = False,
    norm: Norm = "group",
    grn: Grn = False,
    checkpointing: bool | None = None,
) -> MedNeXt:
    """Build one of the four networks of the paper (arXiv 2303.09975, table 1).

    Args:
        size: "S", "B", "M" or "L".
        in_channels: channels of the image.
        num_classes: channels of the logits.
        kernel_size: 3 or 5 in the paper; any odd number works.
        deep_supervision: add heads at the four coarser scales.
        norm: as in `MedNeXt`.
        grn: as in `MedNeXt`.
        checkpointing: as in `MedNeXt`; None means as published: M and L only.

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
        kernel_size=kernel_size,
        block_counts=published.block_counts,
        deep_supervision=deep_supervision,
        norm=norm,
        grn=grn,
        checkpointing=published.checkpointing if checkpointing is None else checkpointing,
    )


def _check_config(
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
