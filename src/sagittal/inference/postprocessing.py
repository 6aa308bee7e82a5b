"""The rules of `plan.postprocessing` applied to a label map; numpy and scipy alone.

Each rule works inside the bounding box of its labels and needs five bytes for each voxel of that box beside the map. No
rule depends on the order of axes or on which of two equal components comes first, so a scan has the same result in any
orientation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer
from scipy import ndimage

from sagittal.plan import DatasetSpec, Plan
from sagittal.plan.base import TripleMm
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume, Rule
from sagittal.volumes import Volume
from sagittal.volumes.crop import Box, bounding_box

_TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels of a component meet by a face, an edge or a corner."""
_BY_FACES = ndimage.generate_binary_structure(3, 1)
"""What is around them is connected by faces alone, so that a wall which holds together lets nothing through."""
_CHUNK_VOXELS = 1 << 21
_CHUNK_BYTES = 16 * _CHUNK_VOXELS
"""What look-ups and counts in such a chunk make: eight bytes for each index."""
_BYTES_PER_VOXEL = 5
"""A mask and the number of a component."""
_MM3_PER_ML = 1000.0
_ROUNDING = 1e-9
"""Share of a volume by which a product of spacings may differ between orders of axes."""


@dataclass(frozen=True)
class Target:
    """What label values a rule is about, and what becomes of them; make it with `target_of`.

    Attributes:
        values: values of the label map that belong to it.
        removed: what each of them becomes where it is removed.
        filled: what a hole of it becomes.
        fillable: values that a hole may have to be filled.
    """

    values: tuple[int, ...]
    removed: Mapping[int, int] = field(hash=False)
    filled: int
    fillable: tuple[int, ...]


def apply(
    labels: Integer[np.ndarray, "D H W"], rules: Sequence[Rule], spacing_mm: TripleMm, spec: DatasetSpec
) -> Integer[np.ndarray, "D H W"]:
    """Return the label map after the rules, each applied to what the one before it left.

    Where a component of a region is removed, its voxels become what they are without the region and those inside of it:
    mostly a part of its parent. So regions stay within their parents.

    Args:
        labels: values as predictions hold them (`DatasetSpec.label_map` already applied), in any order of axes.
        rules: see `plan.postprocessing`.
        spacing_mm: D, H, W.
        spec: what the values mean.

    Returns:
        A new array of the same type, or `labels` itself where there are no rules.
    """
    if not rules:
        return labels
    result = labels.copy()
    voxel_ml = float(np.prod(spacing_mm)) / _MM3_PER_ML
    boxes = boxes_of(result)
    for rule in rules:
        target = target_of(spec, rule.labels if isinstance(rule, LargestComponent) else (rule.label,))
        box = joint_box(target, boxes)
        if box is None:
            continue
        part = result[box.slices]
        if isinstance(rule, FillHoles):
            part[holes_of(part, target)] = target.filled
        else:
            _remove(part, target, rule, voxel_ml)
        # A new value appears only inside the box of the rule.
        for value in {target.filled, *target.removed.values()} - {0}:
            boxes[value] = boxes[value].union(box) if value in boxes else box
    return result


def postprocess(labels: Volume, plan: Plan) -> Volume:
    """Return a predicted label map, (1, D, H, W), after the rules of the plan."""
    if not plan.postprocessing:
        return labels
    return labels.with_array(apply(labels.array[0], plan.postprocessing, labels.spacing_mm, plan.dataset))


def rules_bytes(labels: int, voxels: int) -> int:
    """Return the memory that rules take at most beside a label map of `labels` bytes and `voxels` voxels: its copy, and
    masks and components where a label's box is the whole scan."""
    return labels + _BYTES_PER_VOXEL * voxels + _CHUNK_BYTES


