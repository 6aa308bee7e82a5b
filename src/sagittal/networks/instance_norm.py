"""Instance normalisation that also takes a grid of one voxel, where PyTorch's module raises in training.

The baselines halve an image up to five times, so a small one reaches one voxel; its channels have no variance then and
come out as their bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
