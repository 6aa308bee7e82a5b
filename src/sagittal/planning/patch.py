"""The patch and the batch: nnU-Net's rules, with the chosen network's own memory in place of a U-Net's formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import assert_never

from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.networks import (
    MedNeXtConfig,
    NetworkConfig,
    NNFormerConfig,
    PlainConvUNetConfig,
    ResEncUNetConfig,
    SegFormer3DConfig,
    SwinUNETRConfig,
    TransBTSConfig,
    UNETRConfig,
    UXNetConfig,
)
from sagittal.plan.plan import as_triple
from sagittal.planning.memory import GIB, Measure, TrainingStep, largest_that_fits
from sagittal.planning.unet_stages import SMALLEST_EDGE

START_VOXELS = 256**3
"""The search for a patch starts with this many voxels, in the shape of a cube in mm."""
START_PIXELS = 2048**2
"""The same for slices, in the shape of a square."""
SLICES = 12
"""Slices of a batch at least: nnU-Net's reference, where a batch of volumes has two. Neighbours look alike."""
DATASET_SHARE = 0.05
"""A batch shows at most this share of the data set's voxels."""

Multiples = Callable[[Triple], Triple]
"""From a patch size to what the axes of a patch should be multiples of, for the network that it gets."""


@dataclass(frozen=True)
class PatchRule:
    """Which patches and batches suit a network."""

    minimum: int = 16
    """No axis is shorter."""
    takes_short_axes: bool = False
    """Whether an axis of the median case that is shorter than the minimum stays so."""
    smallest_batch: int = 2
    largest_batch: int | None = None
    """The paper's batch, where more is not better; None fills the memory."""
    sees_slices: bool = False
    """Whether the patch measures one voxel along its first axis."""


def patch_rule(network: NetworkConfig) -> PatchRule:
    """Return which patches and batches suit `network`."""
    rule = _volume_rule(network)
    if network.dims == 2:
        return replace(rule, sees_slices=True, smallest_batch=SLICES, largest_batch=None)
    return rule


def _volume_rule(network: NetworkConfig) -> PatchRule:
    match network:
        case MedNeXtConfig():
            return PatchRule(takes_short_axes=True)
        case SegFormer3DConfig():
            return PatchRule(largest_batch=4)
        case NNFormerConfig():
            return PatchRule()
        case TransBTSConfig():
            return PatchRule(largest_batch=16)
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return PatchRule(minimum=SMALLEST_EDGE)
        case UNETRConfig() | UXNetConfig():
            return PatchRule(minimum=32)
        case SwinUNETRConfig():
            # Of 32 voxels the coarsest grid would keep one, and InstanceNorm nothing of that.
            return PatchRule(minimum=64)
        case _:
            assert_never(network)


def patch_sizes(
    spacing_mm: TripleMm, median_shape: Triple, rule: PatchRule, multiples: Multiples
) -> tuple[Triple, ...]:
    """Return the patches to choose from, from the largest to the smallest.

    The largest is a cube in mm of 256^3 voxels (of slices, a square of 2048^2), clipped to the median case and rounded
    up to the network's multiples. Each next one is a multiple shorter along the axis that covers most of the median
    case (nnU-Net's order).
    """
    shape = (1, *median_shape[1:]) if rule.sees_slices else median_shape
    minimum = [_shortest(extent, rule) for extent in shape]
    if rule.sees_slices:
        edge_mm = (START_PIXELS * prod(spacing_mm[1:])) ** (1 / 2)
        minimum[0] = 1
    else:
        edge_mm = (START_VOXELS * prod(spacing_mm)) ** (1 / 3)
    size = [
        max(least, min(round(edge_mm / spacing), extent))
        for least, spacing, extent in zip(minimum, spacing_mm, shape, strict=True)
    ]
    patch = _rounded_up(size, multiples)
    sizes = [patch]
    while True:
        steps = multiples(patch)
        shrinkable = [axis for axis in range(3) if patch[axis] - steps[axis] >= minimum[axis]]
        if not shrinkable:
            return tuple(sizes)
        axis = max(shrinkable, key=lambda axis: patch[axis] / shape[axis])
        size[axis] = patch[axis] - steps[axis]
        before, patch = patch, _rounded_up(size, multiples)
        if patch == before:
            return tuple(sizes)
        # The network of a shorter axis may halve another one more often, and round that up to more than was saved.
        if prod(patch) < prod(sizes[-1]):
            sizes.append(patch)


