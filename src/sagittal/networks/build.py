"""From a configuration to a module: the only file of this room that knows the plan."""

from __future__ import annotations

from typing import Any, assert_never

from torch import nn

from sagittal.errors import ResourceError
from sagittal.networks.mednext import MedNeXt
from sagittal.networks.nnformer import NNFormer
from sagittal.networks.segformer3d import SegFormer3D
from sagittal.networks.slices import as_slices
from sagittal.networks.transbts import TransBTS
from sagittal.networks.uxnet import UXNet
from sagittal.plan.base import EVERY_FIELD
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


def build_network(
    config: NetworkConfig, in_channels: int, num_outputs: int, deep_supervision: bool | None = None
) -> nn.Module:
    """Build the network that `config` describes, freshly initialised from torch's global generator.

    It takes (N, C, D, H, W); where the configuration is one of two axes, D must be 1 (`networks.slices`).

    Args:
        config: a network's configuration, for example `network_config("mednext-s")`.
        in_channels: channels of the image.
        num_outputs: channels of the logits: classes with the background, or regions.
        deep_supervision: override the configuration's; None keeps it. Networks of one scale ignore it.

    Raises:
        PlanError: the configuration makes no sense.
        ResourceError: the network comes from a library that is not installed.
    """
    network = _build(config, in_channels, num_outputs, deep_supervision)
    return as_slices(network) if config.dims == 2 else network


def _build(config: NetworkConfig, in_channels: int, num_outputs: int, deep_supervision: bool | None) -> nn.Module:
    match config:
        case MedNeXtConfig():
            return MedNeXt(
                in_channels,
                num_outputs,
                channels=config.channels,
                expansion_ratio=config.expansion_ratio,
                kernel_size=config.kernel_size,
                decoder_kernel_size=config.decoder_kernel_size,
                block_counts=config.block_counts,
                deep_supervision=config.deep_supervision if deep_supervision is None else deep_supervision,
                norm=config.norm,
                grn=config.grn,
                block_residual=config.block_residual,
                resampling_residual=config.resampling_residual,
                strides=config.strides,
                flat_levels=config.flat_levels,
                spatial_dims=config.spatial_dims,
                checkpointing=config.checkpointing,
            )
        case SegFormer3DConfig():
            return SegFormer3D(in_channels, num_outputs, **_arguments(config))
        case NNFormerConfig():
            return NNFormer(in_channels, num_outputs, **_arguments(config))
        case TransBTSConfig():
            return TransBTS(in_channels, num_outputs, **_arguments(config))
        case UXNetConfig():
            return UXNet(in_channels, num_outputs, **_arguments(config))
        case PlainConvUNetConfig() | ResEncUNetConfig():
            kept = config.deep_supervision if deep_supervision is None else deep_supervision
            return _from_library(config.replace(deep_supervision=kept), in_channels, num_outputs)
        case UNETRConfig() | SwinUNETRConfig():
            return _from_library(config, in_channels, num_outputs)
        case _:
            assert_never(config)


def _arguments(config: NetworkConfig) -> dict[str, Any]:
    """Return what the module takes by name; also the fields that a plan's text leaves out where they are unused."""
    return config.model_dump(exclude={"kind"}, context=EVERY_FIELD)


def _from_library(
    config: PlainConvUNetConfig | ResEncUNetConfig | UNETRConfig | SwinUNETRConfig, in_channels: int, num_outputs: int
) -> nn.Module:
    """Build a network whose modules come from a library, which is imported only now: MONAI takes seconds."""
    arguments = _arguments(config)
    try:
        match config:
            case PlainConvUNetConfig():
                from sagittal.networks.unets import PlainConvUNet

                return PlainConvUNet(in_channels, num_outputs, **arguments)
            case ResEncUNetConfig():
                from sagittal.networks.unets import ResidualEncoderUNet

                return ResidualEncoderUNet(in_channels, num_outputs, **arguments)
            case UNETRConfig():
                from sagittal.networks.monai_networks import UNETR

                return UNETR(in_channels, num_outputs, **arguments)
            case SwinUNETRConfig():
                from sagittal.networks.monai_networks import SwinUNETR

                return SwinUNETR(in_channels, num_outputs, **arguments)
            case _:
                assert_never(config)
    except ImportError as error:
        raise ResourceError(
            f"the network '{config.kind}' is built by a library that can't be imported ({error}). Install the "
            "baselines' libraries: pip install 'sagittal[baselines]'.",
            code="missing_extra",
        ) from error
