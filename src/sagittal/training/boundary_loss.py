"""The boundary loss's distances: how far each voxel is from the true surface, in mm, on the device of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def signed_distance_mm(
    onehot: Tensor, valid: Tensor | None, spacing_mm: Sequence[float], reach_mm: float, dtype: torch.dtype
) -> Tensor:
    """Compute the Euclidean distance to the nearest voxel on the other side of the surface.

    Positive outside the mask, negative inside, between voxel centres, exact up to `reach_mm` and that beyond it. Where
    no surface is near enough, for instance because the patch has nothing of the class, it is +-`reach_mm` everywhere:
    probability there costs what it costs far from a structure. (In Kervadec et al., arXiv 1812.07032, equation 5, phi.)

    Args:
        onehot: bool (N, K, ...), false on ignored voxels.
        valid: bool (N, 1, ...), false on ignored voxels, which are on no side; None where there is none.
        spacing_mm: of the axes after the first two.
        reach_mm: largest distance.
        dtype: of the result.
    """
    assert len(spacing_mm) == onehot.ndim - 2
    result = torch.empty(onehot.shape, dtype=dtype, device=onehot.device)
    for k in range(onehot.shape[1]):
        inside = onehot[:, k]
        outside = ~inside if valid is None else valid[:, 0] & ~inside
        to_inside = _distance_to(inside, spacing_mm, reach_mm, dtype)
        to_outside = _distance_to(outside, spacing_mm, reach_mm, dtype)
        # Ignored voxels may get any value: the loss leaves them out.
        torch.where(inside, -to_outside, to_inside, out=result[:, k])
    return result


def _distance_to(seeds: Tensor, spacing_mm: Sequence[float], reach_mm: float, dtype: torch.dtype) -> Tensor:
    """Return the distance to the nearest true voxel of (N, ...), at most `reach_mm`.

    Squared distances are sums over the axes, so the minimum is taken one axis after the other, over the offsets that
    lie within reach (Felzenszwalb and Huttenlocher, 2012, with a window in the place of their envelope).
    """
    limit = reach_mm**2
    squared = torch.full(seeds.shape, limit, dtype=dtype, device=seeds.device).masked_fill_(seeds, 0)
    for axis, step_mm in enumerate(spacing_mm, start=1):
        size = seeds.shape[axis]
        before, moved = squared.clone(), torch.empty_like(squared)
        for offset in range(1, size):
            added = (offset * step_mm) ** 2
            if added >= limit:
                break
            torch.add(before, added, out=moved)
            rest = size - offset
            for source, target in ((0, offset), (offset, 0)):
                part = squared.narrow(axis, target, rest)
                torch.minimum(part, moved.narrow(axis, source, rest), out=part)
    return squared.sqrt_()