def target_of(spec: DatasetSpec, names: Sequence[str]) -> Target:
    """Return what rules on these labels are about; no name stands for all of the foreground."""
    originals = dict(spec.label_map)

    def written(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(originals.get(value, value) for value in values)

    order = spec.regions_class_order or tuple(label.values[0] for label in spec.labels)
    if not names:
        values = sorted(spec.foreground_values | set(order))
        return Target(written(values), dict.fromkeys(written(values), 0), 0, ())
    chosen = [position for position, label in enumerate(spec.labels) if label.name in names]
    union = frozenset(value for position in chosen for value in spec.labels[position].values)
    outer = [(label, value) for label, value in zip(spec.labels, order, strict=True) if not set(label.values) <= union]
    removed = {}
    for value in sorted(union):
        # As it is decoded: of the regions that are left, the last one writes.
        left = [written_value for label, written_value in outer if value in label.values and written_value not in union]
        removed[value] = left[-1] if left else 0
    own = order[chosen[-1]] if order[chosen[-1]] in union else min(union)
    others = spec.foreground_values - union
    covered_by = {value: [label for label in spec.labels if value in label.values] for value in others}
    parents = [v for v in sorted(others) if all(union < set(label.values) for label in covered_by[v])]
    return Target(
        values=written(sorted(union)),
        removed=dict(zip(written(tuple(removed)), written(tuple(removed.values())), strict=True)),
        filled=written((own,))[0],
        fillable=(0, *written(parents)),
    )


def components(
    labels: Integer[np.ndarray, "d h w"], target: Target
) -> tuple[Int32[np.ndarray, "d h w"], Int64[np.ndarray, " n"]]:
    """Return the number of the component that each voxel belongs to, 0 for none, and the voxels of each number."""
    ids = np.empty(labels.shape, np.int32)
    count = ndimage.label(mask_of(labels, target.values), _TOUCHING, output=ids)
    return ids, _sizes(ids, count)


def is_below(sizes: Int64[np.ndarray, " n"], volume_ml: float, voxel_ml: float) -> Bool[np.ndarray, " n"]:
    """Return which components, by their voxels, are smaller than a volume."""
    return np.asarray(sizes * voxel_ml < volume_ml * (1 - _ROUNDING))


def _remove(
    labels: Integer[np.ndarray, "d h w"], target: Target, rule: LargestComponent | MinimumVolume, voxel_ml: float
) -> None:
    """Take components out of a label map in place."""
    ids, sizes = components(labels, target)
    goes = sizes < sizes.max() if isinstance(rule, LargestComponent) else is_below(sizes, rule.volume_ml, voxel_ml)
    goes[0] = False
    if not goes.any():
        return
    for part, numbers in zip(_chunks(labels), _chunks(ids), strict=True):
        chosen = goes[numbers]
        if not chosen.any():
            continue
        was = part[chosen]
        new = was.copy()
        for value, instead in target.removed.items():
            new[was == value] = instead
        part[chosen] = new


def holes_of(labels: Integer[np.ndarray, "d h w"], target: Target) -> Bool[np.ndarray, "d h w"]:
    """Return what a target encloses and may be filled; `labels` are those in the target's bounding box."""
    around = ~mask_of(labels, target.values)
    ids = np.empty(labels.shape, np.int32)
    count = ndimage.label(around, _BY_FACES, output=ids)
    is_hole = np.ones(count + 1, dtype=bool)
    is_hole[0] = False
    for axis in range(3):
        for face in (0, -1):
            is_hole[np.take(ids, face, axis=axis)] = False
    holes = around
    if not is_hole.any():
        holes[...] = False
        return holes
    for part, numbers, hole in zip(_chunks(labels), _chunks(ids), _chunks(holes), strict=True):
        np.logical_and(is_hole[numbers], mask_of(part, target.fillable), out=hole)
    return holes


def mask_of(labels: Integer[np.ndarray, "*d"], values: Sequence[int]) -> Bool[np.ndarray, "*d"]:
    """Return where a label map has one of these values."""
    if len(values) == 1:
        return np.asarray(labels == values[0])
    found = np.empty(labels.shape, bool)
    for part, inside in zip(_chunks(labels), _chunks(found), strict=True):
        # Looked up in a table, with eight bytes for each voxel.
        inside[...] = np.isin(part, values)
    return found


def boxes_of(labels: Integer[np.ndarray, "D H W"]) -> dict[int, Box]:
    """Return the bounding box of every value other than 0 that a label map has."""
    if labels.dtype.kind == "u" and labels.dtype.itemsize <= 2:
        # One pass for all values.
        found = ndimage.find_objects(labels)
        return {
            value: Box((d.start, h.start, w.start), (d.stop, h.stop, w.stop))
            for value, (d, h, w) in ((value, box) for value, box in enumerate(found, start=1) if box is not None)
        }
    values = {int(value) for plane in labels for value in np.unique(plane)} - {0}
    boxes = {value: bounding_box(labels == value) for value in sorted(values)}
    return {value: box for value, box in boxes.items() if box is not None}


def joint_box(target: Target, boxes: Mapping[int, Box]) -> Box | None:
    """Return the smallest box that holds every voxel of a target, None where there is none."""
    present = [boxes[value] for value in target.values if value in boxes]
    return reduce(Box.union, present) if present else None


def _sizes(ids: Int32[np.ndarray, "d h w"], count: int) -> Int64[np.ndarray, " n"]:
    sizes = np.zeros(count + 1, np.int64)
    for numbers in _chunks(ids):
        # Counting makes a copy of eight bytes per voxel.
        sizes += np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    return sizes


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views of a few planes each."""
    planes = max(1, _CHUNK_VOXELS // max(1, array[0].size))
    for start in range(0, len(array), planes):
        yield array[start : start + planes]
