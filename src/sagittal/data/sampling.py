"""Which patches make up a training step: a pure function of the plan's seed and the step.

nnU-Net's rules: cases are drawn uniformly with replacement; the last samples of a batch are forced onto the
foreground, on a random voxel of a class that is drawn uniformly among those present. Two things differ. The chosen
voxel is moved off the centre by up to a quarter of the patch, because a network that always sees its target in the
centre learns the place instead of the thing; and a batch of one is forced with the probability of the share, where
rounding would never force it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sagittal.data.cache import Cache
from sagittal.plan.base import Triple
from sagittal.plan.plan import Plan

JITTER_SHARE = 4
"""A forced voxel lies up to one part in this many of the patch's size off the centre, along each axis."""


@dataclass(frozen=True, slots=True)
class PatchDraw:
    """Where one training patch lies, and the seed of its augmentation."""

    case: int
    """Index of the case in the cache."""
    start: Triple
    """First voxel of the patch, D, H, W; negative where the patch begins before the case."""
    seed: int
    forced_index: int | None
    """Label index that the patch was placed on, None where it was placed anywhere."""


def draw_patches(cache: Cache, cases: Sequence[int], plan: Plan, step: int) -> tuple[PatchDraw, ...]:
    """Draw the patches of one step; the same seed, step and cases give the same patches, whatever came before."""
    return tuple(_draw_patch(cache, cases, plan, step, sample) for sample in range(plan.training.batch_size))


def is_forced(sample: int, batch_size: int, share: float, chance: float) -> bool:
    """Return whether a sample of the batch is placed on the foreground; `chance` (0..1) decides a batch of one."""
    if batch_size == 1:
        return chance < share
    return sample >= round(batch_size * (1 - share))


def _draw_patch(cache: Cache, cases: Sequence[int], plan: Plan, step: int, sample: int) -> PatchDraw:
    training, patch_size = plan.training, plan.patch.size
    entropy = (training.seed % 2**64, step, sample)
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    case = cases[int(rng.integers(len(cases)))]
    seed = int(rng.integers(2**63 - 1))
    shape = _case_shape(cache, case)
    forced = is_forced(sample, training.batch_size, training.foreground_oversampling, float(rng.random()))
    locations = _foreground(cache, case) if forced else {}
    if not locations:
        start = tuple(place_anywhere(rng, size, extent) for size, extent in zip(patch_size, shape, strict=True))
        return PatchDraw(case, (start[0], start[1], start[2]), seed, None)
    index = sorted(locations)[int(rng.integers(len(locations)))]
    voxels = locations[index]
    voxel = voxels[int(rng.integers(len(voxels)))]
    d, h, w = (
        place_around(rng, int(at), size, extent) for at, size, extent in zip(voxel, patch_size, shape, strict=True)
    )
    return PatchDraw(case, (d, h, w), seed, index)


def place_anywhere(rng: np.random.Generator, size: int, extent: int) -> int:
    """Return the start of a patch of `size` along an axis of `extent`: inside, or around the whole axis if it is short.

    A short axis lies in the middle of the patch, as in prediction, give or take half of the room at either end.
    """
    if extent >= size:
        return int(rng.integers(extent - size + 1))
    room = size - extent
    return -(room // 2) + int(rng.integers(-(room // 4), room // 4 + 1))


def place_around(rng: np.random.Generator, voxel: int, size: int, extent: int) -> int:
    """Return the start of a patch that holds `voxel`, near its centre but not on it, and that stays inside the axis."""
    if extent < size:
        return place_anywhere(rng, size, extent)
    reach = size // JITTER_SHARE
    start = voxel - size // 2 + int(rng.integers(-reach, reach + 1))
    return min(max(start, 0), extent - size)


def _case_shape(cache: Cache, case: int) -> Triple:
    d, h, w = cache.labels(case).shape
    return d, h, w


def _foreground(cache: Cache, case: int) -> dict[int, np.ndarray]:
    return {index: voxels for index, voxels in cache.locations(case).items() if index > 0 and len(voxels) > 0}
