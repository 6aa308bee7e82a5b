"""How much memory a prediction takes, and the choices that keep it within a budget.

These moments count: the scan is prepared, windows are predicted and labelled, rules are applied to the label map, it is
written. What each holds at its peak is added up here from shapes; what a call of the network takes, the engine tells.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines.engine import NetworkMemory
from sagittal.plan.base import Triple
from sagittal.volumes.work_memory import available_bytes

GIB = 1 << 30
DEFAULT_SHARE = 0.8
"""Of the memory that is available when a prediction begins; used where no budget is given."""
PROCESS_BYTES: Mapping[str, int] = {"torch": int(0.4 * GIB), "openvino": int(0.3 * GIB)}
"""Python and the libraries before any work, by engine: measured, and their scratch buffers."""
MIN_SLAB_BYTES = 16 << 20
MAX_SLAB_BYTES = 128 << 20
KEPT_VALUES = 2
"""Of how many values the outputs of constant windows are kept where there is room: air, and the padding around it."""
MOST_LEVELS_IN_FILE = 2
"""Of the three axes: what the innermost one keeps is small, and asked for with each window."""
_PIECES_BYTES = 3 * (64 << 20)
"""Preprocessing works on pieces of 64 MiB: as read, as float32, and resampled."""
_FLOAT_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Comparison:
    """What it takes to compare the members of an average (`uncertainty.Disagreement`)."""

    per_copy: int
    """Each fold's own results, for every copy of a window in a call."""
    per_window: int
    """What all members decide, for every window in a call."""
    once: int
    """Counting it, a window at a time."""


@dataclass(frozen=True)
class Workload:
    """The sizes of one prediction."""

    stored_bytes: int
    """The scan's voxels, all channels, in the type that they are held in."""
    stored_voxels: int
    """Of one channel of the scan."""
    between_voxels: int
    """One channel between the two grids while it is resampled; 0 where it is not."""
    prepared_values: int
    """All channels on the network's grid."""
    may_halve_image: bool
    """Whether the prepared image may be float16."""
    channels: int
    """Of what is blended: features or logits."""
    carried_voxels: Triple
    """Of each of these channels, kept between windows: for the outermost, the middle and the innermost axis
    (`blending.carried_voxels`), or all of it first (`coarse.kept_windows`)."""
    halo_voxels: int
    """Of each of these channels, kept between blocks (`slabs.halo_voxels`)."""
    output_voxels: int
    """Of what the network gives for a window."""
    window_voxels: int
    window_channels: int
    """Of the image."""
    windows: int
    copies: int
    """Mirrored copies of each window."""
    label_bytes: int
    """The label map on the scan's grid."""
    row_bytes: int
    """Finishing the least that can be finished at once (`row_bytes`, `coarse.piece_bytes`)."""
    consumer_bytes: int = 0
    """What is gathered for consumers."""
    plane_bytes: int = 0
    """What they and the logits of one plane take, the least that they are given (`labelling.plane_bytes`)."""
    mask_bytes: int = 0
    """Finding the voxels that are normalised, before there is an image."""
    comparison: Comparison | None = None
    rules_bytes: int = 0
    """Post-processing, beside the label map; 0 where there are no rules."""
    may_use_file: bool = False
    """Whether a file may take what is kept for the outermost axes."""
    why_no_file: str = ""
    """A sentence for whoever is refused, where a file could help but for its folder."""
    keeps_scan: bool = False
    """Whether the caller holds the scan's voxels all along."""
    process_bytes: int = PROCESS_BYTES["torch"]


@dataclass(frozen=True)
class Choice:
    """What to predict with.

    Attributes:
        window_batch: windows or mirrored copies per call of the network.
        ahead: compute the next windows while these are blended.
        kept_values: of how many values the outputs of constant windows are kept.
        halve_image: keep the prepared image as float16, as training's cache does.
        half: keep what windows share as float16.
        levels_in_file: of how many axes, the outermost first, a file takes what windows share.
        slab_bytes: for intermediate values while blocks are finished.
    """

    window_batch: int
    ahead: bool = False
    kept_values: int = 0
    halve_image: bool = False
    half: bool = False
    levels_in_file: int = 0
    slab_bytes: int = MIN_SLAB_BYTES


