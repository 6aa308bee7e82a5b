"""What of a network follows from its patch: a U-Net's stages, and the positions that UNETR learns.

nnU-Net's rules for a U-Net: halve every axis that is long enough and whose voxels are not much longer than the
shortest ones, until no axis is left; convolve along an axis only once its voxels are of about the others' length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import assert_never

from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.networks import (
    MedNeXtConfig,
    NetworkConfig,
    NNFormerConfig,
    PlainConvUNetConfig,
    ResEncUNetConfig,
    SegFormer3DConfig,
    SwinUNETRConfig,
    TransBTSConfig,
    UNETRConfig,
    UXNetConfig,
)
from sagittal.planning.memory import TrainingStep, training_step

SMALLEST_EDGE = 4
"""No axis of a feature map becomes shorter by halving."""
SPACING_RATIO = 2.0
"""An axis takes part once its voxels are less than this much longer than the shortest."""
WIDEST = 320
_UNETR_PATCH = 16
_ENCODER_BLOCKS = (1, 3, 4, 6)
"""Blocks of the residual encoder's stages; all further ones have as many as the last of these."""


@dataclass(frozen=True)
class Stages:
    """A U-Net's stages from fine to coarse, the last one the bottleneck."""

    strides: tuple[Triple, ...]
    kernel_sizes: tuple[Triple, ...]


def unet_stages(spacing_mm: TripleMm, patch_size: Triple) -> Stages:
    """Return the stages that nnU-Net gives a U-Net for a patch.

    Where no axis can be halved by the rules, one stage halves them all: a U-Net has at least two.

    Args:
        spacing_mm: of the voxels along D, H, W.
        patch_size: voxels along D, H, W.
    """
    spacing, size = list(spacing_mm), list(patch_size)
    kernel = [1, 1, 1]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    while axes := _to_halve(spacing, size):
        kernel = [3 if edge < SPACING_RATIO * min(spacing) else old for edge, old in zip(spacing, kernel, strict=True)]
        kernels.append(_triple(kernel))
        strides.append(_triple([2 if axis in axes else 1 for axis in range(3)]))
        for axis in axes:
            spacing[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    if not kernels:
        return Stages(((1, 1, 1), (2, 2, 2)), ((3, 3, 3), (3, 3, 3)))
    return Stages(tuple(strides), (*kernels, (3, 3, 3)))


def network_for_patch(
    network: NetworkConfig, spacing_mm: TripleMm, patch_size: Triple
) -> tuple[NetworkConfig, dict[str, str]]:
    """Return `network` fitted to a patch, and the reasons of the fields that were fitted, by their names.

    Args:
        network: as named; most networks are the same for every patch.
        spacing_mm: of the patch's voxels along D, H, W.
        patch_size: voxels along D, H, W.
    """
    shown = "x".join(map(str, patch_size))
    match network:
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return _unet_for_patch(network, spacing_mm, patch_size)
        case UNETRConfig():
            size = _triple([ceil(edge / _UNETR_PATCH) * _UNETR_PATCH for edge in patch_size])
            why = f"a learned position for each {_UNETR_PATCH} voxels of the patch, {shown}"
            return network.replace(input_size=size), {"input_size": why}
        case (
            MedNeXtConfig()
            | SegFormer3DConfig()
            | SwinUNETRConfig()
            | UXNetConfig()
            | NNFormerConfig()
            | TransBTSConfig()
        ):
            return network, {}
        case _:
            assert_never(network)


@dataclass(frozen=True)
class FittedStep:
    """A training step of a network that follows its patch."""

    named: NetworkConfig
    spacing_mm: TripleMm
    in_channels: int
    num_outputs: int
    _steps: dict[NetworkConfig, TrainingStep] = field(default_factory=dict, repr=False, compare=False)

    def for_patch(self, patch_size: Triple) -> TrainingStep:
        """Return the step of the network as it is for a patch; made once for each network."""
        network, _ = network_for_patch(self.named, self.spacing_mm, patch_size)
        if network not in self._steps:
            self._steps[network] = training_step(network, self.in_channels, self.num_outputs)
        return self._steps[network]

    def memory_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Return what a step on patches of this size takes, with the network that they get."""
        return self.for_patch(patch_size).memory_bytes(patch_size, batch_size)


def _unet_for_patch(
    network: PlainConvUNetConfig | ResEncUNetConfig, spacing_mm: TripleMm, patch_size: Triple
) -> tuple[NetworkConfig, dict[str, str]]:
    stages = unet_stages(spacing_mm, patch_size)
    count = len(stages.strides)
    first = network.features_per_stage[0]
    common = {
        "strides": stages.strides,
        "kernel_sizes": stages.kernel_sizes,
        "features_per_stage": tuple(min(first << stage, WIDEST) for stage in range(count)),
    }
    patch, spacing = "x".join(map(str, patch_size)), "x".join(f"{edge:.3g}" for edge in spacing_mm)
    reasons = {
        "strides": f"nnU-Net's rules for a patch of {patch} voxels of {spacing} mm: halve what has at least "
        f"{2 * SMALLEST_EDGE} voxels, along axes whose voxels are within a factor of {SPACING_RATIO:g} of the shortest",
        "kernel_sizes": f"nnU-Net's, 3 once an axis' voxels are within a factor of {SPACING_RATIO:g} of the shortest",
        "features_per_stage": f"nnU-Net's, doubled from stage to stage up to {WIDEST}",
    }
    if isinstance(network, PlainConvUNetConfig):
        reasons["n_conv_per_stage"] = reasons["n_conv_per_stage_decoder"] = "nnU-Net's, two in each stage"
        convolutions = (2,) * count
        return network.replace(
            **common, n_conv_per_stage=convolutions, n_conv_per_stage_decoder=convolutions[1:]
        ), reasons
    blocks = (*_ENCODER_BLOCKS, *(_ENCODER_BLOCKS[-1],) * count)[:count]
    reasons["n_blocks_per_stage"] = "nnU-Net's residual encoder, whose sizes M, L and XL differ in their memory only"
    reasons["n_conv_per_stage_decoder"] = "nnU-Net's residual encoder, one in each stage"
    return network.replace(**common, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=(1,) * (count - 1)), reasons


def _to_halve(spacing_mm: list[float], size: list[int]) -> list[int]:
    """Return the axes that the next stage halves; none ends the network."""
    long_enough = [axis for axis in range(3) if size[axis] >= 2 * SMALLEST_EDGE]
    if not long_enough:
        return []
    shortest = min(spacing_mm[axis] for axis in long_enough)
    axes = [axis for axis in long_enough if spacing_mm[axis] < SPACING_RATIO * shortest]
    # A single axis is halved only where something is left of it.
    return [] if len(axes) == 1 and size[axes[0]] < 3 * SMALLEST_EDGE else axes


def _triple(values: list[int]) -> Triple:
    d, h, w = values
    return d, h, w
