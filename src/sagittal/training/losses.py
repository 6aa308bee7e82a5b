"""What training minimises: a weighted sum of losses, for classes or regions, over one or several output scales.

Dice, cross-entropy (softmax for classes, sigmoid for regions; all voxels or the worst of each sample), focal Tversky
and the boundary loss, each computed only where its weight is above 0. Ignored voxels count in none of them.

A batch may be held by several processes, and be computed in several parts. Everything but the "batch Dice" is a sum
over samples divided by a count, so each part's loss is divided by the count of the WHOLE batch: the parts then add up
to its loss, and so do their gradients, exactly. The sums that "batch Dice" divides are taken over all processes too,
but not over parts that are computed one after the other: it is exact for processes, and for parts it is the mean of
the parts' own.

Shapes: outputs (N, K, D, H, W) from fine to coarse; targets (N, D, H, W) label indices (`data.label_index`): 0 is
the background, 1..n the foreground values in ascending order, then the ignore index where one is declared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sagittal.data.label_index import LabelIndex
from sagittal.plan.loss import Loss
from sagittal.training.boundary_loss import signed_distance_mm
from sagittal.training.cross_entropy import class_entropy, kept_voxels, rarity, region_entropy, sum_of_worst
from sagittal.training.distributed import ALONE, World
from sagittal.training.overlap_losses import Overlap, dice, focal_tversky, overlap

_Sums = dict[str, Tensor]
"""Sums over the samples at hand of one scale, which add up over processes."""


def segmentation_loss(
    outputs: Sequence[Tensor],
    targets: Tensor,
    index: LabelIndex,
    config: Loss,
    *,
    spacing_mm: Sequence[float] | None = None,
    whole: Tensor | None = None,
    world: World = ALONE,
) -> Tensor:
    """Compute the training loss, a scalar, float64 where the outputs are and else float32.

    Each scale is compared with the targets at its own size (nearest neighbour) and weighted by
    `config.deep_supervision_weights`, as nnU-Net does; MedNeXt gives no scale a weight of zero.

    Args:
        outputs: logits (N, K, D, H, W) from fine to coarse, one per weight; any floating type, N may be 0.
        targets: int64 (N, D, H, W) label indices at the finest scale.
        index: which output each label index belongs to.
        config: weights and the form of each loss.
        spacing_mm: voxel size of `targets` in D, H, W order; only the boundary loss needs it.
        whole: this process's targets of the whole batch where `outputs` are only a part of it; the result is then
            what this part contributes to the loss of the batch.
        world: the processes that hold the rest of the batch; each of them must call this, as often as the others, and
            gets the loss of all of them. Their gradients add up to its gradient.
    """
    assert len(outputs) == len(config.deep_supervision_weights)
    whole = targets if whole is None else whole
    used = [(logits, weight) for logits, weight in zip(outputs, config.deep_supervision_weights, strict=True) if weight]
    scales = []
    for logits, _ in used:
        size = logits.shape[2:]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        resized = _resize_nearest(targets, size)
        whole_resized = resized if whole is targets else _resize_nearest(whole, size)
        spacing = _spacing_of(size, targets.shape[1:], spacing_mm)
        sums = _sums(logits, resized, index, config, spacing)
        scales.append(sums | _counts(resized, whole_resized, index, config, logits.dtype))
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    for (logits, weight), sums in zip(used, _over_processes(scales, world), strict=True):
        total = total + weight * _finish(sums, logits.shape[1] - (not index.spec.has_regions), config)
    return total


def _resize_nearest(targets: Tensor, size: torch.Size) -> Tensor:
    """Pick the voxel at the centre of each coarse cell; (N, D, H, W) -> (N, *size)."""
    for axis, (old, new) in enumerate(zip(targets.shape[1:], size, strict=True), start=1):
        if old != new:
            positions = (torch.arange(new, device=targets.device, dtype=torch.float64) + 0.5) * (old / new)
            targets = targets.index_select(axis, positions.floor().long().clamp_(max=old - 1))
    return targets


def _spacing_of(size: torch.Size, finest: torch.Size, spacing_mm: Sequence[float] | None) -> tuple[float, ...] | None:
    if spacing_mm is None:
        return None
    return tuple(mm * old / new for mm, old, new in zip(spacing_mm, finest, size, strict=True))


def _sums(
    logits: Tensor, targets: Tensor, index: LabelIndex, config: Loss, spacing_mm: tuple[float, ...] | None
) -> _Sums:
    """Add up each loss over the samples at hand."""
    valid = None if index.ignore_index is None else (targets != index.ignore_index).unsqueeze(1)
    onehot = _onehot(targets, logits.shape[1], index)
    sums: _Sums = {}
    if index.spec.has_regions:
        probs = torch.sigmoid(logits)
        entropy = region_entropy(logits, onehot, valid) if config.cross_entropy_weight else None
    else:
        log_probs = F.log_softmax(logits, dim=1)
        probs = log_probs.exp()[:, 1:]
        entropy = class_entropy(log_probs, targets, index.ignore_index) if config.cross_entropy_weight else None
    if entropy is not None:
        if config.rare_class_power:
            entropy = entropy * rarity(targets, index.num_indices, config.rare_class_power, entropy.dtype)
        kept = kept_voxels(targets, index.ignore_index, config.top_k_fraction)
        sums["entropy"] = sum_of_worst(entropy, kept, config.top_k_fraction)
    if config.dice_weight or config.tversky_weight:
        counts = overlap(probs, onehot, valid)
        if config.batch_dice:
            sums["overlap"] = torch.stack([count.sum(0) for count in counts])
        else:
            sums |= {name: value.sum() for name, value in _ratios(counts, config).items()}
    if config.boundary_weight:
        assert spacing_mm is not None, "the boundary loss needs spacing_mm"
        distance = signed_distance_mm(onehot, valid, spacing_mm, config.boundary_reach_mm, probs.dtype)
        if valid is not None:
            distance.masked_fill_(~valid, 0)
        sums["boundary"] = (probs * distance).sum()
    return sums


def _onehot(targets: Tensor, outputs: int, index: LabelIndex) -> Tensor:
    """Return which voxels each output should find, bool (N, K, ...), without the background of classes."""
    if not index.spec.has_regions:
        foreground = torch.arange(1, outputs, device=targets.device).view(1, -1, *[1] * (targets.ndim - 1))
        return targets.unsqueeze(1) == foreground
    table = torch.from_numpy(index.membership).to(targets.device)
    # One more index, of ignored voxels, which belong to no region.
    table = F.pad(table, (0, 1))
    return table.t()[targets].movedim(-1, 1)


def _ratios(counts: Overlap, config: Loss) -> _Sums:
    ratios: _Sums = {}
    if config.dice_weight:
        ratios["dice"] = dice(counts, config.dice_smooth)
    if config.tversky_weight:
        ratios["tversky"] = focal_tversky(
            counts,
            alpha=config.tversky_alpha,
            beta=config.tversky_beta,
            gamma=config.tversky_gamma,
            smooth=config.dice_smooth,
        )
    return ratios


def _counts(targets: Tensor, whole: Tensor, index: LabelIndex, config: Loss, dtype: torch.dtype) -> _Sums:
    """Count what the sums are divided by."""
    counts: _Sums = {
        "samples": targets.new_full((), targets.shape[0], dtype=dtype),
        "whole_samples": targets.new_full((), whole.shape[0], dtype=dtype),
    }
    if config.cross_entropy_weight:
        counts["kept"] = kept_voxels(whole, index.ignore_index, config.top_k_fraction).sum().to(dtype)
    if config.boundary_weight:
        counts["valid"] = kept_voxels(whole, index.ignore_index, 1.0).sum().to(dtype)
    return counts


def _over_processes(scales: list[_Sums], world: World) -> list[_Sums]:
    """Add everything up over the processes, in one exchange and in float64."""
    if world.size == 1:
        return scales
    flat = torch.cat([value.double().flatten() for sums in scales for value in sums.values()])
    parts = iter(torch.split(world.sum(flat), [value.numel() for sums in scales for value in sums.values()]))
    return [{name: next(parts).view(value.shape).to(value.dtype) for name, value in sums.items()} for sums in scales]


def _finish(sums: _Sums, outputs: int, config: Loss) -> Tensor:
    """Weigh the losses of one scale, of which `sums` holds what they are made of."""
    whole = sums["whole_samples"].clamp_min(1)
    share = sums["samples"] / whole
    parts = []
    if config.cross_entropy_weight:
        parts.append(config.cross_entropy_weight * (sums["entropy"] / sums["kept"].clamp_min(1)))
    if config.batch_dice and "overlap" in sums:
        means = {name: share * value.mean() for name, value in _ratios(Overlap(*sums["overlap"]), config).items()}
    else:
        means = {name: sums[name] / (whole * outputs) for name in ("dice", "tversky") if name in sums}
    if config.dice_weight:
        parts.append(config.dice_weight * (share - means["dice"]))
    if config.tversky_weight:
        parts.append(config.tversky_weight * means["tversky"])
    if config.boundary_weight:
        parts.append(config.boundary_weight * (sums["boundary"] / (sums["valid"].clamp_min(1) * outputs)))
    return sum(parts[1:], start=parts[0])
