"""The parts of SegFormer3D's encoder: patch embedding, attention, Mix-FFN, transformer block.

Written from arXiv 2404.10156 (CVPRW 2024), SegFormer (arXiv 2105.15203) and PVT (arXiv 2102.12122); modules bear the
names of the released weights. Tokens are kept as grids (N, D, H, W, C), which are free views of (N, C, D, H, W)
volumes in channels_last_3d, so that linear layers, norms and convolutions follow each other without a copy; in 2D there
is no D. Letters: T tokens (D * H * W), S tokens after the reduction of keys and values, h heads.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sagittal.kernels import depthwise_conv, prefers_channels_last
from sagittal.networks.layout import convolution_class, to_preferred_layout
from sagittal.networks.norms import VolumeNorm, folded, folds, normalise, volume_norm

AttentionScale = Literal["head_dim", "paper"]


class PatchEmbedding(nn.Module):
    """Overlapping strided convolution, then LayerNorm of each token: an axis n becomes ceil(n / stride)."""

    def __init__(self, in_channels: int, width: int, *, kernel_size: int, stride: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.patch_embeddings = convolution_class(spatial_dims)(
            in_channels, width, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map a volume (N, in_channels, D, H, W) to a token grid (N, D', H', W', width)."""
        kernel = self.patch_embeddings.weight
        if not prefers_channels_last(x) or kernel.numel() > x.numel():
            # PyTorch copies the kernel into the layout of the volume at every call: the smaller of the two gives way.
            x = x.contiguous()
        grid: Tensor = self.norm(self.patch_embeddings(x).movedim(1, -1))
        return grid


class Attention(nn.Module):
    """Self-attention; keys and values come from a grid reduced by `sr_ratio` along each axis (PVT, section 3.3)."""

    def __init__(
        self, width: int, heads: int, sr_ratio: int, attention_scale: AttentionScale, spatial_dims: int = 3
    ) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.scale = 1 / math.sqrt(heads if attention_scale == "paper" else width // heads)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = convolution_class(spatial_dims)(width, width, kernel_size=sr_ratio, stride=sr_ratio)
            self.sr_norm = nn.LayerNorm(width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map a token grid (N, D, H, W, C) to one of the same shape; every axis needs at least `sr_ratio` tokens."""
        shape = grid.shape
        query = self._heads(self.query(grid))
        if self.sr_ratio > 1:
            grid = self.sr_norm(self.sr(grid.movedim(-1, 1)).movedim(1, -1))
        key, value = (self._heads(half) for half in self.key_value(grid).chunk(2, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(shape))
        return result

    def _heads(self, grid: Tensor) -> Tensor:
        """Split (N, D, H, W, C) into (N, h, T, C / h)."""
        return grid.reshape(grid.shape[0], -1, self.heads, self.width // self.heads).transpose(1, 2)


class DepthwiseConvolution(nn.Module):
    """Depthwise 3x3x3 convolution and a norm on a token grid: the only source of position in the network."""

    def __init__(self, width: int, *, norm: VolumeNorm = "batch", spatial_dims: int = 3) -> None:
        super().__init__()
        self.dwconv = convolution_class(spatial_dims)(width, width, kernel_size=3, padding=1, groups=width)
        self.bn = volume_norm(norm, width, spatial_dims)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        # A GPU convolves a channels-last grid channel by channel, which takes many times longer than the copy.
        volume = to_preferred_layout(grid.movedim(-1, 1))
        weight, bias = self.dwconv.weight, self.dwconv.bias
        assert bias is not None
        if folds(self.bn, volume, weight, bias):
            scale, shift = folded(self.bn)
            kernel = (weight * scale.view(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype)
            return depthwise_conv(volume, kernel, torch.addcmul(shift, bias, scale).to(bias.dtype)).movedim(1, -1)
        return normalise(self.bn, depthwise_conv(volume, weight, bias)).movedim(1, -1)


class MixFFN(nn.Module):
    """Linear, depthwise convolution, norm, GELU, Linear (SegFormer, equation 3, with a BatchNorm)."""

    def __init__(self, width: int, hidden: int, *, norm: VolumeNorm = "batch", spatial_dims: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwiseConvolution(hidden, norm=norm, spatial_dims=spatial_dims)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        result: Tensor = self.fc2(nn.functional.gelu(self.dwconv(self.fc1(grid))))
        return result


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        sr_ratio: int,
        mlp_ratio: int,
        attention_scale: AttentionScale,
        norm: VolumeNorm = "batch",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, sr_ratio, attention_scale, spatial_dims)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MixFFN(width, mlp_ratio * width, norm=norm, spatial_dims=spatial_dims)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        grid = grid + self.attention(self.norm1(grid))
        result: Tensor = grid + self.mlp(self.norm2(grid))
        return result
