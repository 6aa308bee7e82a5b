"""Predict a volume of any size through a window of fixed size.

Windows overlap, their logits are averaged with weights that fall from a window's middle to its border, and each window
may be seen mirrored along any combination of axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

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
    report = on_window or (lambda done, total: None)
    if tiling.num_windows == 1:
        logits = _mirrored_mean(network, image[None], mirror_axes, num_outputs)[0]
        report(1, 1)
    else:
        logits = _blend(network, image, tiling, mirror_axes, window_batch, num_outputs, report)
    _require_finite(logits)
    d, h, w = tiling.before
    return logits[:, d : d + depth, h : h + height, w : w + width].contiguous()


def _blend(
    network: nn.Module,
    image: Tensor,
    tiling: Tiling,
    mirror_axes: Sequence[int],
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
        outputs = _mirrored_mean(network, windows, mirror_axes, num_outputs).mul_(weight)
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


def _mirrored_mean(network: nn.Module, windows: Tensor, mirror_axes: Sequence[int], num_outputs: int) -> Tensor:
    """Return the mean logits (N, K, D, H, W) over all combinations of mirrored axes, on the windows' device."""
    first = next(network.parameters(), windows)
    given = windows.to(first.device)
    axes = [axis + 2 for axis in sorted(set(mirror_axes))]
    flips = [combination for count in range(len(axes) + 1) for combination in combinations(axes, count)]
    total = torch.zeros((len(windows), num_outputs, *windows.shape[2:]), dtype=torch.float32, device=given.device)
    for flip in flips:
        output = network(given.flip(flip) if flip else given)
        assert output.shape == total.shape, f"the network gave {tuple(output.shape)}, expected {tuple(total.shape)}"
        total += output.flip(flip) if flip else output
    return total.div_(len(flips)).to(windows.device)


def _require_finite(logits: Tensor) -> None:
    # One pass, no mask of the volume's size; NaN and infinity both reach the extremes.
    low, high = torch.aminmax(logits)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise DataError(
            "the network's output is not finite. Expected numbers; the scan holds extreme values or the weights are "
            "damaged. Look at the scan with 'sagittal info', and try another one.",
            code="output_not_finite",
        )
