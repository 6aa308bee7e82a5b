"""Fused building blocks, each with its plain PyTorch twin; knows nothing of networks."""

from sagittal.kernels.bf16 import cpu_bf16_reason
from sagittal.kernels.block import TailWeights, expand_contract, mednext_block, mednext_up_block
from sagittal.kernels.channel_norm import normalise_channels
from sagittal.kernels.depthwise import depthwise_conv, depthwise_conv_transpose
from sagittal.kernels.native import cpu_available, keep_freed_memory
from sagittal.kernels.pointwise_conv import pointwise, prefers_channels_last

__all__ = [
    "TailWeights",
    "cpu_available",
    "cpu_bf16_reason",
    "depthwise_conv",
    "depthwise_conv_transpose",
    "expand_contract",
    "keep_freed_memory",
    "mednext_block",
    "mednext_up_block",
    "normalise_channels",
    "pointwise",
    "prefers_channels_last",
]