def fit_patch(
    sizes: Sequence[Triple], measure: Measure, median_shape: Triple, *, batch: int, memory_gib: float
) -> tuple[Triple, str]:
    """Return the largest patch of which a batch trains within `memory_gib`, and why.

    Args:
        sizes: from the largest to the smallest, by `patch_sizes`.
        measure: from a patch size to the bytes of a step of `batch` patches.
        median_shape: of the median case, for the reason.
        batch: the smallest batch.
        memory_gib: memory that the tensors of a step may take.

    Raises:
        ResourceError: even the smallest patch does not fit; the message says how much it needs.
    """
    chosen, used = largest_that_fits(sizes, measure, int(memory_gib * GIB), batch=batch)
    covers = "x".join(map(str, median_shape))
    memory = f"a step of {batch} was measured at {used / GIB:.2f} of {memory_gib:g} GiB"
    if chosen != sizes[0]:
        start = "x".join(map(str, sizes[0]))
        reason = f"shrunk from {start} to fit the memory ({memory}); the median case has {covers} voxels"
        return chosen, reason
    sees_slices = chosen[0] == 1 < median_shape[0]
    covered = prod(median_shape[1:]) if sees_slices else prod(median_shape)
    if prod(chosen) < covered:
        start = f"{START_PIXELS} voxels in the shape of a square" if sees_slices else f"{START_VOXELS} voxels in the "
        start += " in mm" if sees_slices else "shape of a cube in mm"
        return chosen, f"{start}, in multiples of what the network halves; {memory}"
    what = "a slice of the median case" if sees_slices else "the median case"
    return chosen, f"{what} of {covers} voxels, rounded up to multiples of what the network halves; {memory}"


def fit_batch(
    step: TrainingStep, patch_size: Triple, dataset_voxels: float, rule: PatchRule, memory_gib: float
) -> tuple[int, str]:
    """Return the largest batch that trains within `memory_gib`, at most 5 % of the data set, and why."""
    share = round(DATASET_SHARE * dataset_voxels / prod(patch_size))
    cap = share if rule.largest_batch is None else min(share, rule.largest_batch)
    least = rule.smallest_batch
    if cap <= least:
        shown = 100 * least * prod(patch_size) / dataset_voxels
        limit = f"{100 * DATASET_SHARE:g} %"
        return least, f"the smallest allowed; it shows {shown:.3g} % of the data set's voxels, the limit is {limit}"
    batch, used = _largest_batch(step, patch_size, (least, cap), int(memory_gib * GIB))
    memory = f"a step was measured at {used / GIB:.2f} of {memory_gib:g} GiB"
    if batch < cap:
        return batch, f"the most that fits the memory; {memory}"
    if cap == rule.largest_batch:
        return batch, f"the paper's; {memory}"
    return batch, f"the most below {100 * DATASET_SHARE:g} % of the data set's voxels; {memory}"


def _largest_batch(
    step: TrainingStep, patch_size: Triple, limits: tuple[int, int], limit_bytes: int
) -> tuple[int, int]:
    # Memory is linear in the batch: one measurement gives the slope, one more confirms.
    least, cap = limits
    used = step.memory_bytes(patch_size, least)
    per_sample = max(1.0, (used - step.fixed_bytes) / least)
    batch = min(cap, max(least, int((limit_bytes - step.fixed_bytes) / per_sample)))
    while batch > least:
        measured = step.memory_bytes(patch_size, batch)
        if measured <= limit_bytes:
            return batch, measured
        batch -= 1
    return least, used


def _shortest(extent: int, rule: PatchRule) -> int:
    """Return below how many voxels an axis is not shrunk, nor begun with."""
    return min(rule.minimum, max(extent, SMALLEST_EDGE)) if rule.takes_short_axes else rule.minimum


def _rounded_up(size: Sequence[int], multiples: Multiples) -> Triple:
    """Return the smallest patch that holds `size` and is what its own network takes without padding."""
    patch = as_triple(list(size))
    while True:
        rounded = as_triple([ceil(edge / by) * by for edge, by in zip(patch, multiples(patch), strict=True)])
        if rounded == patch:
            return patch
        patch = rounded
