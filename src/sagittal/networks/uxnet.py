"""3D UX-Net: a hierarchy of large depthwise kernels in the place of a Swin transformer, with a convolutional decoder.

Written from arXiv 2209.15076 (ICLR 2023). A block does with convolutions what a transformer's does with attention and a
perceptron, each behind a LayerNorm and beside an identity (its equation 2): DWC, a 7x7x7 depthwise convolution, and
DCS, "depth-wise convolution scaling", which widens each channel to four of its own, bends them (GELU) and sums them up
again. The decoder is UNETR's: residual blocks with InstanceNorm and LeakyReLU, transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels import depthwise_conv
from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import check_input, crop_end, pad_to_multiples, to_preferred_layout
from sagittal.networks.mednext_norms import ChannelLayerNorm
from sagittal.networks.norms import InstanceNorm

STAGES = 4
DIVISOR = 16
_EXPANSION = 4
_LEAK = 0.01


class UXBlock(nn.Module):
    """x + DWC(LN(x)), then x + DCS(LN(x)) (arXiv 2209.15076, equation 2)."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(width)
        self.depthwise = nn.Conv3d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm2 = ChannelLayerNorm(width)
        self.widen = nn.Conv3d(width, _EXPANSION * width, kernel_size=1, groups=width)
        self.narrow = nn.Conv3d(_EXPANSION * width, width, kernel_size=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, D, H, W) to the same shape."""
        x = x + depthwise_conv(self.norm1(x), self.depthwise.weight, self.depthwise.bias)
        scaled: Tensor = self.narrow(nn.functional.gelu(self.widen(self.norm2(x))))
        return x + scaled


class Encoder(nn.Module):
    """Four stages of blocks at 1/2, 1/4, 1/8 and 1/16 of the image's resolution."""

    def __init__(self, in_channels: int, feature_sizes: Sequence[int], depths: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        steps: list[nn.Module] = [
            nn.Conv3d(in_channels, feature_sizes[0], kernel_size=7, stride=2, padding=3),
            *(
                nn.Sequential(ChannelLayerNorm(fine), nn.Conv3d(fine, coarse, kernel_size=2, stride=2))
                for fine, coarse in pairwise(feature_sizes)
            ),
        ]
        self.downsample = nn.ModuleList(steps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(UXBlock(width, kernel_size) for _ in range(depth)))
            for width, depth in zip(feature_sizes, depths, strict=True)
        )
        self.norms = nn.ModuleList(ChannelLayerNorm(width) for width in feature_sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map an image whose axes are multiples of 16 to the four stages' features, finest first."""
        features = []
        for downsample, stage, norm in zip(self.downsample, self.stages, self.norms, strict=True):
            x = stage(downsample(x))
            features.append(norm(x))
        return features


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with InstanceNorm beside an identity, or a 1x1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = InstanceNorm(out_channels)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False), InstanceNorm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, D, H, W)."""
        y = nn.functional.leaky_relu(self.norm1(self.conv1(x)), _LEAK)
        return nn.functional.leaky_relu(self.norm2(self.conv2(y)) + self.skip(x), _LEAK)


class UpBlock(nn.Module):
    """Double the resolution by a transposed convolution, put the skip beside it, mix by a residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        self.mix = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) and a skip (N, out_channels, 2D, 2H, 2W) to the skip's shape."""
        mixed: Tensor = self.mix(torch.cat((self.upsample(x), skip), dim=1))
        return mixed


class UXNet(nn.Module):
    """3D UX-Net for volumes of any size.

    An axis is padded at its end, by edge replication, to a multiple of 16; the logits are cropped.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        feature_sizes: widths of the encoder's stages; the first is the decoder's at full resolution too.
        depths: blocks of each stage.
        kernel_size: edge of the depthwise kernels, odd.
        hidden_size: width of the bottleneck.

    Raises:
        PlanError: an argument makes no sense.
    """

    encoder_prefixes = ("encoder.",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature_sizes: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 2),
        kernel_size: int = 7,
        hidden_size: int = 768,
    ) -> None:
        super().__init__()
        _check_config(feature_sizes, depths, kernel_size, (in_channels, num_classes, hidden_size))
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = 3
        self.deep_supervision = False
        self.encoder = Encoder(in_channels, feature_sizes, depths, kernel_size)
        # What stands at 1, 1/2, 1/4, 1/8 and 1/16: the image and the encoder's stages, each widened.
        widths = (*feature_sizes, hidden_size)
        self.skips = nn.ModuleList(
            ResidualBlock(inputs, outputs)
            for inputs, outputs in zip((in_channels, *feature_sizes), widths, strict=True)
        )
        self.ups = nn.ModuleList(UpBlock(coarse, fine) for fine, coarse in pairwise(widths))
        self.finest = ResidualBlock(widths[0], widths[0])
        self.head = nn.Conv3d(widths[0], num_classes, kernel_size=1)

    @in_float32_on_cpus
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, "3D UX-Net")
        sizes = tuple(x.shape[2:])
        x = to_preferred_layout(pad_to_multiples(x, (DIVISOR,) * 3))
        features = [skip(level) for skip, level in zip(self.skips, (x, *self.encoder(x)), strict=True)]
        y = features.pop()
        for up in reversed(self.ups):
            y = up(y, features.pop())
        return crop_end(self.head(self.finest(y)), sizes)

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]


def _check_config(
    feature_sizes: Sequence[int], depths: Sequence[int], kernel_size: int, numbers: tuple[int, int, int]
) -> None:
    for name, values in (("feature_sizes", feature_sizes), ("depths", depths)):
        if len(values) != STAGES or min(values) < 1:
            raise PlanError(f"UXNet({name}={tuple(values)}): expected {STAGES} numbers of at least 1, one per stage.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise PlanError(f"UXNet(kernel_size={kernel_size}): expected an odd number, so that the grid keeps its size.")
    if min(numbers) < 1:
        raise PlanError(f"UXNet: in_channels, num_classes, hidden_size = {numbers}: expected each to be at least 1.")
