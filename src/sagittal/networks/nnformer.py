"""nnFormer: a U-shaped transformer with windowed self-attention and attention in place of skip concatenation.

Written from arXiv 2109.03201, with the shifted windows, masks and relative positions of Swin (arXiv 2103.14030) that it
builds on. Tokens are kept as grids (N, D, H, W, C), free views of volumes (N, C, D, H, W) in channels_last_3d. Every
grid is ceil(n / stride) of the one before and every upsampled grid is cropped to its skip's, so that any size goes
through without padding the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import Size, check_input, crop_end, to_preferred_layout, triple
from sagittal.networks.window_attention import WindowAttention

STAGES = 4


@dataclass(frozen=True)
class Stage:
    """What the blocks of a stage have in common."""

    width: int
    heads: int
    window: Size
    mlp_ratio: int


class PatchEmbedding(nn.Module):
    """Four 3x3x3 convolutions, two of them strided, each followed by GELU and LayerNorm but the last by LayerNorm only.

    An axis n becomes ceil(n / patch). A patch of 4 is two strides of 2, a patch of 2 one, a patch of 1 none.
    """

    def __init__(self, in_channels: int, width: int, patch_size: Size) -> None:
        super().__init__()
        first = triple(min(patch, 2) for patch in patch_size)
        second = triple(patch // stride for patch, stride in zip(patch_size, first, strict=True))
        half = width // 2
        channels = (in_channels, half, half, width, width)
        self.convs = nn.ModuleList(
            nn.Conv3d(before, after, kernel_size=3, stride=stride, padding=1)
            for (before, after), stride in zip(pairwise(channels), (first, (1, 1, 1), second, (1, 1, 1)), strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channel) for channel in channels[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map a volume (N, in_channels, D, H, W) to a token grid (N, D', H', W', width)."""
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            grid = conv(x).movedim(1, -1)
            grid = norm(grid if index == last else nn.functional.gelu(grid))
            x = grid.movedim(-1, 1)
        return x.movedim(1, -1)


