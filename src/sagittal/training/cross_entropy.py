"""Cross-entropy of each voxel, and which voxels count: all, those that are not ignored, the worst of each sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def class_entropy(log_probs: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Return -log p of each voxel's class, (N, ...); 0 where the voxel is ignored.

    Args:
        log_probs: (N, K, ...).
        targets: int64 (N, ...).
        ignore_index: the target of ignored voxels.
    """
    if ignore_index is None:
        return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    ignored = targets == ignore_index
    chosen = log_probs.gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    return chosen * (ignored.to(chosen.dtype) - 1)


def region_entropy(logits: Tensor, onehot: Tensor, valid: Tensor | None) -> Tensor:
    """Return the binary cross-entropy of each voxel, (N, ...), a mean over regions; 0 where the voxel is ignored.

    Args:
        logits: (N, K, ...).
        onehot: bool (N, K, ...).
        valid: bool (N, 1, ...), false on ignored voxels; None where all count.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, onehot.to(logits.dtype), reduction="none").mean(1)
    return entropy if valid is None else torch.where(valid.squeeze(1), entropy, entropy.new_zeros(()))


def rarity(targets: Tensor, num_indices: int, power: float, dtype: torch.dtype) -> Tensor:
    """Return what each voxel weighs by the number n of its class's voxels in the sample, (N, ...): n^-power, scaled.

    The weights of a sample's voxels that are not ignored have a mean of 1. Between all alike (power 0) and all classes
    alike (1), the square root lets a class of few voxels keep its gradient without flooding the others with false ones.

    Args:
        targets: int64 (N, ...); indices from `num_indices` on are ignored, and weigh 0.
        num_indices: classes, the background included.
        power: 0 to 1.
        dtype: of the weights.
    """
    flat = targets.flatten(1)
    counts = torch.stack([torch.count_nonzero(flat == index, 1) for index in range(num_indices)], 1).to(dtype)
    weights = torch.where(counts > 0, counts.clamp_min(1).pow(-power), counts.new_zeros(()))
    weights = weights * (counts.sum(1, keepdim=True) / (weights * counts).sum(1, keepdim=True).clamp_min(1e-12))
    weights = F.pad(weights, (0, 1))
    return weights.gather(1, flat.clamp(max=num_indices)).view(targets.shape)


def kept_voxels(targets: Tensor, ignore_index: int | None, fraction: float) -> Tensor:
    """Return how many voxels of each sample count, int64 (N,): that share, rounded up, of those not ignored."""
    if ignore_index is None:
        voxels = math.prod(targets.shape[1:])
        return torch.full(targets.shape[:1], math.ceil(fraction * voxels), device=targets.device)
    voxels_of = torch.count_nonzero(targets != ignore_index, tuple(range(1, targets.ndim)))
    return voxels_of if fraction == 1 else (voxels_of.double() * fraction).ceil().long()


def sum_of_worst(entropy: Tensor, kept: Tensor, fraction: float) -> Tensor:
    """Add up each sample's largest values, as many as `kept` says; a scalar.

    Each sample has its own threshold, as each has with nnU-Net's batch of one: a sample that is hard as a whole does
    not take the voxels of the others, and how a batch is shared out over processes does not matter.

    Args:
        entropy: (N, ...), 0 on ignored voxels, of which none is kept before all others are.
        kept: (N,), from `kept_voxels`.
        fraction: the share it was made with; 1 spares the search.
    """
    if fraction == 1:
        return entropy.sum()
    flat = entropy.flatten(1)
    limit = math.ceil(fraction * flat.shape[1])
    worst = flat.topk(limit, dim=1).values
    places = torch.arange(limit, device=flat.device)
    return torch.where(places < kept.unsqueeze(1), worst, worst.new_zeros(())).sum()