def phase_bytes(work: Workload, network: NetworkMemory, choice: Choice) -> dict[str, int]:
    """Return the memory at the peak of each phase, in the order in which they come."""
    image = work.prepared_values * (_HALF_BYTES if choice.halve_image else _FLOAT_BYTES)
    # The crop and normalisation inside of it make masks of one byte per voxel.
    resampling = 2 * work.stored_voxels + image + work.between_voxels * _FLOAT_BYTES + _PIECES_BYTES
    preparing = work.stored_bytes + max(resampling, work.mask_bytes)
    held = work.stored_bytes if work.keeps_scan else 0
    output = work.channels * work.output_voxels * _FLOAT_BYTES
    per_call = max(1, choice.window_batch // work.copies)
    # Besides what the engine counts: the mean over mirrored copies, and what is blended while the engine computes.
    outputs = output * per_call * ((work.copies > 1) + choice.ahead) + output * choice.kept_values
    window = work.window_channels * work.window_voxels * _FLOAT_BYTES * (choice.window_batch + per_call)
    calls = network.fixed_bytes + choice.window_batch * network.per_window_bytes
    kept = (
        work.channels
        * sum(work.carried_voxels[choice.levels_in_file :])
        * (_HALF_BYTES if choice.half else _FLOAT_BYTES)
    )
    halos = work.channels * work.halo_voxels * _FLOAT_BYTES
    finishing = max(choice.slab_bytes, work.row_bytes, work.plane_bytes) + work.consumer_bytes
    comparing = 0
    if work.comparison is not None:
        each = work.comparison
        comparing = choice.window_batch * each.per_copy + per_call * each.per_window + each.once
    predicting = held + image + work.label_bytes + calls + outputs + window + kept + halos + finishing + comparing
    phases = {"preparing the scan": preparing, "predicting": predicting}
    if work.rules_bytes:
        phases["post-processing"] = held + work.label_bytes + work.rules_bytes
    # A format that is not packed is put together in memory.
    phases["writing the label map"] = held + 3 * work.label_bytes
    return {name: work.process_bytes + size for name, size in phases.items()}


def choose(
    work: Workload,
    network: NetworkMemory,
    allowed_bytes: int,
    *,
    preferred_batch: int,
    least_batch: int = 1,
    threads: bool = True,
) -> Choice:
    """Return the choice within the budget that is the fastest, and float16 only where nothing else helps.

    Args:
        work: the sizes.
        network: what a call takes.
        allowed_bytes: the budget.
        preferred_batch: windows per call that suit the device.
        least_batch: fewer than that only where nothing else helps: devices are idle then.
        threads: whether computing ahead helps.

    Raises:
        ResourceError: no choice stays within the budget; the message tells each phase's need.
    """
    batch = max(1, min(preferred_batch, work.windows * work.copies))
    ahead, fewest = threads and work.windows > 1, min(batch, least_batch)
    choices = [*_choices(work, batch, fewest, ahead), *(_choices(work, 1, 1, ahead) if fewest > 1 else ())]
    for least in choices:
        needs = phase_bytes(work, network, least)
        if max(needs.values()) <= allowed_bytes:
            spare = allowed_bytes - needs["predicting"]
            return Choice(**{**vars(least), "slab_bytes": min(MIN_SLAB_BYTES + spare, MAX_SLAB_BYTES)})
    raise ResourceError(
        f"this prediction needs {gib(max(needs.values()))} of memory ({_listed(needs)}); "
        f"{gib(allowed_bytes)} are allowed.{_file_would_help(work)} Allow more with --memory-gib, or crop the scan.",
        code="memory",
    )


def _file_would_help(work: Workload) -> str:
    return f" A file could take a part of it, but {work.why_no_file}" if work.why_no_file else ""


def _choices(work: Workload, batch: int, fewest: int, ahead: bool) -> Iterator[Choice]:
    """Yield what to try, the best first: what costs no accuracy is given up before what does."""
    yield Choice(batch, ahead, KEPT_VALUES)
    for smaller in sorted({batch // 2, batch // 4, fewest} - {batch}, reverse=True):
        if smaller >= fewest:
            yield Choice(smaller, ahead, KEPT_VALUES)
    # A file costs less time than computing air again and again, or waiting for what is blended.
    levels = range(MOST_LEVELS_IN_FILE + 1) if work.may_use_file else range(1)
    for level in levels:
        yield Choice(fewest, ahead, 1, levels_in_file=level)
    for halve_image in (False, True) if work.may_halve_image else (False,):
        for now, kept in ((ahead, 1), (False, 1), (False, 0)):
            yield Choice(fewest, now, kept, halve_image, levels_in_file=levels[-1])
    for now, kept in ((ahead, 1), (False, 1), (False, 0)):
        yield Choice(fewest, now, kept, work.may_halve_image, half=True, levels_in_file=levels[-1])


def budget_bytes(memory_gib: float | None) -> int | None:
    """Return the bytes of a budget; without one a share of what is available, or None where that is unknown.

    Raises:
        PlanError: it is not a positive number.
    """
    if memory_gib is None:
        free = available_bytes()
        return None if free is None else int(DEFAULT_SHARE * free)
    if not 0 < memory_gib < math.inf:
        raise PlanError(f"--memory-gib {memory_gib:g}: expected a number above 0, for example 8.", code="options")
    return int(memory_gib * GIB)


def own_bytes() -> int:
    """Return the main memory that this process takes now; where the system does not tell (not Linux), what is usual."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return PROCESS_BYTES["torch"]
    return pages * mmap.PAGESIZE


def row_bytes(channels: int, window: Triple, outer: int, shape: Triple, target: Triple) -> int:
    """Return the memory for finishing one row of a block along the axis `outer`: what slabs are divided by.

    It is cut out and, axis by axis, joined with the plane before it and resampled.
    """
    grown = [max(1.0, n_out / n_in) if n_out != n_in else 1.0 for n_in, n_out in zip(shape, target, strict=True)]
    row = math.prod(min(window[axis], shape[axis]) for axis in range(3) if axis != outer)
    if shape == target:
        return _FLOAT_BYTES * channels * row
    first, *others = [grown[outer], *(grown[axis] for axis in range(3) if axis != outer)]
    steps = 2 + first * (1 + 2 * others[0] + 2 * others[0] * others[1])
    return int(_FLOAT_BYTES * channels * row * steps)


def gib(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / GIB:.2f} GiB"


def _listed(needs: Mapping[str, int]) -> str:
    return ", ".join(f"{phase} {gib(count)}" for phase, count in needs.items())