class MLP(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class TransformerBlock(nn.Module):
    """Pre-norm block of windowed self-attention: x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, stage: Stage, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.shifted = shifted
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(stage.width)
        self.query_key_value = nn.Linear(stage.width, 3 * stage.width)
        self.attention = WindowAttention(stage.width, stage.heads, stage.window)
        self.norm2 = nn.LayerNorm(stage.width)
        self.mlp = MLP(stage.width, stage.mlp_ratio * stage.width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map a token grid (N, D, H, W, C) to one of the same shape."""
        mixed = self.attention(self.query_key_value(self.norm1(grid)), shifted=self.shifted)
        grid = grid + drop_path(mixed, self.drop_path, self.training)
        return grid + drop_path(self.mlp(self.norm2(grid)), self.drop_path, self.training)


class SkipAttentionBlock(nn.Module):
    """Block in which upsampled tokens ask and the encoder's tokens answer (the paper's skip attention).

    The queries are the normed upsampled tokens themselves; only keys and values are projected. What attention finds is
    added to the sum of both grids.
    """

    def __init__(self, stage: Stage, *, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(stage.width)
        self.key_value = nn.Linear(stage.width, 2 * stage.width)
        self.attention = WindowAttention(stage.width, stage.heads, stage.window)
        self.norm2 = nn.LayerNorm(stage.width)
        self.mlp = MLP(stage.width, stage.mlp_ratio * stage.width)

    def forward(self, grid: Tensor, skip: Tensor) -> Tensor:
        """Map upsampled tokens and the encoder's, both (N, D, H, W, C), to one grid of that shape."""
        key_value = self.key_value(self.norm1(skip))
        packed = torch.cat([self.norm1(grid).to(key_value.dtype), key_value], dim=-1)
        mixed = self.attention(packed, shifted=False)
        grid = grid + skip + drop_path(mixed, self.drop_path, self.training)
        return grid + drop_path(self.mlp(self.norm2(grid)), self.drop_path, self.training)


class Downsampling(nn.Module):
    """GELU, LayerNorm and a strided convolution, of kernel 3 along strided axes and 1 along the others."""

    def __init__(self, width: int, stride: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        kernel = triple(3 if step > 1 else 1 for step in stride)
        self.conv = nn.Conv3d(
            width, 2 * width, kernel_size=kernel, stride=stride, padding=triple(length // 2 for length in kernel)
        )

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to (N, ceil(D / stride), ..., 2 * C)."""
        volume: Tensor = self.conv(self.norm(nn.functional.gelu(grid)).movedim(-1, 1))
        return volume.movedim(1, -1)


class Upsampling(nn.Module):
    """LayerNorm and a transposed convolution whose kernel is its stride."""

    def __init__(self, width: int, stride: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.ConvTranspose3d(width, width // 2, kernel_size=stride, stride=stride)

    def forward(self, grid: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map (N, D, H, W, C) to (N, *sizes, C / 2), cropping what a multiple of the stride has too much."""
        volume: Tensor = self.conv(self.norm(grid).movedim(-1, 1))
        depth, height, width = sizes
        return volume.movedim(1, -1)[:, :depth, :height, :width]


class EncoderStage(nn.Module):
    """Transformer blocks, every second of them with shifted windows, and the norm of what the decoder gets."""

    def __init__(self, stage: Stage, rates: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(TransformerBlock(stage, shifted=index % 2 == 1, drop_path=rate) for index, rate in enumerate(rates))
        )
        self.norm = nn.LayerNorm(stage.width)

    def forward(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Map a grid (N, D, H, W, C) to what goes down and what goes across, both of the same shape."""
        grid = self.blocks(grid)
        return grid, self.norm(grid)


class DecoderStage(nn.Module):
    """Upsampling, attention to the skip, then the other transformer blocks of the stage."""

    def __init__(self, stage: Stage, stride: Size, rates: Sequence[float]) -> None:
        super().__init__()
        self.upsampling = Upsampling(2 * stage.width, stride)
        self.skip_attention = SkipAttentionBlock(stage, drop_path=rates[0])
        self.blocks = nn.Sequential(
            *(TransformerBlock(stage, shifted=index % 2 == 0, drop_path=rate) for index, rate in enumerate(rates[1:]))
        )

    def forward(self, grid: Tensor, skip: Tensor) -> Tensor:
        """Map a coarse grid (N, d, h, w, 2 * C) and a skip (N, D, H, W, C) to a grid of the skip's shape."""
        result: Tensor = self.blocks(self.skip_attention(self.upsampling(grid, skip.shape[1:4]), skip))
        return result


class NNFormer(nn.Module):
    """nnFormer for volumes of any size, with one output.

    The paper trains with two coarser outputs besides; their heads are left out.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        embed_dim: width of the finest stage; it doubles at each of the three coarser ones. Even.
        depths: transformer blocks of each stage; the decoder has as many at its three stages, the first of which
            attends to the skip. Every second block shifts its windows.
        num_heads: attention heads of each stage; they divide its width.
        patch_size: voxels of a token along D, H, W: 1, 2 or 4.
        windows: tokens of a window along D, H, W, per stage.
        strides: 1 or 2 along D, H, W, between one stage and the next.
        mlp_ratio: hidden width of the MLPs as a multiple of the stage's.
        drop_path: chance to leave out a branch of the last block in training; it rises from 0 at the first block, in
            the encoder and again in the decoder.

    Raises:
        PlanError: an argument makes no sense.
    """

    encoder_prefixes = ("embedding.", "encoder.", "downsamplings.")

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        embed_dim: int = 192,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        patch_size: Size = (2, 4, 4),
        windows: Sequence[Size] = ((4, 4, 4), (4, 4, 4), (8, 8, 8), (4, 4, 4)),
        strides: Sequence[Size] = ((2, 2, 2), (2, 2, 2), (2, 2, 2)),
        mlp_ratio: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        numbers = {"in_channels": in_channels, "num_classes": num_classes, "mlp_ratio": mlp_ratio}
        _check_config(numbers, embed_dim, depths, num_heads, drop_path)
        _check_grids(patch_size, windows, strides)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = 3
        self.deep_supervision = False
        stages = [
            Stage(embed_dim * 2**index, num_heads[index], triple(windows[index]), mlp_ratio) for index in range(STAGES)
        ]
        self.embedding = PatchEmbedding(in_channels, embed_dim, triple(patch_size))
        self.encoder = nn.ModuleList(
            EncoderStage(stage, rates) for stage, rates in zip(stages, drop_path_rates(depths, drop_path), strict=True)
        )
        self.downsamplings = nn.ModuleList(
            Downsampling(stage.width, triple(stride)) for stage, stride in zip(stages[:-1], strides, strict=True)
        )
        coarse_to_fine = drop_path_rates(depths[-2::-1], drop_path)
        self.decoder = nn.ModuleList(
            DecoderStage(stage, triple(stride), rates)
            for stage, stride, rates in zip(stages[-2::-1], strides[::-1], coarse_to_fine, strict=True)
        )
        self.expansion = nn.ConvTranspose3d(embed_dim, num_classes, kernel_size=patch_size, stride=patch_size)
        self.apply(_initialise)

    @in_float32_on_cpus
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, "nnFormer")
        grid = self.embedding(to_preferred_layout(x))
        skips: list[Tensor] = []
        for index, stage in enumerate(self.encoder):
            if index > 0:
                grid = self.downsamplings[index - 1](grid)
            grid, skip = stage(grid)
            skips.append(skip)
        grid = skips.pop()
        for stage in self.decoder:
            grid = stage(grid, skips.pop())
        return crop_end(self.expansion(grid.movedim(-1, 1)), tuple(x.shape[2:]))

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Leave out a residual branch (N, ...) of each case with chance `rate` in training; others are scaled up for it."""
    if not training or rate == 0:
        return branch
    keep = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) >= rate
    return branch * (keep / (1 - rate)).to(branch.dtype)


def drop_path_rates(depths: Sequence[int], highest: float) -> list[list[float]]:
    """Return the rate of each block of each stage, rising evenly from 0 to `highest` (stochastic depth)."""
    blocks = sum(depths)
    rates = [highest * block / max(blocks - 1, 1) for block in range(blocks)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


def _initialise(module: nn.Module) -> None:
    """Initialise linear layers as Swin does; convolutions keep PyTorch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _check_config(
    numbers: dict[str, int], embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], drop_path: float
) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise PlanError(f"nnFormer({name}={number}): expected at least 1.")
    for name, values in {"depths": depths, "num_heads": num_heads}.items():
        if len(values) != STAGES or min(values) < 1:
            raise PlanError(
                f"nnFormer({name}={tuple(values)}): expected {STAGES} numbers of at least 1, one per stage."
            )
    if embed_dim < 2 or embed_dim % 2:
        raise PlanError(f"nnFormer(embed_dim={embed_dim}): expected an even number: the first convolutions have half.")
    for stage, heads in enumerate(num_heads):
        if embed_dim * 2**stage % heads:
            raise PlanError(
                f"nnFormer: a stage of width {embed_dim * 2**stage} can't be split into {heads} heads. "
                "Make each stage's width, embed_dim * 2^stage, a multiple of its num_heads."
            )
    if not 0 <= drop_path < 1:
        raise PlanError(f"nnFormer(drop_path={drop_path}): expected a chance of at least 0 and below 1.")


def _check_grids(patch_size: Sequence[int], windows: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> None:
    if len(patch_size) != 3 or not set(patch_size) <= {1, 2, 4}:
        raise PlanError(f"nnFormer(patch_size={tuple(patch_size)}): expected 1, 2 or 4 along D, H, W.")
    if len(windows) != STAGES or any(len(window) != 3 or min(window) < 1 for window in windows):
        raise PlanError(f"nnFormer(windows={tuple(windows)}): expected {STAGES} windows of three lengths.")
    if len(strides) != STAGES - 1 or any(len(stride) != 3 or not set(stride) <= {1, 2} for stride in strides):
        raise PlanError(f"nnFormer(strides={tuple(strides)}): expected {STAGES - 1} strides of 1 or 2 along D, H, W.")
