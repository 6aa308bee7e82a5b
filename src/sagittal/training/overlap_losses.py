"""Soft Dice and focal Tversky: ratios of what prediction and truth have in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Overlap(NamedTuple):
    """What the ratios are made of, (N, K) or (K,): sums over voxels, which also add up over samples."""

    common: Tensor
    """Probability on true voxels."""
    predicted: Tensor
    """Probability everywhere."""
    wanted: Tensor
    """Number of true voxels."""


def overlap(probs: Tensor, onehot: Tensor, valid: Tensor | None) -> Overlap:
    """Sum over space.

    Args:
        probs: (N, K, ...) without the background of classes.
        onehot: bool (N, K, ...), false on ignored voxels.
        valid: bool (N, 1, ...), false on ignored voxels; None where all count.
    """
    axes = tuple(range(2, probs.ndim))
    # Products, not torch.where: half the time on a CPU.
    wanted = onehot.to(probs.dtype)
    counted = probs if valid is None else probs * valid.to(probs.dtype)
    return Overlap((probs * wanted).sum(axes), counted.sum(axes), wanted.sum(axes))


def dice(sums: Overlap, smooth: float) -> Tensor:
    """Compute (2 |P.T| + s) / (|P| + |T| + s); `smooth`, s, keeps a pair of empty masks at 1."""
    return (2 * sums.common + smooth) / (sums.predicted + sums.wanted + smooth).clamp_min(1e-8)


def focal_tversky(sums: Overlap, *, alpha: float, beta: float, gamma: float, smooth: float) -> Tensor:
    """Compute (1 - TI) ^ gamma, TI = (TP + s) / (TP + alpha FP + beta FN + s).

    Focal Tversky loss, Abraham and Khan, arXiv 1810.07842, equations 3 and 4, in Salehi's notation (arXiv 1706.05721):
    alpha is the cost of a false positive, beta of a missed voxel (the paper has the letters the other way round), and
    gamma is the exponent itself: the paper's exponent is 1/gamma with gamma = 4/3, which is 0.75 here.
    """
    false, missed = sums.predicted - sums.common, sums.wanted - sums.common
    index = (sums.common + smooth) / (sums.common + alpha * false + beta * missed + smooth).clamp_min(1e-8)
    # A root's slope is infinite at 0, where nothing is wrong and nothing should change.
    result: Tensor = (1 - index).clamp_min(1e-6) ** gamma
    return result
