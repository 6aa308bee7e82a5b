"""Configurations of the networks that others compare with. Torch-free: `networks.build` makes modules of them.

The U-Nets hold nnU-Net's own names for what shapes them, so that a plan can be read beside nnU-Net's plans.json.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal, Self

from pydantic import model_validator

from sagittal.plan.base import Triple
from sagittal.plan.network_base import NetworkBase

Four = tuple[int, int, int, int]
Counts = tuple[int, ...]

_ONE: Triple = (1, 1, 1)
_TWO: Triple = (2, 2, 2)
_THREE: Triple = (3, 3, 3)


class UNetConfig(NetworkBase):
    """What nnU-Net's two U-Nets have in common; stages run from fine to coarse, the last is the bottleneck."""

    features_per_stage: Counts = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = (_ONE, _TWO, _TWO, _TWO, _TWO, _TWO)
    """By how much each stage coarsens its input along D, H, W; the first stage's is 1."""
    kernel_sizes: tuple[Triple, ...] = (_THREE,) * 6
    """D, H, W; 1 along an axis whose voxels are still much longer than the others'."""
    n_conv_per_stage_decoder: Counts
    """From coarse to fine, one number less than stages."""
    deep_supervision: bool = True

    @property
    def scales(self) -> int:
        """One per stage of the decoder with deep supervision, else one."""
        return len(self.strides) - 1 if self.deep_supervision else 1

    def single_scale(self) -> Self:
        """Return the configuration without the heads of deep supervision."""
        return self.replace(deep_supervision=False)

    @property
    def divisors(self) -> Triple:
        """What the axes of an image must be multiples of, so that nothing is padded."""
        d, h, w = list(accumulate(self.strides, lambda a, b: (a[0] * b[0], a[1] * b[1], a[2] * b[2])))[-1]
        return d, h, w

    def _check_stages(self, per_stage: Counts, name: str) -> None:
        stages = len(self.strides)
        if stages < 2:
            raise ValueError(f"a U-Net needs at least 2 stages, not {stages}")
        lengths = {
            "features_per_stage": len(self.features_per_stage),
            "kernel_sizes": len(self.kernel_sizes),
            name: len(per_stage),
            "n_conv_per_stage_decoder": len(self.n_conv_per_stage_decoder) + 1,
        }
        for field, length in lengths.items():
            if length != stages:
                one_less = " (one less for the decoder)" if field == "n_conv_per_stage_decoder" else ""
                raise ValueError(f"{field} must have one value for each of the {stages} strides{one_less}")
        if min(*self.features_per_stage, *per_stage, *self.n_conv_per_stage_decoder) < 1:
            raise ValueError(f"features_per_stage, {name} and n_conv_per_stage_decoder must be at least 1")
        if self.strides[0] != _ONE or min(min(stride) for stride in self.strides) < 1:
            raise ValueError("strides must be at least 1, and those of the first stage 1")
        if any(size < 1 or size % 2 == 0 for kernel in self.kernel_sizes for size in kernel):
            raise ValueError("kernel_sizes must be odd, so that a stage keeps its size")


class PlainConvUNetConfig(UNetConfig):
    """nnU-Net's U-Net (arXiv 1809.10486), as dynamic-network-architectures builds it."""

    kind: Literal["plainconvunet"] = "plainconvunet"
    n_conv_per_stage: Counts = (2, 2, 2, 2, 2, 2)
    n_conv_per_stage_decoder: Counts = (2, 2, 2, 2, 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_stages(self.n_conv_per_stage, "n_conv_per_stage")
        return self


class ResEncUNetConfig(UNetConfig):
    """nnU-Net's U-Net with a residual encoder (arXiv 2404.09556); its sizes M, L and XL differ in their memory only."""

    kind: Literal["resencunet"] = "resencunet"
    n_blocks_per_stage: Counts = (1, 3, 4, 6, 6, 6)
    n_conv_per_stage_decoder: Counts = (1, 1, 1, 1, 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_stages(self.n_blocks_per_stage, "n_blocks_per_stage")
        return self


class UNETRConfig(NetworkBase):
    """UNETR (arXiv 2103.10504), as MONAI builds it: twelve transformer blocks on patches of 16 voxels."""

    kind: Literal["unetr"] = "unetr"
    input_size: Triple = (96, 96, 96)
    """D, H, W of the images for which there is a learned position of each patch; it is interpolated for others."""
    feature_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.feature_size, self.hidden_size, self.mlp_dim, self.num_heads) < 1:
            raise ValueError("feature_size, hidden_size, mlp_dim and num_heads must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"a hidden_size of {self.hidden_size} can't be split into {self.num_heads} heads")
        if min(self.input_size) < 1 or any(size % 16 for size in self.input_size):
            raise ValueError("input_size must hold multiples of 16, the size of a patch")
        return self


class SwinUNETRConfig(NetworkBase):
    """Swin UNETR (arXiv 2201.01266), as MONAI builds it: four stages of attention within shifted windows."""

    kind: Literal["swinunetr"] = "swinunetr"
    feature_size: int = 48
    depths: Four = (2, 2, 2, 2)
    num_heads: Four = (3, 6, 12, 24)
    window_size: int = 7
    """Edge of a window in tokens, which are two voxels apart at the finest stage."""
    checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.feature_size, *self.depths, *self.num_heads, self.window_size) < 1:
            raise ValueError("feature_size, depths, num_heads and window_size must be at least 1")
        if self.feature_size % 12:
            raise ValueError(f"feature_size must be a multiple of 12, not {self.feature_size}")
        for stage, heads in enumerate(self.num_heads):
            if (self.feature_size << stage) % heads:
                raise ValueError(f"a width of {self.feature_size << stage} can't be split into {heads} heads")
        return self


class UXNetConfig(NetworkBase):
    """3D UX-Net (arXiv 2209.15076): four stages of large depthwise kernels, a convolutional decoder."""

    kind: Literal["3d-uxnet"] = "3d-uxnet"
    feature_sizes: Four = (48, 96, 192, 384)
    depths: Four = (2, 2, 2, 2)
    kernel_size: Literal[3, 5, 7, 9] = 7
    hidden_size: int = 768
    """Width of the bottleneck."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(*self.feature_sizes, *self.depths, self.hidden_size) < 1:
            raise ValueError("feature_sizes, depths and hidden_size must be at least 1")
        return self


BASELINES: dict[str, PlainConvUNetConfig | ResEncUNetConfig | UNETRConfig | SwinUNETRConfig | UXNetConfig] = {
    "plainconvunet": PlainConvUNetConfig(),
    "resencunet": ResEncUNetConfig(),
    "unetr": UNETRConfig(),
    "swinunetr": SwinUNETRConfig(),
    "3d-uxnet": UXNetConfig(),
}
