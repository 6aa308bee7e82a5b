"""The patch and the batch: nnU-Net's rules, with the chosen network's own memory in place of a U-Net's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from sagittal.planning.memory import GIB, TrainingStep, largest_that_fits
from sagittal.planning.topology import SMALLEST_EDGE, FittedStep, unet_stages

MIN_BATCH = 2
START_VOXELS = 256**3
"""The search for a patch starts with this many voxels, in the shape of a cube in mm."""
DATASET_SHARE = 0.05
"""A batch shows at most this share of the data set's voxels."""


@dataclass(frozen=True)
class PatchRule:
    """Which patches suit a network."""

    multiple: int | None
    """Each axis is a multiple of it, so that no voxel is padded; None: of what nnU-Net's U-Net for it halves."""
    minimum: int = 16
    largest_batch: int | None = None
    """The paper's batch, where more is not better; None fills the memory."""


def patch_rule(network: NetworkConfig) -> PatchRule:
    """Return which patches suit `network`, from what it halves, or from its tokens and windows.

    MedNeXt halves four times, SegFormer3D's tokens are 4 voxels apart, nnFormer's windows hold whole tokens, and
    TransBTS halves three times. nnU-Net's U-Nets follow the patch; UNETR, Swin UNETR and 3D UX-Net halve four, five
    and four times.
    """
    match network:
        case MedNeXtConfig():
            return PatchRule(multiple=16)
        case SegFormer3DConfig():
            return PatchRule(multiple=4, largest_batch=4)
        case NNFormerConfig():
            # Whole windows at the finest stage; coarser ones mask what a window has too much.
            edges = [patch * length for patch, length in zip(network.patch_size, network.windows[0], strict=True)]
            return PatchRule(multiple=max(edges))
        case TransBTSConfig():
            return PatchRule(multiple=8, largest_batch=16)
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return PatchRule(multiple=None, minimum=SMALLEST_EDGE)
        case UNETRConfig() | UXNetConfig():
            return PatchRule(multiple=16, minimum=32)
        case SwinUNETRConfig():
            # Of 32 voxels the coarsest grid would keep one, and InstanceNorm nothing of that.
            return PatchRule(multiple=32, minimum=64)
        case _:
            assert_never(network)


def patch_multiples(network: NetworkConfig) -> Triple:
    """Return what the axes of a patch must be multiples of for `network` as it is, its topology settled."""
    if isinstance(network, PlainConvUNetConfig | ResEncUNetConfig):
        return network.divisors
    multiple = patch_rule(network).multiple
    assert multiple is not None
    return multiple, multiple, multiple


def patch_sizes(spacing_mm: TripleMm, median_shape: Triple, rule: PatchRule) -> tuple[Triple, ...]:
    """Return the patches to choose from, from the largest to the smallest.

    The largest is a cube in mm of 256^3 voxels, clipped to the median case and rounded up to the network's multiple.
    Each next one is a multiple shorter along the axis that covers most of the median case (nnU-Net's order).
    """
    edge_mm = (START_VOXELS * prod(spacing_mm)) ** (1 / 3)
    size = [
        max(rule.minimum, min(round(edge_mm / spacing), extent))
        for spacing, extent in zip(spacing_mm, median_shape, strict=True)
    ]
    multiples, patch = _rounded_up(size, spacing_mm, rule)
    sizes = [patch]
    while True:
        shrinkable = [axis for axis in range(3) if patch[axis] - multiples[axis] >= rule.minimum]
        if not shrinkable:
            return tuple(sizes)
        axis = max(shrinkable, key=lambda axis: patch[axis] / median_shape[axis])
        size[axis] = patch[axis] - multiples[axis]
        multiples, patch = _rounded_up(size, spacing_mm, rule)
        # A U-Net for the shorter axis may halve another one more often, and round that up to more than was saved.
        if prod(patch) < prod(sizes[-1]):
            sizes.append(patch)


def fit_patch(
    step: TrainingStep | FittedStep, spacing_mm: TripleMm, median_shape: Triple, rule: PatchRule, memory_gib: float
) -> tuple[Triple, str]:
    """Return the largest patch of which a batch of two trains within `memory_gib`, and why.

    Raises:
        ResourceError: even the smallest patch does not fit; the message says how much it needs.
    """
    sizes = patch_sizes(spacing_mm, median_shape, rule)
    chosen, used = largest_that_fits(sizes, lambda size: step.memory_bytes(size, MIN_BATCH), int(memory_gib * GIB))
    covers = "x".join(map(str, median_shape))
    memory = f"a step of {MIN_BATCH} was measured at {used / GIB:.2f} of {memory_gib:g} GiB"
    by = "what its U-Net halves" if rule.multiple is None else str(rule.multiple)
    if chosen == sizes[0]:
        reason = f"the median case of {covers} voxels, rounded up to multiples of {by}; {memory}"
        if prod(chosen) < prod(median_shape):
            reason = f"{START_VOXELS} voxels in the shape of a cube in mm, in multiples of {by}; {memory}"
        return chosen, reason
    start = "x".join(map(str, sizes[0]))
    at_a_time = f"by multiples of {by}" if rule.multiple is None else f"{by} voxels at a time"
    reason = f"shrunk from {start}, {at_a_time}, to fit the memory ({memory}); the median case has {covers} voxels"
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


def _rounded_up(size: Sequence[int], spacing_mm: TripleMm, rule: PatchRule) -> tuple[Triple, Triple]:
    """Return what the axes must be multiples of, and the smallest such patch that holds `size`."""
    if rule.multiple is None:
        multiples = _triple(
            [prod(steps) for steps in zip(*unet_stages(spacing_mm, _triple(size)).strides, strict=True)]
        )
    else:
        multiples = (rule.multiple,) * 3
    return multiples, _triple([ceil(edge / by) * by for edge, by in zip(size, multiples, strict=True)])


def _triple(size: Sequence[int]) -> Triple:
    d, h, w = size
    return d, h, w
