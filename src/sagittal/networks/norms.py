"""Norms of volumes that also take a single voxel, where PyTorch's modules raise in training.

Networks halve an image up to five times, so a small one reaches one voxel; its channels have no variance then. Instance
and group norms give the bias, batch norms use their running statistics.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagittal.kernels import choice, native

VolumeNorm = Literal["batch", "group"]

_GROUPS = 32
_CHANNELS_PER_GROUP = 4


class InstanceNorm(nn.InstanceNorm3d):
    """Normalise each channel of each case over space, without running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, D, H, W); one voxel gives the bias, or 0 without one."""
        # The functional form behind the module refuses one voxel; the operator behind that one does not.
        return torch.instance_norm(
            x, self.weight, self.bias, None, None, True, self.momentum or 0.0, self.eps, torch.backends.cudnn.enabled
        )


def replace_instance_norms(network: nn.Module) -> None:
    """Put an `InstanceNorm` in the place of each `nn.InstanceNorm3d` of a library's network, with its weights."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm3d) and not isinstance(child, InstanceNorm):
                norm = InstanceNorm(child.num_features, eps=child.eps, affine=child.affine)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)


def volume_norm(norm: VolumeNorm, channels: int, spatial_dims: int) -> nn.Module:
    """Return a BatchNorm, or a GroupNorm, which does not look at the batch; `normalise` applies either.

    GroupNorm has the most groups out of 32, 16, 8, 4, 2 that divide the channels and leave at least four in each, else
    one (Wu and He, arXiv 1803.08494, take 32): 32 groups for all widths of the published SegFormer3D.
    """
    if norm == "batch":
        return nn.BatchNorm3d(channels) if spatial_dims == 3 else nn.BatchNorm2d(channels)
    groups = math.gcd(_GROUPS, channels)
    while groups > 1 and channels // groups < _CHANNELS_PER_GROUP:
        groups //= 2
    return nn.GroupNorm(groups, channels)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm or GroupNorm to (N, C, ...)."""
    if isinstance(norm, nn.GroupNorm):
        return torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, _BatchNorm)
    # A subclass that adds up statistics over processes must not be passed by: the others wait for it.
    if norm.training and x.numel() == x.shape[1] and type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
    result: Tensor = norm(x)
    return result


def folds(norm: nn.Module, *tensors: Tensor) -> bool:
    """Tell whether `norm` may become part of the weights before it: a BatchNorm at inference, eagerly, on a CPU or
    where the GPU kernels compute.

    Elsewhere the operators stay as they are written, for autograd, compilers and exported graphs.
    """
    if norm.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(norm, _BatchNorm):
        return False
    read = (*tensors, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return native.eager(*read) or choice.way(tensors[0], *read) == "eager"


def folded(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (C,) each, of a BatchNorm with its running statistics."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
