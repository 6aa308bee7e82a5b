"""From a configuration to a module: the only file of this room that knows the plan."""

from __future__ import annotations

from typing import assert_never

from torch import nn

from sagittal.networks.mednext import MedNeXt
from sagittal.networks.segformer3d import SegFormer3D
from sagittal.plan.networks import MedNeXtConfig, NetworkConfig, SegFormer3DConfig


def build_network(
    config: NetworkConfig, in_channels: int, num_outputs: int, deep_supervision: bool | None = None
) -> nn.Module:
    """Build the network that `config` describes, freshly initialised from torch's global generator.

    Args:
        config: a network's configuration, for example `network_config("mednext-s")`.
        in_channels: channels of the image.
        num_outputs: channels of the logits: classes with the background, or regions.
        deep_supervision: override the configuration's; None keeps it. Networks of one scale ignore it.

    Raises:
        PlanError: the configuration makes no sense.
    """
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
            return SegFormer3D(
                in_channels,
                num_outputs,
                embed_dims=config.embed_dims,
                num_heads=config.num_heads,
                depths=config.depths,
                sr_ratios=config.sr_ratios,
                mlp_ratios=config.mlp_ratios,
                decoder_dim=config.decoder_dim,
                attention_scale=config.attention_scale,
            )
        case _:
            assert_never(config)
