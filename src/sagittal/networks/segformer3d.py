"""SegFormer3D: a hierarchical transformer encoder with an all-MLP decoder for medical volumes.

Written from arXiv 2404.10156 (CVPRW 2024), SegFormer (arXiv 2105.15203) and PVT (arXiv 2102.12122); modules bear the
names of the released weights. Tokens are kept as grids (N, D, H, W, C), which are free views of (N, C, D, H, W)
volumes in channels_last_3d, so that linear layers, norms and convolutions follow each other without a copy. Letters: T
tokens (D * H * W), S tokens after the reduction of keys and values, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks.layout import check_input, crop_end, pad_end, to_preferred_layout

AttentionScale = Literal["head_dim", "paper"]

STAGES = 4
_STRIDES = (4, 8, 16, 32)
_PAD_MULTIPLE = 16


class PatchEmbedding(nn.Module):
    """Overlapping strided convolution, then LayerNorm of each token: an axis n becomes ceil(n / stride)."""

    def __init__(self, in_channels: int, width: int, *, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv3d(
            in_channels, width, kernel_size=kernel_size, stride=stride, padding=kernel_size // 2
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map a volume (N, in_channels, D, H, W) to a token grid (N, D', H', W', width)."""
        grid: Tensor = self.norm(self.patch_embeddings(x).movedim(1, -1))
        return grid


