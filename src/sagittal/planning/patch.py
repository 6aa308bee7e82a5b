"""The patch and the batch: nnU-Net's rules, with the chosen network's own memory in place of a U-Net's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import assert_never

from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.networks import MedNeXtConfig, NetworkConfig, SegFormer3DConfig
from sagittal.planning.memory import GIB, TrainingStep, largest_that_fits

MIN_BATCH = 2
START_VOXELS = 256**3
"""The search for a patch starts with this many voxels, in the shape of a cube in mm."""
DATASET_SHARE = 0.05
"""A batch shows at most this share of the data set's voxels."""


@dataclass(frozen=True)
class PatchRule:
    """Which patches suit a network."""

    multiple: int
    """Each axis is a multiple of it, so that no voxel is padded."""
    minimum: int = 16
    largest_batch: int | None = None
    """The paper's batch, where more is not better; None fills the memory."""


def patch_rule(network: NetworkConfig) -> PatchRule:
    """Return which patches suit `network`: MedNeXt halves four times, SegFormer3D's tokens are 4 voxels apart."""
    match network:
        case MedNeXtConfig():
            return PatchRule(multiple=16)
        case SegFormer3DConfig():
            return PatchRule(multiple=4, largest_batch=4)
        case _:
            assert_never(network)


def patch_sizes(spacing_mm: TripleMm, median_shape: Triple, rule: PatchRule) -> tuple[Triple, ...]:
    """Return the patches to choose from, from the largest to the smallest.

    The largest is a cube in mm of 256^3 voxels, clipped to the median case and rounded up to the network's multiple.
    Each next one is a multiple shorter along the axis that covers most of the median case (nnU-Net's order).
    """
    edge_mm = (START_VOXELS * prod(spacing_mm)) ** (1 / 3)
    size = [
        _rounded_up(min(round(edge_mm / spacing), extent), rule)
        for spacing, extent in zip(spacing_mm, median_shape, strict=True)
    ]
    sizes = [_triple(size)]
    while True:
        shrinkable = [axis for axis in range(3) if size[axis] - rule.multiple >= rule.minimum]
        if not shrinkable:
            return tuple(sizes)
        axis = max(shrinkable, key=lambda axis: size[axis] / median_shape[axis])
        size[axis] -= rule.multiple
        sizes.append(_triple(size))


def fit_patch(
    step: TrainingStep, spacing_mm: TripleMm, median_shape: Triple, rule: PatchRule, memory_gib: float
) -> tuple[Triple, str]:
    """Return the largest patch of which a batch of two trains within `memory_gib`, and why.

    Raises:
        ResourceError: even the smallest patch does not fit; the message says how much it needs.
    """
    sizes = patch_sizes(spacing_mm, median_shape, rule)
    chosen, used = largest_that_fits(sizes, lambda size: step.memory_bytes(size, MIN_BATCH), int(memory_gib * GIB))
    covers = "x".join(map(str, median_shape))
    memory = f"a step of {MIN_BATCH} was measured at {used / GIB:.2f} of {memory_gib:g} GiB"
    if chosen == sizes[0]:
        reason = f"the median case of {covers} voxels, rounded up to multiples of {rule.multiple}; {memory}"
        if prod(chosen) < prod(median_shape):
            reason = f"{START_VOXELS} voxels in the shape of a cube in mm, in multiples of {rule.multiple}; {memory}"
        return chosen, reason
    start = "x".join(map(str, sizes[0]))
    reason = (
        f"shrunk from {start}, {rule.multiple} voxels at a time, to fit the memory ({memory}); the median case has "
        f"{covers} voxels"
    )
    return chosen, reason


def fit_batch(
    step: TrainingStep, patch_size: Triple, dataset_voxels: float, rule: PatchRule, memory_gib: float
) -> tuple[int, str]:
    """Return the largest batch that trains within `memory_gib`, at least 2, at most 5 % of the data set, and why."""
    share = round(DATASET_SHARE * dataset_voxels / prod(patch_size))
    cap = share if rule.largest_batch is None else min(share, rule.largest_batch)
    if cap <= MIN_BATCH:
        shown = 100 * MIN_BATCH * prod(patch_size) / dataset_voxels
        limit = f"{100 * DATASET_SHARE:g} %"
        return MIN_BATCH, f"the smallest allowed; it shows {shown:.3g} % of the data set's voxels, the limit is {limit}"
    batch, used = _largest_batch(step, patch_size, cap, int(memory_gib * GIB))
    memory = f"a step was measured at {used / GIB:.2f} of {memory_gib:g} GiB"
    if batch < cap:
        return batch, f"the most that fits the memory; {memory}"
    if cap == rule.largest_batch:
        return batch, f"the paper's; {memory}"
    return batch, f"the most below {100 * DATASET_SHARE:g} % of the data set's voxels; {memory}"


def _largest_batch(step: TrainingStep, patch_size: Triple, cap: int, limit_bytes: int) -> tuple[int, int]:
    # Memory is linear in the batch: one measurement gives the slope, one more confirms.
    used = step.memory_bytes(patch_size, MIN_BATCH)
    per_sample = max(1.0, (used - step.fixed_bytes) / MIN_BATCH)
    batch = min(cap, max(MIN_BATCH, int((limit_bytes - step.fixed_bytes) / per_sample)))
    while batch > MIN_BATCH:
        measured = step.memory_bytes(patch_size, batch)
        if measured <= limit_bytes:
            return batch, measured
        batch -= 1
    return MIN_BATCH, used


def _rounded_up(size: int, rule: PatchRule) -> int:
    return max(rule.minimum, ceil(size / rule.multiple) * rule.multiple)


def _triple(size: Sequence[int]) -> Triple:
    d, h, w = size
    return d, h, w
