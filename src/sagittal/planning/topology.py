"""What of a network follows from its patch: a U-Net's stages, MedNeXt's halvings, the positions that UNETR learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from types import MappingProxyType
from typing import Any, assert_never

from sagittal.errors import PlanError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.mednext import HALVINGS
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
from sagittal.plan.overrides import override_network
from sagittal.plan.plan import as_triple
from sagittal.planning.memory import TrainingStep, training_step
from sagittal.planning.unet_stages import SMALLEST_EDGE, SPACING_RATIO, coarse_axes, unet_stages

WIDEST = 320
_UNETR_PATCH = 16
_ENCODER_BLOCKS = (1, 3, 4, 6)
"""Blocks of the residual encoder's stages; all further ones have as many as the last of these."""

Fixed = Mapping[str, Any]
"""Values that the user chose of fields which follow from the patch otherwise: `network.strides` to its JSON value."""
NOTHING: Fixed = MappingProxyType({})
Fitted = tuple[NetworkConfig, dict[str, str]]
"""A network, and the reasons of the fields that were fitted, by their names."""


def network_for_patch(
    network: NetworkConfig, spacing_mm: TripleMm, patch_size: Triple, fixed: Fixed = NOTHING
) -> Fitted:
    """Return `network` fitted to a patch, and the reasons of the fields that were fitted, by their names.

    Args:
        network: as named; most networks are the same for every patch.
        spacing_mm: of the patch's voxels along the network's three axes; a network of slices has no use for the first.
        patch_size: voxels along the network's axes.
        fixed: values that the user chose of fields which would be fitted.

    Raises:
        PlanError: the fixed values make no sense, or do not go with those that follow from the patch.
    """
    if "network.strides" in fixed:
        return override_network(network, fixed), {}
    match network:
        case MedNeXtConfig():
            if fixed:
                return override_network(network, fixed), {}
            return network_of_levels(network, spacing_mm[-network.dims :], patch_size[-network.dims :])
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return _unet_for_patch(network, spacing_mm, patch_size, fixed)
        case UNETRConfig():
            if fixed:
                return override_network(network, fixed), {}
            size = as_triple([ceil(edge / _UNETR_PATCH) * _UNETR_PATCH for edge in patch_size])
            why = f"a learned position for each {_UNETR_PATCH} voxels of the patch, {_shown(patch_size)}"
            return network.replace(input_size=size), {"input_size": why}
        case SegFormer3DConfig() | SwinUNETRConfig() | UXNetConfig() | NNFormerConfig() | TransBTSConfig():
            return network, {}
        case _:
            assert_never(network)


def fitted_fields(network: NetworkConfig) -> tuple[str, ...]:
    """Return the names of the fields that `network_for_patch` may change."""
    match network:
        case MedNeXtConfig():
            return ("strides", "flat_levels")
        case PlainConvUNetConfig():
            return (*_UNET_FIELDS, "n_conv_per_stage")
        case ResEncUNetConfig():
            return (*_UNET_FIELDS, "n_blocks_per_stage")
        case UNETRConfig():
            return ("input_size",)
        case _:
            return ()


def patch_multiples(network: NetworkConfig) -> Triple:
    """Return what the axes of a patch should be multiples of for `network` as it is, so that no voxel is padded.

    MedNeXt and the U-Nets halve; SegFormer3D's tokens are 4 voxels apart, nnFormer's windows hold whole tokens,
    TransBTS halves three times, UNETR, Swin UNETR and 3D UX-Net four, five and four times.
    """
    match network:
        case MedNeXtConfig():
            return as_triple((1,) * (3 - network.dims) + network.multiples)
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return network.divisors
        case SegFormer3DConfig():
            return as_triple((1,) * (3 - network.dims) + (4,) * network.dims)
        case NNFormerConfig():
            # Whole windows at the finest stage; coarser ones mask what a window has too much.
            edges = [patch * length for patch, length in zip(network.patch_size, network.windows[0], strict=True)]
            return (max(edges),) * 3
        case TransBTSConfig():
            return 8, 8, 8
        case UNETRConfig() | UXNetConfig():
            return 16, 16, 16
        case SwinUNETRConfig():
            return 32, 32, 32
        case _:
            assert_never(network)


