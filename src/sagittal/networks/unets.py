"""nnU-Net's two U-Nets, built by dynamic-network-architectures and trained here as every other network.

The package's encoder and decoder are taken as they are, with the names of nnU-Net's own checkpoints. There a tensor
stands up to four times (a convolution is known as `conv` and as `all_modules.0`, the encoder once more below the
decoder); here once, as `all_modules.0` of the encoder or decoder, and a state dict with all four is read as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from dynamic_network_architectures.architectures import unet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn

from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import Size, check_input, crop_end, divide_up, pad_to_multiples
from sagittal.networks.norms import InstanceNorm

_TWINS = ("conv", "norm", "nonlin")
_AS_NNUNET: dict[str, Any] = {
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": InstanceNorm,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
    "deep_supervision": True,
}


class _UNet(nn.Module):
    """What the two U-Nets share: any size of image, heads per scale, nnU-Net's names without their twins.

    An axis is padded at its end, by edge replication, to a multiple of the product of its strides; logits are cropped.
    """

    title: str
    encoder_prefixes = ("encoder.",)
    encoder: Any
    decoder: Any

    def __init__(self, official: Any, strides: Sequence[Size], in_channels: int, deep_supervision: bool) -> None:
        super().__init__()
        # Before the twins go: the package initialises norms under the names that are dropped.
        official.apply(official.initialize)
        self.in_channels = in_channels
        self.num_classes: int = official.decoder.num_classes
        self.spatial_dims = 3
        self.deep_supervision = deep_supervision
        self.coarsening = [
            tuple(prod(stride[axis] for stride in strides[: stage + 1]) for axis in range(3))
            for stage in range(len(strides))
        ]
        self.encoder = official.encoder
        self.decoder = official.decoder
        self._drop_twins()
        self.register_load_state_dict_pre_hook(_read_official)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W).

        In train mode with deep supervision: the list of `multiscale`.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        if self.training and self.deep_supervision:
            return self.multiscale(x)
        return self._logits(x, scales=1)[0]

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return the logits of every head, finest first, in train and eval mode alike.

        Scale s has ceil(n / m) voxels along an axis of n, m the product of its first s + 1 strides (2^s where each
        stage halves); without deep supervision there is only scale 0.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        return self._logits(x, scales=len(self.coarsening) - 1 if self.deep_supervision else 1)

    @in_float32_on_cpus
    def _logits(self, x: Tensor, *, scales: int) -> list[Tensor]:
        check_input(x, self.in_channels, self.spatial_dims, self.title)
        sizes = tuple(x.shape[2:])
        x = pad_to_multiples(x, self.coarsening[-1])
        skips = self.encoder(x.contiguous())
        features = skips.pop()
        logits = []
        for stage, (upsample, convolve) in enumerate(zip(self.decoder.transpconvs, self.decoder.stages, strict=True)):
            features = convolve(torch.cat((upsample(features), skips.pop()), dim=1))
            scale = len(skips)
            if scale < scales:
                coarsening = self.coarsening[scale]
                shape = tuple(divide_up(size, by) for size, by in zip(sizes, coarsening, strict=True))
                logits.append(crop_end(self.decoder.seg_layers[str(stage)](features), shape))
        return logits[::-1]

    def _drop_twins(self) -> None:
        """Leave one name to each module, and of the heads those that are used."""
        del self.decoder.encoder
        for module in self.modules():
            if isinstance(module, ConvDropoutNormReLU):
                for twin in _TWINS:
                    if hasattr(module, twin):
                        delattr(module, twin)
        heads = {str(stage): head for stage, head in enumerate(self.decoder.seg_layers)}
        finest = str(len(heads) - 1)
        self.decoder.seg_layers = nn.ModuleDict(heads if self.deep_supervision else {finest: heads[finest]})


def _read_official(network: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Drop from nnU-Net's state dict the second to fourth names of each tensor, and heads that are not wanted."""
    assert isinstance(network, _UNet)
    unused = [f"{prefix}decoder.encoder."]
    if not network.deep_supervision:
        stages = range(len(network.coarsening) - 2)
        unused += [f"{prefix}decoder.seg_layers.{stage}." for stage in stages]
    for key in list(state):
        # .../convs.0.conv.weight beside .../convs.0.all_modules.0.weight
        owner, _, field = key.rpartition(".")[0].rpartition(".")
        twin = field in _TWINS and f"{owner}.all_modules.0.weight" in state
        if twin or key.startswith(tuple(unused)):
            del state[key]


class PlainConvUNet(_UNet):
    """nnU-Net's U-Net (arXiv 1809.10486): plain convolutions, InstanceNorm, LeakyReLU, strided and transposed steps.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        features_per_stage: widths, from fine to coarse; the last stage is the bottleneck.
        strides: D, H, W of each stage; the first is 1.
        kernel_sizes: D, H, W of each stage, odd.
        n_conv_per_stage: convolutions of each stage of the encoder.
        n_conv_per_stage_decoder: convolutions of each stage of the decoder, from coarse to fine.
        deep_supervision: add heads at all stages of the decoder.
    """

    title = "PlainConvUNet"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int],
        strides: Sequence[Size],
        kernel_sizes: Sequence[Size],
        n_conv_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        official = unet.PlainConvUNet(
            in_channels,
            len(strides),
            features_per_stage=tuple(features_per_stage),
            strides=strides,
            kernel_sizes=kernel_sizes,
            n_conv_per_stage=n_conv_per_stage,
            num_classes=num_classes,
            n_conv_per_stage_decoder=n_conv_per_stage_decoder,
            **_AS_NNUNET,
        )
        super().__init__(official, strides, in_channels, deep_supervision)


class ResidualEncoderUNet(_UNet):
    """nnU-Net's U-Net with a residual encoder (arXiv 2404.09556).

    Arguments as in `PlainConvUNet`, with `n_blocks_per_stage`, the residual blocks of each stage of the encoder.
    """

    title = "ResidualEncoderUNet"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int],
        strides: Sequence[Size],
        kernel_sizes: Sequence[Size],
        n_blocks_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        deep_supervision: bool = False,
    ) -> None:
        official = unet.ResidualEncoderUNet(
            in_channels,
            len(strides),
            features_per_stage=tuple(features_per_stage),
            strides=strides,
            kernel_sizes=kernel_sizes,
            n_blocks_per_stage=n_blocks_per_stage,
            num_classes=num_classes,
            n_conv_per_stage_decoder=n_conv_per_stage_decoder,
            **_AS_NNUNET,
        )
        super().__init__(official, strides, in_channels, deep_supervision)
