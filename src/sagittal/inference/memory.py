"""How much memory a prediction takes, and the choices that keep it within a budget.

Three moments count: the scan is prepared, windows are predicted, labels are made. What each holds at its peak is added
up here from shapes; the network's share is measured on tensors without data (`networks.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sagittal.errors import PlanError, ResourceError

GIB = 1 << 30
PROCESS_BYTES = int(0.4 * GIB)
"""Python, torch and the other libraries before any work: 0.27 to 0.31 GiB measured, and their scratch buffers."""
NETWORK_MARGIN = 1.25
"""Resident memory over the sum of live tensors, measured on MedNeXt at 64 and 96 voxels: 1.11 to 1.27."""
MIN_SLAB_BYTES = 16 << 20
MAX_SLAB_BYTES = 256 << 20
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class NetworkMemory:
    """What one call of the network takes: `fixed_bytes` for its weights, the rest for each window of the batch."""

    fixed_bytes: int
    per_window_bytes: int


@dataclass(frozen=True)
class Workload:
    """The sizes of one prediction."""

    channels: int
    outputs: int
    stored_voxels: int
    """Of the scan as it was given."""
    cropped_voxels: int
    """After the crop, before resampling."""
    prepared_voxels: int
    """On the network's grid, padded to the window where it is smaller."""
    is_padded: bool
    """Whether the padding has to be cut off the logits, which takes them twice for a moment."""
    window_voxels: int
    windows: int
    label_bytes: int
    """Per voxel of the label map."""
    plane_bytes: int
    """One plane of `restore.labels_on_grid`."""
    keeps_scan: bool
    """Whether the caller holds the scan's voxels all along."""
    on_device: bool = False
    """Whether network and windows use the memory of a GPU, so that only the rest counts here."""


@dataclass(frozen=True)
class Choice:
    """What to predict with."""

    window_batch: int
    slab_bytes: int


def phase_bytes(work: Workload, network: NetworkMemory, choice: Choice) -> dict[str, int]:
    """Return the memory at the peak of each phase, in the order in which they come."""
    stored = work.channels * work.stored_voxels * _FLOAT_BYTES
    cropped = work.channels * work.cropped_voxels * _FLOAT_BYTES
    prepared = work.channels * work.prepared_voxels * _FLOAT_BYTES
    logits = work.outputs * work.prepared_voxels * _FLOAT_BYTES
    held = PROCESS_BYTES + (stored if work.keeps_scan else 0)
    # Reading keeps one channel's raw and packed bytes; resampling keeps one channel on mixed grids.
    one_channel = 3 * max(work.stored_voxels, work.cropped_voxels, work.prepared_voxels) * _FLOAT_BYTES
    preparing = PROCESS_BYTES + stored + 2 * cropped + prepared + one_channel
    window = work.window_voxels * (2 * work.channels + 3 * work.outputs) * _FLOAT_BYTES
    calls = int(NETWORK_MARGIN * (network.fixed_bytes + choice.window_batch * network.per_window_bytes))
    working = 0 if work.on_device else calls + choice.window_batch * window
    predicting = held + 2 * prepared + logits + max(working, logits if work.is_padded else 0)
    labels = (work.cropped_voxels + 2 * work.stored_voxels) * work.label_bytes
    slab = max(choice.slab_bytes, work.plane_bytes)
    restoring = held + logits + prepared + labels + slab
    return {"preparing the scan": preparing, "predicting": predicting, "making the label map": restoring}


def choose(work: Workload, network: NetworkMemory, budget_bytes: int, *, preferred_batch: int) -> Choice:
    """Return the largest batch up to `preferred_batch`, and the largest slab, that stay within the budget.

    Raises:
        ResourceError: one window at a time and the thinnest slab are too much; the message tells each phase's need.
    """
    least = Choice(1, MIN_SLAB_BYTES)
    needs = phase_bytes(work, network, least)
    if max(needs.values()) > budget_bytes:
        raise ResourceError(
            f"this prediction needs {gib(max(needs.values()))} of memory ({_listed(needs)}); "
            f"{gib(budget_bytes)} are allowed. Allow more with --memory-gib, or crop the scan.",
            code="memory",
        )
    batch = next(
        size
        for size in range(max(1, min(preferred_batch, work.windows)), 0, -1)
        if phase_bytes(work, network, Choice(size, MIN_SLAB_BYTES))["predicting"] <= budget_bytes
    )
    spare = budget_bytes - needs["making the label map"]
    return Choice(batch, min(MIN_SLAB_BYTES + spare, MAX_SLAB_BYTES))


def budget_bytes(memory_gib: float) -> int:
    """Return the bytes of a budget.

    Raises:
        PlanError: it is not a positive number.
    """
    if not 0 < memory_gib < math.inf:
        raise PlanError(f"--memory-gib {memory_gib:g}: expected a number above 0, for example 8.", code="memory")
    return int(memory_gib * GIB)


def gib(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / GIB:.2f} GiB"


def _listed(needs: Mapping[str, int]) -> str:
    return ", ".join(f"{phase} {gib(count)}" for phase, count in needs.items())
