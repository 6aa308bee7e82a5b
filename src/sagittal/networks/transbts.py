"""TransBTS: a 3D U-Net whose coarsest level is a transformer over all of its voxels.

Written from arXiv 2103.04430. Three strided convolutions bring the image to an eighth of its size; there a transformer
of learned position embeddings mixes all tokens. Every level is ceil(n / 2) of the one before and every upsampled level
is cropped to its skip's size, so that any size goes through without padding. Letters: T tokens (d * h * w), h heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import Size, check_input, crop_end, divide_up, to_preferred_layout, triple
from sagittal.networks.norms import normalise

_GROUPS = 8
_DOWNSAMPLINGS = 3
_ENCODER_BLOCKS = (1, 2, 2, 4)


class EncoderBlock(nn.Module):
    """Residual block of two convolutions, each after GroupNorm of eight groups and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv1 = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, width)
        self.conv2 = nn.Conv3d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, D, H, W) to the same shape."""
        branch = self.conv1(nn.functional.relu(normalise(self.norm1, x)))
        result: Tensor = x + self.conv2(nn.functional.relu(normalise(self.norm2, branch)))
        return result


class DecoderBlock(nn.Module):
    """Two convolutions, each followed by BatchNorm and ReLU; residual where the width stays the same."""

    def __init__(self, in_width: int, width: int, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = nn.Conv3d(in_width, width, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_width, D, H, W) to (N, width, D, H, W)."""
        branch = nn.functional.relu(normalise(self.norm1, self.conv1(x)))
        branch = nn.functional.relu(normalise(self.norm2, self.conv2(branch)))
        return x + branch if self.residual else branch


class Upsampling(nn.Module):
    """Halve the channels, double the size by a transposed convolution, fuse with the skip by a 1x1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.reduction = nn.Conv3d(width, half, kernel_size=1)
        self.expansion = nn.ConvTranspose3d(half, half, kernel_size=2, stride=2)
        self.fusion = nn.Conv3d(2 * half, half, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, C, d, h, w) and a skip (N, C / 2, D, H, W), of at most twice the size, to the skip's shape."""
        depth, height, width = skip.shape[2:]
        doubled = self.expansion(self.reduction(x))[:, :, :depth, :height, :width]
        result: Tensor = self.fusion(torch.cat([skip, doubled], dim=1))
        return result


class TransformerLayer(nn.Module):
    """Pre-norm layer: x + attention(norm1 x), then x + mlp(norm2 x). Attention's projections in have no bias."""

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (N, T, C) to the same shape."""
        tokens = tokens + self._dropped(self._mixed(self.norm1(tokens)))
        hidden = self._dropped(nn.functional.gelu(self.fc1(self.norm2(tokens))))
        return tokens + self._dropped(self.fc2(hidden))

    def _mixed(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        packed = self.query_key_value(tokens).reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        chance = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=chance)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        return result

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class Bottleneck(nn.Module):
    """The coarsest level as tokens: embedding by a convolution, learned positions, transformer layers, and back."""

    def __init__(
        self, width: int, embed_dim: int, grid: Size, *, depth: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.BatchNorm3d(width)
        self.embedding = nn.Conv3d(width, embed_dim, kernel_size=3, padding=1)
        # Five axes, the last three of space, like a convolution's kernel.
        self.positions = nn.Parameter(torch.zeros(1, embed_dim, *grid))
        self.layers = nn.Sequential(
            *(TransformerLayer(embed_dim, heads=heads, hidden=hidden, dropout=dropout) for _ in range(depth))
        )
        self.reduction = DecoderBlock(embed_dim, width, residual=False)
        self.refinement = DecoderBlock(width, width, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, d, h, w) to the same shape."""
        x = self.embedding(nn.functional.relu(normalise(self.norm, x)))
        sizes = x.shape[2:]
        positions: Tensor = self.positions
        if positions.shape[2:] != sizes:
            positions = nn.functional.interpolate(positions, size=sizes, mode="trilinear", align_corners=False)
        tokens = (x + positions).flatten(2).transpose(1, 2)
        tokens = self.layers(nn.functional.dropout(tokens, self.dropout, self.training))
        mixed = tokens.transpose(1, 2).unflatten(2, sizes)
        result: Tensor = self.refinement(self.reduction(mixed))
        return result