class Attention(nn.Module):
    """Self-attention; keys and values come from a grid reduced by `sr_ratio` along each axis (PVT, section 3.3)."""

    def __init__(self, width: int, heads: int, sr_ratio: int, attention_scale: AttentionScale) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.scale = 1 / math.sqrt(heads if attention_scale == "paper" else width // heads)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv3d(width, width, kernel_size=sr_ratio, stride=sr_ratio)
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
    """Depthwise 3x3x3 convolution and BatchNorm on a token grid: the only source of position in the network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(width, width, kernel_size=3, padding=1, groups=width)
        self.bn = nn.BatchNorm3d(width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        # A GPU convolves a channels-last grid channel by channel, which takes many times longer than the copy.
        return batch_norm(self.bn, self.dwconv(to_preferred_layout(grid.movedim(-1, 1)))).movedim(1, -1)


class MixFFN(nn.Module):
    """Linear, depthwise convolution, BatchNorm, GELU, Linear (SegFormer, equation 3, with a BatchNorm)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwiseConvolution(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        result: Tensor = self.fc2(nn.functional.gelu(self.dwconv(self.fc1(grid))))
        return result


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(
        self, width: int, *, heads: int, sr_ratio: int, mlp_ratio: int, attention_scale: AttentionScale
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, sr_ratio, attention_scale)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MixFFN(width, mlp_ratio * width)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to the same shape."""
        grid = grid + self.attention(self.norm1(grid))
        result: Tensor = grid + self.mlp(self.norm2(grid))
        return result


class Encoder(nn.Module):
    """Four stages of patch embedding, transformer blocks and LayerNorm."""

    def __init__(
        self,
        in_channels: int,
        *,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        sr_ratios: Sequence[int],
        mlp_ratios: Sequence[int],
        attention_scale: AttentionScale,
    ) -> None:
        super().__init__()
        inputs = (in_channels, *embed_dims[:-1])
        for stage in range(STAGES):
            embed = PatchEmbedding(
                inputs[stage],
                embed_dims[stage],
                kernel_size=7 if stage == 0 else 3,
                stride=4 if stage == 0 else 2,
            )
            self.add_module(f"embed_{stage + 1}", embed)
        for stage in range(STAGES):
            blocks = [
                TransformerBlock(
                    embed_dims[stage],
                    heads=num_heads[stage],
                    sr_ratio=sr_ratios[stage],
                    mlp_ratio=mlp_ratios[stage],
                    attention_scale=attention_scale,
                )
                for _ in range(depths[stage])
            ]
            self.add_module(f"tf_block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(embed_dims[stage]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map a volume (N, C, D, H, W) to four token grids, finest (1/4) first."""
        grids = []
        for stage in range(1, STAGES + 1):
            grid = self.get_submodule(f"embed_{stage}")(x)
            for block in self.get_submodule(f"tf_block{stage}").children():
                grid = block(grid)
            grid = self.get_submodule(f"norm{stage}")(grid)
            grids.append(grid)
            x = grid.movedim(-1, 1)
        return grids


class StageProjection(nn.Module):
    """Bring a stage's tokens to the decoder's width: Linear, then LayerNorm (called `bn` in the released weights)."""

    def __init__(self, width: int, decoder_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, decoder_dim)
        self.bn = nn.LayerNorm(decoder_dim)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to (N, D, H, W, decoder_dim)."""
        result: Tensor = self.bn(self.proj(grid))
        return result


class Decoder(nn.Module):
    """All-MLP decoder: project every stage, fuse at the finest grid, predict.

    As published, the four maps are upsampled to the finest grid, concatenated and fused by a 1x1x1 convolution. That
    convolution is linear and acts per voxel, so it commutes with the upsampling: each map goes through its own columns
    of the weight at its own grid, and the sum of the upsampled products is the same, at a fraction of the
    multiply-adds.
    """

    def __init__(self, embed_dims: Sequence[int], num_classes: int, decoder_dim: int) -> None:
        super().__init__()
        for stage in reversed(range(STAGES)):
            self.add_module(f"linear_c{stage + 1}", StageProjection(embed_dims[stage], decoder_dim))
        self.linear_fuse = nn.Sequential(
            nn.Conv3d(STAGES * decoder_dim, decoder_dim, kernel_size=1, bias=False),
            nn.BatchNorm3d(decoder_dim),
        )
        self.linear_pred = nn.Conv3d(decoder_dim, num_classes, kernel_size=1)

    def forward(self, grids: Sequence[Tensor]) -> Tensor:
        """Map the encoder's grids, finest first, to logits (N, num_classes, D, H, W) at the finest grid."""
        # The concatenation is in the order of stages 4, 3, 2, 1.
        columns = cast(nn.Conv3d, self.linear_fuse[0]).weight.flatten(1).chunk(STAGES, dim=1)[::-1]
        finest = tuple(grids[0].shape[1:4])
        fused = self._projected(1, grids[0], columns[0])
        for stage in range(2, STAGES + 1):
            coarse = self._projected(stage, grids[stage - 1], columns[stage - 1])
            fused = fused + nn.functional.interpolate(coarse, size=finest, mode="trilinear", align_corners=False)
        fused = nn.functional.relu(batch_norm(cast(nn.BatchNorm3d, self.linear_fuse[1]), fused)).movedim(1, -1)
        return nn.functional.linear(fused, self.linear_pred.weight.flatten(1), self.linear_pred.bias).movedim(-1, 1)

    def _projected(self, stage: int, grid: Tensor, column: Tensor) -> Tensor:
        return nn.functional.linear(self.get_submodule(f"linear_c{stage}")(grid), column).movedim(-1, 1)


class SegFormer3D(nn.Module):
    """SegFormer3D for volumes of any size.

    The network predicts on a grid of ceil(n / 4) and upsamples by four; what exceeds the input is cropped at the end
    of each axis. Only an axis too short for the reduction of keys and values (below 13 voxels with the default ratios)
    is padded first, at its end by edge replication to a multiple of 16.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        embed_dims: width of each of the four stages.
        num_heads: attention heads of each stage; they divide its width.
        depths: transformer blocks of each stage.
        sr_ratios: reduction of keys and values along each axis, per stage.
        mlp_ratios: width of the Mix-FFN as a multiple of the stage's, per stage.
        decoder_dim: width of the decoder.
        attention_scale: divide q.k by the square root of the width of a head ("head_dim") or of the number of heads
            ("paper": what the paper's code did, needed for its released weights).

    Raises:
        PlanError: an argument makes no sense.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (4, 2, 1, 1),
        mlp_ratios: Sequence[int] = (4, 4, 4, 4),
        decoder_dim: int = 256,
        attention_scale: AttentionScale = "head_dim",
    ) -> None:
        super().__init__()
        per_stage = {
            "embed_dims": embed_dims,
            "num_heads": num_heads,
            "depths": depths,
            "sr_ratios": sr_ratios,
            "mlp_ratios": mlp_ratios,
        }
        numbers = {"in_channels": in_channels, "num_classes": num_classes, "decoder_dim": decoder_dim}
        _check_config(per_stage, numbers, attention_scale)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = 3
        self.deep_supervision = False
        self.min_size = max(stride * (ratio - 1) + 1 for stride, ratio in zip(_STRIDES, sr_ratios, strict=True))
        self.segformer_encoder = Encoder(
            in_channels,
            embed_dims=embed_dims,
            num_heads=num_heads,
            depths=depths,
            sr_ratios=sr_ratios,
            mlp_ratios=mlp_ratios,
            attention_scale=attention_scale,
        )
        self.segformer_decoder = Decoder(embed_dims, num_classes, decoder_dim)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, "SegFormer3D")
        sizes = tuple(x.shape[2:])
        x = pad_end(x, tuple(self._padded(size) for size in sizes))
        coarse = self.segformer_decoder(self.segformer_encoder(to_preferred_layout(x)))
        logits = nn.functional.interpolate(coarse.contiguous(), scale_factor=4, mode="trilinear", align_corners=False)
        return crop_end(logits, sizes)

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]

    def _padded(self, size: int) -> int:
        if size >= self.min_size:
            return size
        return -(-self.min_size // _PAD_MULTIPLE) * _PAD_MULTIPLE


def create_segformer3d(
    *,
    in_channels: int,
    num_classes: int,
    attention_scale: AttentionScale = "head_dim",
    decoder_dim: int = 256,
) -> SegFormer3D:
    """Build the network of the paper (arXiv 2404.10156): 4.5 million parameters.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        attention_scale: "head_dim" for new training, "paper" for the paper's released weights; see `SegFormer3D`.
        decoder_dim: width of the decoder.

    Raises:
        PlanError: an argument makes no sense.
    """
    return SegFormer3D(in_channels, num_classes, attention_scale=attention_scale, decoder_dim=decoder_dim)


def batch_norm(norm: nn.BatchNorm3d, x: Tensor) -> Tensor:
    """Apply `norm` to (N, C, D, H, W); one voxel in a batch of one has no variance and gets the running statistics."""
    if norm.training and x.shape[0] * x.shape[2] * x.shape[3] * x.shape[4] == 1:
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
    result: Tensor = norm(x)
    return result


def _initialise(module: nn.Module) -> None:
    """Initialise as the paper's code does: truncated normal linears, fan-out normal convolutions, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_config(per_stage: dict[str, Sequence[int]], numbers: dict[str, int], attention_scale: str) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise PlanError(f"SegFormer3D({name}={number}): expected at least 1.")
    for name, values in per_stage.items():
        if len(values) != STAGES or min(values) < 1:
            raise PlanError(
                f"SegFormer3D({name}={tuple(values)}): expected {STAGES} numbers of at least 1, one per stage."
            )
    for width, heads in zip(per_stage["embed_dims"], per_stage["num_heads"], strict=True):
        if width % heads:
            raise PlanError(
                f"SegFormer3D: a stage of width {width} can't be split into {heads} heads. "
                "Make each of embed_dims a multiple of its num_heads."
            )
    if attention_scale not in ("head_dim", "paper"):
        raise PlanError(
            f"SegFormer3D(attention_scale={attention_scale!r}): "
            "expected 'head_dim' (new training) or 'paper' (released weights)."
        )
