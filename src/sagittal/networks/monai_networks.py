"""UNETR and Swin UNETR, built by MONAI and trained here as every other network.

MONAI's modules are taken as they are, with the names of its own checkpoints. Only the order in which they are called is
written here, because MONAI's own takes images of one size (UNETR) or of multiples of 32 (Swin UNETR). Letters: T
tokens, C their width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagittal.kernels.bf16 import in_float32_on_cpus
from sagittal.networks.layout import Size, check_input, crop_end, pad_to_multiples, round_up
from sagittal.networks.norms import replace_instance_norms

with warnings.catch_warnings():
    # MONAI warns of optional packages, and puts its own filter in the place of warnings.showwarning.
    warnings.simplefilter("ignore")
    from monai.networks.nets import swin_unetr, unetr

_PATCH = 16
_SWIN_MULTIPLE = 32


class _MonaiNetwork(nn.Module):
    """What the two networks share: any size of image, one scale, MONAI's modules under MONAI's names."""

    title: str
    multiple: int

    def __init__(self, official: nn.Module, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = 3
        self.deep_supervision = False
        replace_instance_norms(official)
        for name, child in official.named_children():
            self.add_module(name, child)

    @in_float32_on_cpus
    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes, D, H, W) for an image (N, in_channels, D, H, W), at exactly its size.

        Raises:
            DataError: `x` has another number of axes or channels, is empty, or is not floating-point.
        """
        check_input(x, self.in_channels, self.spatial_dims, self.title)
        sizes = tuple(x.shape[2:])
        x = pad_to_multiples(x, (self.multiple,) * 3)
        return crop_end(self._logits(x.contiguous()), sizes)

    def multiscale(self, x: Tensor) -> list[Tensor]:
        """Return `[self(x)]`: the network has one scale; the method is what all networks share."""
        return [self(x)]

    def _logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class UNETR(_MonaiNetwork):
    """UNETR (arXiv 2103.10504): a vision transformer on patches of 16 voxels, whose layers feed a decoder.

    An axis is padded at its end, by edge replication, to a multiple of 16. The learned positions are interpolated
    (trilinearly) where the image's grid of patches is not the one they were made for.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        input_size: D, H, W that there are learned positions for, multiples of 16.
        feature_size: width of the decoder's finest stage.
        hidden_size: width of the tokens.
        mlp_dim: hidden width of the transformer's perceptrons.
        num_heads: heads of attention; they divide `hidden_size`.
    """

    title = "UNETR"
    multiple = _PATCH
    encoder_prefixes = ("vit.",)
    vit: Any

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        input_size: Size = (96, 96, 96),
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
    ) -> None:
        official = unetr.UNETR(
            in_channels,
            num_classes,
            input_size,
            feature_size=feature_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
        )
        super().__init__(official, in_channels, num_classes)
        self.position_grid = tuple(size // _PATCH for size in input_size)
        self.register_load_state_dict_pre_hook(_without_cross_attention)  # type: ignore[no-untyped-call]
        for block in self.vit.blocks:
            # What only other settings use: a norm that would never learn, tensors that no change of device reaches.
            block.norm_cross_attn = nn.Identity()
            block.attn.att_mat = block.attn.causal_mask = None

    def _logits(self, x: Tensor) -> Tensor:
        grid = tuple(size // _PATCH for size in x.shape[2:])
        tokens = self.vit.patch_embedding.patch_embeddings(x).flatten(2).transpose(1, 2) + self._positions(grid)
        states = []
        for block in self.vit.blocks:
            tokens = block(tokens)
            states.append(tokens)

        def volume(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)

        y = volume(self.vit.norm(tokens))
        for decoder, encoder, state in (("5", "4", states[9]), ("4", "3", states[6]), ("3", "2", states[3])):
            skip = self.get_submodule(f"encoder{encoder}")(volume(state))
            y = self.get_submodule(f"decoder{decoder}")(y, skip)
        y = self.get_submodule("decoder2")(y, self.get_submodule("encoder1")(x))
        logits: Tensor = self.get_submodule("out")(y)
        return logits

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """Return the learned positions (1, T, C) for a grid of patches."""
        positions: Tensor = self.vit.patch_embedding.position_embeddings
        if grid == self.position_grid:
            return positions
        volume = positions.transpose(1, 2).reshape(1, -1, *self.position_grid)
        return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


def _without_cross_attention(_network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop from MONAI's state dict what belongs to cross-attention, which the network does not have."""
    for key in list(state):
        if key.startswith(f"{prefix}vit.blocks.") and "cross_attn." in key:
            del state[key]


class SwinUNETR(_MonaiNetwork):
    """Swin UNETR (arXiv 2201.01266): attention within shifted windows in four stages, a convolutional decoder.

    An axis is padded at its end, by edge replication, to a multiple of 32. Where a stage's grid is smaller than a
    window, MONAI takes the first rows of the table of relative positions as they come; so does this network, or it
    could not use MONAI's weights.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        feature_size: width of the finest stage, a multiple of 12.
        depths: blocks of each stage.
        num_heads: heads of attention of each stage.
        window_size: edge of a window in tokens.
        checkpointing: recompute each block's activations in the backward pass.
    """

    title = "SwinUNETR"
    multiple = _SWIN_MULTIPLE
    encoder_prefixes = ("swinViT.",)
    swinViT: Any  # noqa: N815 - MONAI's name, which its checkpoints hold

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        checkpointing: bool = False,
    ) -> None:
        device = torch.get_default_device()
        # MONAI reads numbers from tensors while it builds, which fails on the meta device.
        with torch.device("cpu" if device.type == "meta" else device):
            official = swin_unetr.SwinUNETR(
                in_channels,
                num_classes,
                feature_size=feature_size,
                depths=depths,
                num_heads=num_heads,
                window_size=window_size,
                use_checkpoint=checkpointing,
            )
        super().__init__(official.to(device), in_channels, num_classes)

    def _logits(self, x: Tensor) -> Tensor:
        y = self.swinViT.patch_embed(x)
        features = [y]
        for stage in (1, 2, 3, 4):
            y = _swin_stage(getattr(self.swinViT, f"layers{stage}")[0], y)
            features.append(y)
        features = [self.swinViT.proj_out(y, normalize=True) for y in features]
        encoded = {
            1: self.get_submodule("encoder1")(x),
            2: self.get_submodule("encoder2")(features[0]),
            3: self.get_submodule("encoder3")(features[1]),
            4: self.get_submodule("encoder4")(features[2]),
            5: features[3],
        }
        y = self.get_submodule("encoder10")(features[4])
        for stage in (5, 4, 3, 2, 1):
            y = self.get_submodule(f"decoder{stage}")(y, encoded[stage])
        logits: Tensor = self.get_submodule("out")(y)
        return logits


def _swin_stage(stage: Any, x: Tensor) -> Tensor:
    """Map (N, C, D, H, W) to (N, 2C, ceil(D / 2), ...): MONAI's blocks, and masks that every exporter can follow."""
    sizes = tuple(x.shape[2:])
    # A grid not longer than a window is one window, which is not shifted.
    whole = [size <= edge for size, edge in zip(sizes, stage.window_size, strict=True)]
    window = tuple(min(size, edge) for size, edge in zip(sizes, stage.window_size, strict=True))
    shift = tuple(0 if alone else by for alone, by in zip(whole, stage.shift_size, strict=True))
    mask = None
    if any(shift):
        padded = tuple(round_up(size, edge) for size, edge in zip(sizes, window, strict=True))
        mask = shifted_window_mask(padded, window, shift, x)
    x = x.movedim(1, -1).contiguous()
    for block in stage.blocks:
        x = block(x, mask)
    merged: Tensor = stage.downsample(x).movedim(-1, 1)
    return merged.contiguous()


def shifted_window_mask(sizes: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """Return what is added to the attention within windows of a rolled grid, so that far ends do not see each other.

    Args:
        sizes: of the grid, multiples of the window.
        window: tokens of a window along D, H, W.
        shift: how far the grid was rolled along D, H, W.
        like: a tensor of the wanted device and dtype.

    Returns:
        (windows, T, T): 0 between tokens that were neighbours before the roll, else -100.
    """
    region = torch.zeros((), dtype=torch.long, device=like.device)
    for axis, (size, edge, by) in enumerate(zip(sizes, window, shift, strict=True)):
        # Along an axis three runs of tokens: those of whole windows, and the last window's two parts.
        place = torch.arange(size, device=like.device)
        run = (place >= size - edge).long() + (place >= size - by).long() if by else torch.zeros_like(place)
        shape = [1, 1, 1]
        shape[axis] = size
        region = 3 * region + run.view(shape)
    partition: Callable[..., Tensor] = swin_unetr.window_partition
    region = partition(region[None, ..., None], window)[..., 0]
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)