@dataclass(frozen=True)
class FittedStep:
    """A training step of a network that follows its patch."""

    named: NetworkConfig
    spacing_mm: TripleMm
    """Along the network's axes."""
    in_channels: int
    num_outputs: int
    fixed: Fixed = field(default_factory=dict)
    _steps: dict[NetworkConfig, TrainingStep] = field(default_factory=dict, repr=False, compare=False)

    def network(self, patch_size: Triple) -> NetworkConfig:
        """Return the network that patches of this size get."""
        return network_for_patch(self.named, self.spacing_mm, patch_size, self.fixed)[0]

    def multiples(self, patch_size: Triple) -> Triple:
        """Return what the axes of a patch should be multiples of for the network that this size gets."""
        return patch_multiples(self.network(patch_size))

    def for_patch(self, patch_size: Triple) -> TrainingStep:
        """Return the step of the network as it is for a patch; made once for each network."""
        network = self.network(patch_size)
        if network not in self._steps:
            self._steps[network] = training_step(network, self.in_channels, self.num_outputs)
        return self._steps[network]

    def memory_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Return what a step on patches of this size takes, with the network that they get."""
        return self.for_patch(patch_size).memory_bytes(patch_size, batch_size)


def network_of_levels(network: MedNeXtConfig, spacing_mm: Sequence[float], patch_size: Sequence[int]) -> Fitted:
    """Return a MedNeXt that halves and convolves along its axes as a U-Net of nnU-Net's would for the patch.

    Only where voxels are much longer along an axis than along another, or where an axis has too few of them to be
    halved four times; else the network stays as published.
    """
    coarse = coarse_axes(spacing_mm)
    short = tuple(axis for axis, edge in enumerate(patch_size) if edge < 2**HALVINGS)
    if not (coarse or short):
        return network, {}
    stages = unet_stages(spacing_mm, patch_size)
    fitted = network.for_stages(stages.strides, stages.kernel_sizes)
    if fitted == network:
        return network, {}
    letters = "DHW"[-network.dims :]
    told = [
        f"{letters[axis]} is {spacing_mm[axis] / min(spacing_mm):.3g} times coarser than the finest axis"
        for axis in coarse
    ]
    told += [f"{letters[axis]} has {patch_size[axis]} voxels, too few for {HALVINGS} halvings" for axis in short]
    because = f"{'; '.join(told)} (patch {_shown(patch_size)} of {_shown_mm(spacing_mm)} mm)"
    return fitted, {
        "strides": f"nnU-Net's rules for a U-Net, in place of {HALVINGS} halvings of each axis, because {because}",
        "flat_levels": "nnU-Net's rule for a U-Net: kernels measure 1 along an axis until the voxels of the others are "
        f"within a factor of {SPACING_RATIO:g} of its own",
    }


_UNET_FIELDS = ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage_decoder")


def _unet_for_patch(
    network: PlainConvUNetConfig | ResEncUNetConfig, spacing_mm: TripleMm, patch_size: Triple, fixed: Fixed
) -> Fitted:
    stages = unet_stages(spacing_mm, patch_size)
    count = len(stages.strides)
    first = network.features_per_stage[0]
    convolutions = (2,) * count
    fitted: dict[str, tuple[object, str]] = {
        "strides": (
            stages.strides,
            f"nnU-Net's rules for a patch of {_shown(patch_size)} voxels of {_shown_mm(spacing_mm)} mm: halve what has "
            f"at least {2 * SMALLEST_EDGE} voxels, along axes whose voxels are within a factor of {SPACING_RATIO:g} of "
            "the shortest",
        ),
        "kernel_sizes": (
            stages.kernel_sizes,
            f"nnU-Net's, 3 once an axis' voxels are within a factor of {SPACING_RATIO:g} of the shortest",
        ),
        "features_per_stage": (
            tuple(min(first << stage, WIDEST) for stage in range(count)),
            f"nnU-Net's, doubled from stage to stage up to {WIDEST}",
        ),
    }
    if isinstance(network, PlainConvUNetConfig):
        fitted["n_conv_per_stage"] = convolutions, "nnU-Net's, two in each stage"
        fitted["n_conv_per_stage_decoder"] = convolutions[1:], "nnU-Net's, two in each stage"
    else:
        blocks = (*_ENCODER_BLOCKS, *(_ENCODER_BLOCKS[-1],) * count)[:count]
        why = "nnU-Net's residual encoder, whose sizes M, L and XL differ in their memory only"
        fitted["n_blocks_per_stage"] = blocks, why
        fitted["n_conv_per_stage_decoder"] = (1,) * (count - 1), "nnU-Net's residual encoder, one in each stage"
    try:
        changed = override_network(network.replace(**{name: value for name, (value, _) in fitted.items()}), fixed)
    except PlanError as error:
        raise PlanError(
            f"{error.message} nnU-Net's rules give a patch of {_shown(patch_size)} voxels {count} stages; set "
            "network.strides too, and their number is yours.",
            code=error.code,
        ) from None
    return changed, {name: why for name, (_, why) in fitted.items() if f"network.{name}" not in fixed}


def _shown(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _shown_mm(spacing_mm: Sequence[float]) -> str:
    return "x".join(f"{edge:.3g}" for edge in spacing_mm)
