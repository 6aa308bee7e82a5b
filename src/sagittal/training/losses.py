"""Dice + cross-entropy, for classes or regions, over one or several output scales, with an ignore label.

Shapes: outputs (N, K, D, H, W) from fine to coarse; targets (N, D, H, W) label indices (`data.label_index`): 0 is
the background, 1..n the foreground values in ascending order, then the ignore index where one is declared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sagittal.data.label_index import LabelIndex
from sagittal.plan.loss import Loss


def segmentation_loss(
    outputs: Sequence[torch.Tensor], targets: torch.Tensor, index: LabelIndex, config: Loss
) -> torch.Tensor:
    """Compute the training loss, a scalar.

    Each scale is compared with the targets at its own size (nearest neighbour) and weighted by
    `config.deep_supervision_weights`, as nnU-Net does; MedNeXt gives no scale a weight of zero.

    Args:
        outputs: logits (N, K, D, H, W) from fine to coarse, one per weight.
        targets: int64 (N, D, H, W) label indices at the finest scale.
        index: which output each label index belongs to.
        config: weights and the form of Dice.
    """
    assert len(outputs) == len(config.deep_supervision_weights)
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    for logits, weight in zip(outputs, config.deep_supervision_weights, strict=True):
        if weight > 0:
            total = total + weight * _one_scale(
                logits.float(), _resize_nearest(targets, logits.shape[2:]), index, config
            )
    return total


def _resize_nearest(targets: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Pick the voxel at the centre of each coarse cell; (N, D, H, W) -> (N, *size)."""
    for axis, (old, new) in enumerate(zip(targets.shape[1:], size, strict=True), start=1):
        if old != new:
            positions = (torch.arange(new, device=targets.device, dtype=torch.float64) + 0.5) * (old / new)
            targets = targets.index_select(axis, positions.floor().long().clamp_(max=old - 1))
    return targets


def _one_scale(logits: torch.Tensor, targets: torch.Tensor, index: LabelIndex, config: Loss) -> torch.Tensor:
    valid = None if index.ignore_index is None else targets != index.ignore_index
    safe = targets if valid is None else targets.where(valid, torch.zeros_like(targets))
    if index.spec.has_regions:
        table = torch.from_numpy(index.membership).to(logits.device)
        onehot = table.t()[safe].movedim(-1, 1).to(logits.dtype)
        probs = torch.sigmoid(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").mean(1)
    else:
        log_probs = F.log_softmax(logits, dim=1)
        probs = log_probs.exp()[:, 1:]
        entropy = -log_probs.gather(1, safe.unsqueeze(1)).squeeze(1)
        foreground = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        onehot = (safe.unsqueeze(1) == foreground).to(logits.dtype)
    if valid is not None:
        mask = valid.to(logits.dtype)
        entropy = (entropy * mask).sum() / mask.sum().clamp_min(1)
        probs, onehot = probs * mask.unsqueeze(1), onehot * mask.unsqueeze(1)
    dice = soft_dice(probs, onehot, batch_dice=config.batch_dice, smooth=config.dice_smooth)
    return config.cross_entropy_weight * entropy.mean() + config.dice_weight * (1 - dice.mean())


def soft_dice(probs: torch.Tensor, onehot: torch.Tensor, *, batch_dice: bool, smooth: float) -> torch.Tensor:
    """Compute (2 |P.T| + s) / (|P| + |T| + s) per sample and output, or per output with `batch_dice`.

    Args:
        probs, onehot: (N, K, D, H, W) without the background.
        batch_dice: sum over the batch before the ratio.
        smooth: s; keeps a pair of empty masks at 1.

    Returns:
        (N, K), or (K,) with `batch_dice`.
    """
    axes = tuple(range(2, probs.ndim))
    intersection, predicted, wanted = (probs * onehot).sum(axes), probs.sum(axes), onehot.sum(axes)
    if batch_dice:
        intersection, predicted, wanted = intersection.sum(0), predicted.sum(0), wanted.sum(0)
    return (2 * intersection + smooth) / (predicted + wanted + smooth).clamp_min(1e-8)
