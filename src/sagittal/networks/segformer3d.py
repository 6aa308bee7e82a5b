"""SegFormer3D: a hierarchical transformer encoder with an all-MLP decoder for medical volumes.

Written from arXiv 2404.10156 (CVPRW 2024), SegFormer (arXiv 2105.15203) and PVT (arXiv 2102.12122); modules bear the
names of the released weights. The parts are in `segformer3d_blocks` and `segformer3d_decoder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import check_input, pad_end, round_up
from sagittal.networks.norms import VolumeNorm
from sagittal.networks.segformer3d_blocks import AttentionScale, PatchEmbedding, TransformerBlock
from sagittal.networks.segformer3d_decoder import STAGES, Decoder, upsample_logits

_STRIDES = (4, 8, 16, 32)
_PAD_MULTIPLE = 16


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
        norm: VolumeNorm,
        spatial_dims: int,
    ) -> None:
        super().__init__()
        inputs = (in_channels, *embed_dims[:-1])
        for stage in range(STAGES):
            embed = PatchEmbedding(
                inputs[stage],
                embed_dims[stage],
                kernel_size=7 if stage == 0 else 3,
                stride=4 if stage == 0 else 2,
                spatial_dims=spatial_dims,
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
                    norm=norm,
                    spatial_dims=spatial_dims,
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
        norm: in the Mix-FFN and the decoder: "batch", as published, or "group" for batches too small for statistics;
            tensors have the same names, but for BatchNorm's running statistics.
        spatial_dims: 3 (volumes) or 2 (slices: every kernel, grid and reduction loses an axis).

    Raises:
        PlanError: an argument makes no sense.
    """

    encoder_prefixes = ("segformer_encoder.",)

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
        norm: VolumeNorm = "batch",
        spatial_dims: int = 3,
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
        _check_config(per_stage, numbers)
        _check_choice("attention_scale", attention_scale, "'head_dim' (new training) or 'paper' (released weights)")
        _check_choice("norm", norm, "'batch' (as published) or 'group' (small batches)")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
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
            norm=norm,
            spatial_dims=spatial_dims,
        )
        self.segformer_decoder = Decoder(embed_dims, num_classes, decoder_dim, norm=norm, spatial_dims=spatial_dims)
        self.apply(_initialise)

    @in_float32_on_cpus
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        In 2D there is no D.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, "SegFormer3D")
        sizes = tuple(x.shape[2:])
        x = pad_end(x, tuple(self._padded(size) for size in sizes))
        coarse = self.segformer_decoder(self.segformer_encoder(x.contiguous()))
        return upsample_logits(coarse, _STRIDES[0], sizes)

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]

    def _padded(self, size: int) -> int:
        if size >= self.min_size:
            return size
        return round_up(self.min_size, _PAD_MULTIPLE)


def create_segformer3d(
    *,
    in_channels: int,
    num_classes: int,
    attention_scale: AttentionScale = "head_dim",
    decoder_dim: int = 256,
    norm: VolumeNorm = "batch",
    spatial_dims: int = 3,
) -> SegFormer3D:
    """Build the network of the paper (arXiv 2404.10156): 4.5 million parameters.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        attention_scale: "head_dim" for new training, "paper" for the paper's released weights; see `SegFormer3D`.
        decoder_dim: width of the decoder.
        norm: as in `SegFormer3D`.
        spatial_dims: as in `SegFormer3D`.

    Raises:
        PlanError: an argument makes no sense.
    """
    return SegFormer3D(
        in_channels,
        num_classes,
        attention_scale=attention_scale,
        decoder_dim=decoder_dim,
        norm=norm,
        spatial_dims=spatial_dims,
    )


def _initialise(module: nn.Module) -> None:
    """Initialise as the paper's code does: truncated normal linears, fan-out normal convolutions, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_config(per_stage: dict[str, Sequence[int]], numbers: dict[str, int]) -> None:
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


def _check_choice(name: str, value: str, expected: str) -> None:
    if f"'{value}'" not in expected:
        raise PlanError(f"SegFormer3D({name}={value!r}): expected {expected}.")
