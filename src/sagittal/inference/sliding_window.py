"""Predict a volume of any size through a window of fixed size.

Windows overlap, their logits are averaged with weights that fall from a window's middle to its border, and each window
may be seen mirrored along any combination of axes; labels that a mirror makes of each other are changed back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from sagittal.data.mirroring import Swaps, composed
from sagittal.errors import DataError
from sagittal.inference.windows import Tiling, gaussian, summed_weights, tile
from sagittal.plan.base import Triple


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: Float[Tensor, "C D H W"],
    *,
    patch_size: Triple,
    overlap: float,
    mirror_axes: Sequence[int],
    num_outputs: int,
    mirror_swaps: Swaps | None = None,
    window_batch: int = 1,
    on_window: Callable[[int, int], None] | None = None,
) -> Float32[Tensor, "K D H W"]:
    """Return the logits of a whole volume, on the image's device.

    Args:
        network: in eval mode, (N, C, *patch_size) to (N, K, *patch_size); it may be on another device than the image,
            then windows travel there and back.
        image: (C, D, H, W), normalised and on the network's grid; smaller than the window is fine.
        patch_size: window in voxels, D, H, W.
        overlap: share of the window's edge that neighbours have in common, 0 up to 1.
        mirror_axes: axes of D, H, W; the mean is taken over all their 2^n combinations, the empty one included.
        num_outputs: K.
        mirror_swaps: which outputs change places where an axis is mirrored (data/mirroring.py); they are changed back.
        window_batch: windows per call of the network; it changes speed and memory, results only by rounding.
        on_window: called with the number of windows done and in all.

    Raises:
        DataError: the network's output is not finite.
    """
    assert not network.training, "predict_logits needs the network in eval mode"
    _, depth, height, width = image.shape
    tiling = tile((depth, height, width), patch_size, overlap)
    if any(tiling.before + tiling.after):
        # torch's order of sides: last axis first.
        sides = [side for axis in (2, 1, 0) for side in (tiling.before[axis], tiling.after[axis])]
        image = nn.functional.pad(image, sides)
    mirrors = _mirrors(mirror_axes, mirror_swaps or {}, next(network.parameters(), image).device)
    report = on_window or (lambda done, total: None)
    if tiling.num_windows == 1:
        logits = _mirrored_mean(network, image[None], mirrors, num_outputs)[0]
        report(1, 1)
    else:
        logits = _blend(network, image, tiling, mirrors, window_batch, num_outputs, report)
    _require_finite(logits)
    d, h, w = tiling.before
    return logits[:, d : d + depth, h : h + height, w : w + width].contiguous()


def _blend(
    network: nn.Module,
    image: Tensor,
    tiling: Tiling,
    mirrors: Sequence[_Mirror],
    window_batch: int,
    num_outputs: int,
    report: Callable[[int, int], None],
) -> Tensor:
    """Return the weighted mean of all windows' logits over the padded volume (K, D, H, W)."""
    logits = torch.zeros((num_outputs, *image.shape[1:]), dtype=torch.float32, device=image.device)
    d, h, w = (torch.from_numpy(gaussian(size).astype(np.float32)).to(image.device) for size in tiling.window)
    weight = d[:, None, None] * h[:, None] * w
    done = 0
    for places in _batches(tiling, window_batch):
        windows = torch.stack([image[:, *place] for place in places])
        outputs = _mirrored_mean(network, windows, mirrors, num_outputs).mul_(weight)
        for place, output in zip(places, outputs, strict=True):
            logits[:, *place] += output
        done += len(places)
        report(done, tiling.num_windows)
    for axis in range(3):
        total = torch.from_numpy(summed_weights(tiling, axis).astype(np.float32)).to(image.device)
        logits /= total.reshape([-1 if other == axis else 1 for other in range(3)])
    return logits


def _batches(tiling: Tiling, size: int) -> Iterator[list[tuple[slice, slice, slice]]]:
    d, h, w = tiling.window
    places = [(slice(i, i + d), slice(j, j + h), slice(k, k + w)) for i, j, k in product(*tiling.starts)]
    for start in range(0, len(places), size):
        yield places[start : start + size]


class _Mirror(NamedTuple):
    """One combination of mirrored axes of (N, C, D, H, W), and where each output is found in it; None for its place."""

    axes: tuple[int, ...]
    outputs: Tensor | None


def _mirrors(axes: Sequence[int], swaps: Swaps, device: torch.device) -> list[_Mirror]:
    """Return all combinations of `axes` (of D, H, W), the empty one included."""
    distinct = sorted(set(axes))
    mirrors = []
    for count in range(len(distinct) + 1):
        for combination in combinations(distinct, count):
            table = composed(swaps, combination)
            outputs = None if table is None else torch.tensor(table, device=device)
            mirrors.append(_Mirror(tuple(axis + 2 for axis in combination), outputs))
    return mirrors


def _mirrored_mean(network: nn.Module, windows: Tensor, mirrors: Sequence[_Mirror], num_outputs: int) -> Tensor:
    """Return the mean logits (N, K, D, H, W) over all combinations of mirrored axes, on the windows' device."""
    first = next(network.parameters(), windows)
    given = windows.to(first.device)
    total = torch.zeros((len(windows), num_outputs, *windows.shape[2:]), dtype=torch.float32, device=given.device)
    for mirror in mirrors:
        output = network(given.flip(mirror.axes) if mirror.axes else given)
        assert output.shape == total.shape, f"the network gave {tuple(output.shape)}, expected {tuple(total.shape)}"
        output = output.flip(mirror.axes) if mirror.axes else output
        total += output if mirror.outputs is None else output.index_select(1, mirror.outputs)
    return total.div_(len(mirrors)).to(windows.device)


def _require_finite(logits: Tensor) -> None:
    # One pass, no mask of the volume's size; NaN and infinity both reach the extremes.
    low, high = torch.aminmax(logits)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise DataError(
            "the network's output is not finite. Expected numbers; the scan holds extreme values or the weights are "
            "damaged. Look at the scan with 'sagittal info', and try another one.",
            code="output_not_finite",
        )
