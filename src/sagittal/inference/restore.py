"""From logits on the network's grid to a label map on the scan's grid, slab by slab.

The logits of all classes on the scan's own grid are what fills memories elsewhere (classes x voxels x 4 bytes), so they
never exist here: a slab of planes is resampled, decided and written as labels before the next one is begun.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Integer
from torch import Tensor, nn

from sagittal.data.label_index import LabelIndex
from sagittal.plan.base import Triple

DEFAULT_SLAB_BYTES = 256 << 20
_FLOAT_BYTES = 4
_INDEX_BYTES = 8


def labels_on_grid(
    logits: Float32[Tensor, "K d h w"],
    shape: Triple,
    index: LabelIndex,
    *,
    slab_bytes: int = DEFAULT_SLAB_BYTES,
) -> Integer[np.ndarray, "D H W"]:
    """Return label values on a grid of `shape` that covers the same space as `logits`.

    Where 'sagittal doctor --fix' replaced values of the label files, the result holds the original ones, which may be
    negative or exceed 65535; without such a map it is uint8 or uint16.

    Logits are interpolated linearly between voxel centres, two taps per axis; then a voxel gets the class with the
    largest logit, or for regions the value of the last one in regions_class_order whose probability exceeds one half.

    Args:
        logits: (K, d, h, w), on any device.
        shape: D, H, W of the result.
        index: what the outputs mean.
        slab_bytes: memory for intermediate values; at least one plane is taken at a time. The result does not depend on
            it.
    """
    values = index.values_of_classes()
    depth = shape[0]
    out = np.empty(shape, values.dtype)
    lower, upper, share = _taps(logits.shape[1], depth)
    rows = max(1, slab_bytes // plane_bytes(logits.shape, shape))
    with torch.inference_mode():
        for start in range(0, depth, rows):
            stop = min(start + rows, depth)
            if logits.shape[1] == depth:
                slab = logits[:, start:stop]
            else:
                weight = share[start:stop, None, None].to(logits.device)
                slab = torch.lerp(logits[:, lower[start:stop]], logits[:, upper[start:stop]], weight)
            if slab.shape[2:] != shape[1:]:
                slab = nn.functional.interpolate(slab, size=shape[1:], mode="bilinear", align_corners=False)
            _decide(slab, values, index.spec.has_regions, out[start:stop])
    return out


def plane_bytes(logits_shape: tuple[int, ...], shape: Triple) -> int:
    """Return the memory that one plane of the result takes while it is made: what `labels_on_grid` divides by."""
    outputs, _, height, width = logits_shape
    gathered = 3 * outputs * height * width * _FLOAT_BYTES
    resampled = outputs * shape[1] * shape[2] * _FLOAT_BYTES
    return gathered + resampled + 2 * shape[1] * shape[2] * _INDEX_BYTES


def _taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each output plane its lower and upper neighbour and the share of the upper one; ends go on."""
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    centre = centre.clamp(0, n_in - 1)
    lower = centre.floor().long()
    return lower, (lower + 1).clamp(max=n_in - 1), (centre - lower).float()


def _decide(slab: Tensor, values: np.ndarray, has_regions: bool, out: np.ndarray) -> None:
    if not has_regions:
        out[...] = values[slab.argmax(dim=0).cpu().numpy()]
        return
    out[...] = 0
    for value, region in zip(values, slab, strict=True):
        # A sigmoid exceeds one half where its logit exceeds zero.
        out[(region > 0).cpu().numpy()] = value
