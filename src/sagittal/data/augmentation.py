"""Random changes to training patches: every sample from its own seed, on the device that the batch lies on.

The order is nnU-Net's (space, then noise, blur, brightness, contrast, low resolution, gamma), the probabilities and
ranges are those of the plan. A sample depends on nothing but its box, its seed and the plan, so it can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from sagittal.data.draws import seeded
from sagittal.data.intensity import change_intensity, draw_intensities
from sagittal.data.spatial import SpatialDraw, cut_patch, draw_spatial
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import Preprocessing


def spatial_draw(seed: int, config: Augmentation, patch_size: Triple) -> SpatialDraw:
    """Return how `augment` will turn the sample with this seed; `spatial.box_size` of it is what must be read."""
    return draw_spatial(seeded(seed), config, patch_size)


def augment(
    images: Sequence[Float[Tensor, "C _d _h _w"]] | Float[Tensor, "N C d h w"],
    labels: Sequence[Num[Tensor, "_d _h _w"]] | Num[Tensor, "N d h w"],
    config: Augmentation,
    patch_size: Triple,
    seeds: Sequence[int],
    *,
    spacing_mm: TripleMm,
    masked_channels: Sequence[int] = (),
) -> tuple[Float[Tensor, "N C D H W"], Int64[Tensor, "N D H W"]]:
    """Cut one changed patch out of each box; boxes may differ in size, the centre of each is the centre of its patch.

    Args:
        images: boxes (C, d, h, w), float32.
        labels: the same boxes of the label indices (d, h, w), any number type.
        config: probabilities and ranges.
        patch_size: D, H, W of what comes out.
        seeds: one per box.
        spacing_mm: D, H, W; rotations are rigid in millimetres.
        masked_channels: channels whose voxels of exactly 0 lie outside the object and stay 0 (nnU-Net's mask).

    Returns:
        New tensors on the device of the boxes: images (N, C, D, H, W) and labels (N, D, H, W) as int64.
    """
    patches, targets = [], []
    for image, label, seed in zip(images, labels, seeds, strict=True):
        generator = seeded(seed)
        spatial = draw_spatial(generator, config, patch_size)
        patch, target = cut_patch(image, label, spatial, patch_size, spacing_mm)
        draws = draw_intensities(generator, config, image.shape[0], patch_size)
        channels = []
        for index, draw in enumerate(draws):
            changed = change_intensity(patch[index], draw)
            channels.append(changed.where(patch[index] != 0, 0.0) if index in masked_channels else changed)
        patches.append(torch.stack(channels))
        targets.append(target.to(torch.int64))
    return torch.stack(patches), torch.stack(targets)


def masked_channels(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the channels that are normalised inside the non-zero mask only, so that 0 means outside."""
    return tuple(
        index
        for index, normalization in enumerate(preprocessing.normalization)
        if normalization.kind == "zscore" and normalization.nonzero_only
    )
