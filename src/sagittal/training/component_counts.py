"""Voxels of each component of a held-out prediction, counted once, so that rules can be scored without voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from sagittal.inference.postprocessing import Target, boxes_of, components, holes_of, joint_box, target_of
from sagittal.plan import DatasetSpec
from sagittal.plan.base import TripleMm

_MM3_PER_ML = 1000.0
_MAX_VALUE = 65535

CaseCounts = Int64[np.ndarray, "L 3"]
"""For each label of a case: voxels that both have, that the prediction has, that the reference has."""


@dataclass(frozen=True)
class Parts:
    """The components (or holes) of one target in one case, and what each would change where it goes (or is filled).

    Attributes:
        sizes: voxels of each.
        volumes_ml: the same in mL.
        is_false: no voxel of it belongs to the target in the reference.
        changes: (parts, labels, 2): what is added to the voxels that both have and that the prediction has.
    """

    sizes: Int64[np.ndarray, " n"]
    volumes_ml: Float64[np.ndarray, " n"]
    is_false: Bool[np.ndarray, " n"]
    changes: Int64[np.ndarray, "n L 2"]


class Counts:
    """The counts of all cases, (cases, labels, 3), and the Dice that they make."""

    def __init__(self, cases: Sequence[CaseCounts]) -> None:
        self.table = np.stack(list(cases))

    def changed(self, parts: Sequence[Parts], goes: Callable[[Parts], Bool[np.ndarray, " n"]]) -> Counts | None:
        """Return the counts after some parts went, None where none did."""
        table, anything = self.table.copy(), False
        for row, part in zip(table, parts, strict=True):
            chosen = goes(part)
            if chosen.any():
                anything = True
                row[:, :2] += part.changes[chosen].sum(axis=0)
        return Counts(list(table)) if anything else None

    @cached_property
    def dice(self) -> Float64[np.ndarray, "N L"]:
        """Dice by case and label, NaN where a label is in neither label map."""
        total = self.table[..., 1] + self.table[..., 2]
        with np.errstate(invalid="ignore"):
            return np.asarray(2.0 * self.table[..., 0] / np.where(total > 0, total, np.nan))

    @cached_property
    def means(self) -> Float64[np.ndarray, " L"]:
        """Mean Dice of each label over the cases that have it, NaN where none has."""
        known = ~np.isnan(self.dice)
        sums, counts = np.where(known, self.dice, 0.0).sum(axis=0), known.sum(axis=0)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    @cached_property
    def mean(self) -> float:
        """Mean over labels, 0 where none is known."""
        known = self.means[~np.isnan(self.means)]
        return float(known.mean()) if known.size else 0.0


def count_case(
    spec: DatasetSpec, reference: Integer[np.ndarray, "D H W"], prediction: Integer[np.ndarray, "D H W"]
) -> CaseCounts:
    """Count the voxels of every label; those that the reference ignores count for nothing."""
    pairs = _joint_histogram(spec, reference, prediction)
    member = _membership(spec)
    both = np.einsum("li,ij,lj->l", member, pairs, member)
    return np.stack([both, member @ pairs.sum(axis=0), member @ pairs.sum(axis=1)], axis=1)


def parts_of(
    spec: DatasetSpec,
    reference: Integer[np.ndarray, "D H W"],
    prediction: Integer[np.ndarray, "D H W"],
    spacing_mm: TripleMm,
    targets: Mapping[str, Sequence[str]],
    *,
    fill: bool,
) -> dict[str, Parts]:
    """Return the components, or the holes, of some targets in a case.

    Args:
        spec: without a `label_map`: label maps hold the values of the data set's files.
        reference, prediction: label maps.
        spacing_mm: D, H, W.
        targets: the labels of each, by a name; see `target_of`.
        fill: whether holes are wanted.
    """
    boxes = boxes_of(prediction)
    voxel_ml = float(np.prod(spacing_mm)) / _MM3_PER_ML
    found = {}
    for key, names in targets.items():
        target = target_of(spec, names)
        box = joint_box(target, boxes)
        if box is None:
            found[key] = _nothing(spec)
            continue
        wanted, given = reference[box.slices], prediction[box.slices]
        numbered = _holes if fill else components
        found[key] = _counted(spec, target, wanted, given, numbered(given, target)[0], voxel_ml, fill=fill)
    return found


def _holes(labels: Integer[np.ndarray, "d h w"], target: Target) -> tuple[Integer[np.ndarray, "d h w"]]:
    # All of them are filled or none: they need no numbers.
    return (holes_of(labels, target).astype(np.int32),)


def _nothing(spec: DatasetSpec) -> Parts:
    none = np.zeros(0, np.int64)
    return Parts(none, none.astype(np.float64), none.astype(bool), np.zeros((0, len(spec.labels), 2), np.int64))


def _counted(
    spec: DatasetSpec,
    target: Target,
    reference: Integer[np.ndarray, "d h w"],
    prediction: Integer[np.ndarray, "d h w"],
    ids: Integer[np.ndarray, "d h w"],
    voxel_ml: float,
    *,
    fill: bool,
) -> Parts:
    inside = ids > 0
    numbers, was, true = ids[inside] - 1, prediction[inside], reference[inside]
    count = int(numbers.max(initial=-1)) + 1
    sizes = np.bincount(numbers, minlength=count)
    known = np.ones(true.shape, dtype=bool) if spec.ignore_value is None else true != spec.ignore_value
    hits = np.isin(true, target.values) & known
    changes = np.zeros((count, len(spec.labels), 2), np.int64)
    for value, new in (dict.fromkeys(target.fillable, target.filled) if fill else target.removed).items():
        here = known & (was == value)
        found, wanted = numbers[here], true[here]
        for position, label in enumerate(spec.labels):
            step = int(new in label.values) - int(value in label.values)
            if step:
                right = found[np.isin(wanted, label.values)]
                changes[:, position, 0] += step * np.bincount(right, minlength=count)
                changes[:, position, 1] += step * np.bincount(found, minlength=count)
    return Parts(
        sizes=sizes,
        volumes_ml=sizes * voxel_ml,
        is_false=np.bincount(numbers[hits], minlength=count) == 0,
        changes=changes,
    )


def _membership(spec: DatasetSpec) -> Int64[np.ndarray, "L I"]:
    """Return which of 0 and the foreground values, ascending, each label has."""
    values = (0, *sorted(spec.foreground_values))
    return np.array([[value in label.values for value in values] for label in spec.labels], np.int64)


def _joint_histogram(
    spec: DatasetSpec, reference: Integer[np.ndarray, "D H W"], prediction: Integer[np.ndarray, "D H W"]
) -> Int64[np.ndarray, "I I"]:
    """Count the voxels of each pair of values, reference first; of undeclared ones as of 0."""
    values = sorted(spec.foreground_values)
    table = np.zeros(_MAX_VALUE + 1, np.intp)
    table[values] = np.arange(1, len(values) + 1)
    side = len(values) + 1
    pairs = np.zeros(side * side, np.int64)
    for true, given in zip(reference, prediction, strict=True):
        # Look-ups make eight bytes per voxel: a plane at a time keeps them small.
        codes = table[np.clip(true, 0, _MAX_VALUE)] * side + table[np.clip(given, 0, _MAX_VALUE)]
        if spec.ignore_value is not None:
            codes = codes[true != spec.ignore_value]
        pairs += np.bincount(codes.ravel(), minlength=side * side)
    return pairs.reshape(side, side)
