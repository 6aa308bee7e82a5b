"""Networks that predict in bfloat16 or float16: which of their tensors stay in float32.

A network computes in the dtype of what it is given, so its weights are converted, and no autocast converts them again
at each call. Norms sum in float32 whatever their input is, in PyTorch's operators and in the kernels. What is kept:
BatchNorms, which become part of the weights in float32 before those are rounded, and the last layer of MedNeXt and
SegFormer3D, whose logits bfloat16 would round to three digits: classes that are close would tie.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagittal.networks.mednext import MedNeXtHead
from sagittal.networks.segformer3d_decoder import Decoder


def to_half_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network for prediction, in place, and return it.

    Args:
        network: in float32; afterwards it takes images of `dtype`, and MedNeXt and SegFormer3D give float32 logits.
        dtype: torch.bfloat16 or torch.float16.
    """
    kept: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            kept.add(module)
        elif isinstance(module, MedNeXtHead):
            kept.add(module.conv_out)
        elif isinstance(module, Decoder):
            kept.add(module.linear_pred)
    for module in network.modules():
        if module in kept:
            continue
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return network
