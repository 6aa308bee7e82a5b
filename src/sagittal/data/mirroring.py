"""Which labels change places in a mirror: a mirrored left kidney is a right kidney.

A plan names such pairs by axis and label value (`Augmentation.swapped_labels`). Training swaps the indices of the
target's voxels, prediction swaps the channels of the network's output; both are one permutation per axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from sagittal.data.label_index import label_index
from sagittal.errors import PlanError
from sagittal.plan import DatasetSpec
from sagittal.plan.augmentation import Augmentation

Swaps: TypeAlias = Mapping[int, tuple[int, ...]]
"""For each axis that swaps anything: what index or channel each one becomes where that axis is mirrored."""


def label_swaps(spec: DatasetSpec, config: Augmentation) -> Swaps:
    """Return the swaps of label indices (data/label_index.py), the index of ignored voxels included.

    Raises:
        PlanError: a pair names a value that the data set does not declare.
    """
    index = label_index(spec)
    size = index.num_indices + (index.ignore_index is not None)
    swaps: dict[int, list[int]] = {}
    for axis, one, other in config.swapped_labels:
        unknown = sorted({one, other} - spec.foreground_values)
        if unknown:
            raise PlanError(
                f"training.augmentation.swapped_labels names label values {unknown}; expected two of "
                f"{sorted(spec.foreground_values)}, those of {spec.name}'s labels. Take the pair out.",
                code="swapped_labels",
            )
        table = swaps.setdefault(axis, list(range(size)))
        first, second = index.values.index(one), index.values.index(other)
        table[first], table[second] = second, first
    return {axis: tuple(table) for axis, table in swaps.items()}


def output_swaps(spec: DatasetSpec, config: Augmentation) -> Swaps:
    """Return the swaps of the network's output channels.

    Raises:
        PlanError: a pair names a value that the data set does not declare, or a swap makes of a region something that
            is no region of the data set.
    """
    tables = label_swaps(spec, config)
    if not spec.has_regions:
        return {axis: table[: spec.num_outputs] for axis, table in tables.items()}
    return {axis: _region_table(spec, config, axis) for axis in tables}


def composed(swaps: Swaps, axes: Iterable[int]) -> tuple[int, ...] | None:
    """Return what each index or channel becomes where all of `axes` are mirrored; None where all stay."""
    result: tuple[int, ...] | None = None
    for axis in axes:
        table = swaps.get(axis)
        if table is not None:
            result = table if result is None else tuple(table[value] for value in result)
    return None if result is None or result == tuple(range(len(result))) else result


def _region_table(spec: DatasetSpec, config: Augmentation, axis: int) -> tuple[int, ...]:
    partner = _partners((one, other) for of, one, other in config.swapped_labels if of == axis)
    regions = [frozenset(label.values) for label in spec.labels]
    table = []
    for position, (label, region) in enumerate(zip(spec.labels, regions, strict=True)):
        mirrored = frozenset(partner.get(value, value) for value in region)
        if mirrored not in regions:
            raise PlanError(
                f"training.augmentation.swapped_labels makes of the region '{label.name}' {list(label.values)} the "
                f"values {sorted(mirrored)}; expected a region of {spec.name}. Take axis {axis} out of "
                "training.augmentation.mirror_axes and the pairs out of swapped_labels.",
                code="swapped_labels",
            )
        table.append(position if mirrored == region else regions.index(mirrored))
    return tuple(table)


def _partners(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    return {value: partner for one, other in pairs for value, partner in ((one, other), (other, one))}