class TransBTS(nn.Module):
    """TransBTS for volumes of any size.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        base_channels: width of the finest level; it doubles at each of the three coarser ones. A multiple of 8.
        embed_dim: width of the transformer.
        depth: layers of the transformer.
        num_heads: attention heads; they divide `embed_dim`.
        hidden_dim: hidden width of the transformer's MLPs.
        input_size: D, H, W of the patches that the position embeddings are made for, one per token of 8 x 8 x 8 voxels;
            at other sizes they are interpolated.
        dropout: chance of dropout in the transformer.

    Raises:
        PlanError: an argument makes no sense.
    """

    encoder_prefixes = (
        "stem.",
        "encoder.",
        "downsamplings.",
        "bottleneck.norm.",
        "bottleneck.embedding.",
        "bottleneck.positions",
        "bottleneck.layers.",
    )

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        base_channels: int = 16,
        embed_dim: int = 512,
        depth: int = 4,
        num_heads: int = 8,
        hidden_dim: int = 4096,
        input_size: Sequence[int] = (128, 128, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        numbers = {"in_channels": in_channels, "num_classes": num_classes, "depth": depth, "hidden_dim": hidden_dim}
        _check_config(numbers, base_channels, embed_dim, num_heads, input_size, dropout)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = 3
        self.deep_supervision = False
        widths = [base_channels * 2**level for level in range(len(_ENCODER_BLOCKS))]
        grid = triple(divide_up(size, 2**_DOWNSAMPLINGS) for size in input_size)
        self.stem = nn.Conv3d(in_channels, base_channels, kernel_size=3, padding=1)
        self.encoder = nn.ModuleList(
            nn.Sequential(*(EncoderBlock(width) for _ in range(blocks)))
            for width, blocks in zip(widths, _ENCODER_BLOCKS, strict=True)
        )
        self.downsamplings = nn.ModuleList(
            nn.Conv3d(width, 2 * width, kernel_size=3, stride=2, padding=1) for width in widths[:-1]
        )
        self.bottleneck = Bottleneck(
            widths[-1], embed_dim, grid, depth=depth, heads=num_heads, hidden=hidden_dim, dropout=dropout
        )
        self.upsamplings = nn.ModuleList(Upsampling(width) for width in widths[:0:-1])
        self.decoder = nn.ModuleList(DecoderBlock(width, width, residual=True) for width in widths[-2::-1])
        self.head = nn.Conv3d(base_channels, num_classes, kernel_size=1)

    @in_float32_on_cpus
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, "TransBTS")
        sizes = tuple(x.shape[2:])
        x = self.encoder[0](self.stem(to_preferred_layout(x)))
        skips: list[Tensor] = []
        for downsampling, level in zip(self.downsamplings, self.encoder[1:], strict=True):
            skips.append(x)
            x = level(downsampling(x))
        x = self.bottleneck(x)
        for upsampling, block in zip(self.upsamplings, self.decoder, strict=True):
            x = block(upsampling(x, skips.pop()))
        return crop_end(self.head(x), sizes)

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]


def _check_config(
    numbers: dict[str, int],
    base_channels: int,
    embed_dim: int,
    num_heads: int,
    input_size: Sequence[int],
    dropout: float,
) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise PlanError(f"TransBTS({name}={number}): expected at least 1.")
    if base_channels < 1 or base_channels % _GROUPS:
        raise PlanError(
            f"TransBTS(base_channels={base_channels}): expected a multiple of {_GROUPS}, the groups of its GroupNorm."
        )
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise PlanError(
            f"TransBTS: a transformer of width {embed_dim} can't be split into {num_heads} heads. "
            "Make embed_dim a multiple of num_heads."
        )
    if len(input_size) != 3 or min(input_size) < 1:
        raise PlanError(f"TransBTS(input_size={tuple(input_size)}): expected three sizes, D, H, W, of at least 1.")
    if not 0 <= dropout < 1:
        raise PlanError(f"TransBTS(dropout={dropout}): expected a chance of at least 0 and below 1.")
