"""Random changes to training patches: every sample from its own seed, whole batches on the device that they lie on.

The order is nnU-Net's (space, then noise, blur, brightness, contrast, low resolution, gamma), and at the end channels
are left out; the probabilities and ranges are those of the plan. A sample depends on nothing but its box, its seed and
the plan, so it can be replayed.

Everything is drawn on the processor first and sent in one copy; nothing is read back. An accelerator then changes the
whole batch at once, in about as many operations as one sample takes. On the CPU, where starting an operation costs
nothing, samples and channels are changed one after another: what is small stays in the cache, and a sample's bits do
not depend on its neighbours. Both ways are the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from sagittal.data.cutting import CutTogether, cut_patch
from sagittal.data.draws import seeded
from sagittal.data.intensity import IntensityChanges, IntensityDraw, draw_dropout, draw_intensities
from sagittal.data.mirroring import Swaps, composed
from sagittal.data.parcel import Parcel
from sagittal.data.spatial import SpatialDraw, draw_spatial
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import Preprocessing


def spatial_draw(seed: int, config: Augmentation, patch_size: Triple) -> SpatialDraw:
    """Return how `augment` will turn the sample with this seed; `spatial.box_size` of it is what must be read."""
    return draw_spatial(seeded(seed), config, patch_size)


def augment(
    images: Sequence[Num[Tensor, "C _d _h _w"]] | Num[Tensor, "N C d h w"],
    labels: Sequence[Num[Tensor, "_d _h _w"]] | Num[Tensor, "N d h w"],
    config: Augmentation,
    patch_size: Triple,
    seeds: Sequence[int],
    *,
    spacing_mm: TripleMm,
    masked_channels: Sequence[int] = (),
    swaps: Swaps | None = None,
    at_once: bool | None = None,
) -> tuple[Float[Tensor, "N C D H W"], Int64[Tensor, "N D H W"]]:
    """Cut one changed patch out of each box; boxes may differ in size, the centre of each is the centre of its patch.

    Args:
        images: boxes (C, d, h, w), any number type.
        labels: the same boxes of the label indices (d, h, w), any number type.
        config: probabilities and ranges.
        patch_size: D, H, W of what comes out.
        seeds: one per box.
        spacing_mm: D, H, W; rotations are rigid in millimetres.
        masked_channels: channels whose voxels of exactly 0 lie outside the object and stay 0 (nnU-Net's mask).
        swaps: which label indices change places in a mirror (`mirroring.label_swaps`); needed where the plan has pairs.
        at_once: whether the batch is changed as a whole; None does that everywhere but on the CPU. The two ways
            differ by rounding, and by nothing else.

    Returns:
        New tensors on the device of the boxes: images (N, C, D, H, W) float32 and labels (N, D, H, W) int64.
    """
    # A mirrored left kidney that is still called left would teach the network what is wrong.
    assert swaps is not None or not config.swapped_labels, "the plan swaps labels: give `swaps`"
    assert len(images) == len(labels) == len(seeds), "one seed and one label map for each box"
    channels, device = images[0].shape[0], images[0].device
    spatial, intensity, dropped = [], [], []
    for seed in seeds:
        generator = seeded(seed)
        spatial.append(draw_spatial(generator, config, patch_size))
        intensity.append(draw_intensities(generator, config, channels, patch_size))
        dropped.append(draw_dropout(generator, config, channels) if config.channel_dropout else ())
    batch = _Batch(spatial, intensity, patch_size, spacing_mm, tuple(masked_channels), swaps or {})
    together = device.type != "cpu" if at_once is None else at_once
    patches, targets = (batch.at_once if together else batch.one_by_one)(list(images), list(labels))
    for patch, left_out in zip(patches, dropped, strict=True):
        for channel in left_out:
            patch[channel].zero_()
    return patches, targets


@dataclass(frozen=True)
class _Batch:
    """What was drawn for a batch, and the two ways to do it."""

    spatial: Sequence[SpatialDraw]
    intensity: Sequence[Sequence[IntensityDraw]]
    """For each sample, one per channel."""
    patch_size: Triple
    spacing_mm: TripleMm
    masked_channels: Sequence[int]
    swaps: Swaps

    def one_by_one(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        device = images[0].device
        patches = torch.empty((len(images), len(images[0]), *self.patch_size), dtype=torch.float32, device=device)
        targets = torch.empty((len(images), *self.patch_size), dtype=torch.int64, device=device)
        for n, draw in enumerate(self.spatial):
            patch, target = cut_patch(images[n], labels[n], draw, self.patch_size, self.spacing_mm)
            patches[n].copy_(patch)
            targets[n].copy_(target)
            table = composed(self.swaps, draw.mirrored_axes)
            if table is not None:
                targets[n] = torch.tensor(table, device=device)[targets[n]]
            for channel, intensity in enumerate(self.intensity[n]):
                self._change(patches[n, channel][None], [intensity], channel in self.masked_channels)
        return patches, targets

    def _change(self, channels: Tensor, draws: Sequence[IntensityDraw], is_masked: bool) -> None:
        parcel = Parcel()
        changes = IntensityChanges(draws, self.patch_size, parcel)
        if not changes:
            return
        parcel.send(channels.device)
        outside = channels == 0 if is_masked else None
        changed = changes.apply(channels)
        if outside is not None:
            changed.masked_fill_(outside, 0.0)
        channels.copy_(changed)

    def at_once(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        parcel = Parcel()
        boxes: list[Triple] = [(label.shape[0], label.shape[1], label.shape[2]) for label in labels]
        cutter = CutTogether(self.spatial, boxes, self.patch_size, self.spacing_mm, parcel)
        tables = [composed(self.swaps, draw.mirrored_axes) for draw in self.spatial]
        size = max((len(table) for table in tables if table is not None), default=0)
        swapped = parcel.put(np.array([range(size) if table is None else table for table in tables]))
        changes = IntensityChanges([draw for sample in self.intensity for draw in sample], self.patch_size, parcel)
        parcel.send(images[0].device)
        patches, found = cutter.cut(images, labels)
        targets = found.to(torch.int64)
        if size:
            targets = parcel.indices(swapped).gather(1, targets.flatten(1)).view_as(targets)
        if not changes:
            return patches, targets
        outside = [(channel, patches[:, channel] == 0) for channel in self.masked_channels]
        changed = changes.apply(patches.flatten(0, 1)).view_as(patches)
        for channel, mask in outside:
            changed[:, channel].masked_fill_(mask, 0.0)
        return changed, targets


def masked_channels(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the channels that are normalised inside the non-zero mask only, so that 0 means outside."""
    return tuple(
        index
        for index, normalization in enumerate(preprocessing.normalization)
        if normalization.kind == "zscore" and normalization.nonzero_only
    )
