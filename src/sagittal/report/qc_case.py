"""One predicted label map, measured without a reference: volumes, pieces, and where a class is cut off by the scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

from sagittal.evaluation.classes import ClassSet, present_values
from sagittal.plan.base import Frozen
from sagittal.volumes import read_labels, read_volume
from sagittal.volumes.crop import Box
from sagittal.volumes.geometry import Geometry, axis_codes
from sagittal.volumes.volume import require_same_grid

Side = str
"""An edge of the scan: head, foot, front, back, right, left, or 'start of D' where a file knows no patient's sides."""

NOTABLE_SHARE = 0.001
"""Pieces that hold less than this share of their class are specks, and not counted."""
_TOUCHING = np.ones((3, 3, 3), bool)
_MM3_PER_ML = 1000.0
_LEAST_SLICES = 3
"""An axis with fewer slices is all edge."""
_SIDES: dict[str, Side] = {"S": "head", "I": "foot", "A": "front", "P": "back", "R": "right", "L": "left"}
_OPPOSITE = dict(zip("SIAPRL", "ISPALR", strict=True))


class LabelMeasure(Frozen):
    """One class or region in one case."""

    volume_ml: float
    pieces: int
    """Connected components (voxels meet by a face, an edge or a corner) with at least 0.1 % of its voxels."""
    edges: tuple[Side, ...] = ()
    """Edges of the scan that it touches."""


class CaseMeasure(Frozen):
    """A label map in numbers."""

    labels: dict[str, LabelMeasure]
    """By name, in the order of the declaration."""
    undeclared: tuple[int, ...] = ()
    """Values in the file that no class names."""
    entropy: float | None = None
    """Mean entropy, 0 to 1, over the voxels of all classes; None where there is no map of it, or nothing was found."""


def measure_case(path: Path, classes: ClassSet, entropy: Path | None = None) -> CaseMeasure:
    """Read one label map and measure it.

    Args:
        path: label map.
        classes: what its values mean.
        entropy: map of the entropy of each voxel on the same grid, as `sagittal predict --entropy` writes it.

    Raises:
        DataError: a file can't be read, holds no labels, or the two lie on different grids.
    """
    stored, grid = read_labels(path)
    labels = classes.in_own_values(stored)
    values = present_values(labels)
    voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / _MM3_PER_ML
    boxes = _boxes(labels, [value for value in values if value in classes.foreground_values])
    return CaseMeasure(
        labels={label.name: _measure(labels, label.values, boxes, grid, voxel_ml) for label in classes.labels},
        undeclared=tuple(value for value in values if value not in classes.declared_values),
        entropy=None if entropy is None else _mean_entropy(labels, classes, grid, entropy),
    )


def _boxes(labels: Integer[np.ndarray, "D H W"], values: Sequence[int]) -> dict[int, Box]:
    """Return the bounding box of each value, in one pass over the label map."""
    if not values:
        return {}
    found = ndimage.find_objects(labels, max(values))
    boxes = {}
    for value in values:
        d, h, w = found[value - 1]
        boxes[value] = Box((d.start, h.start, w.start), (d.stop, h.stop, w.stop))
    return boxes


def _measure(
    labels: Integer[np.ndarray, "D H W"],
    values: Sequence[int],
    boxes: dict[int, Box],
    grid: Geometry,
    voxel_ml: float,
) -> LabelMeasure:
    own = [value for value in values if value in boxes]
    if not own:
        return LabelMeasure(volume_ml=0.0, pieces=0)
    box = boxes[own[0]]
    for value in own[1:]:
        box = box.union(boxes[value])
    part = labels[box.slices]
    mask = part == own[0] if len(own) == 1 else np.isin(part, own)
    voxels = int(mask.sum())
    numbered, found = ndimage.label(mask, _TOUCHING)
    sizes = np.bincount(numbered.reshape(-1), minlength=found + 1)[1:]
    return LabelMeasure(
        # To a thousandth of a cubic millimetre, as in prediction.json.
        volume_ml=round(voxels * voxel_ml, 6),
        pieces=int((sizes >= NOTABLE_SHARE * voxels).sum()),
        edges=_edges(box, grid),
    )


def _edges(box: Box, grid: Geometry) -> tuple[Side, ...]:
    codes = axis_codes(grid.affine)
    found: list[Side] = []
    for axis, name in enumerate("DHW"):
        if grid.shape[axis] < _LEAST_SLICES:
            continue
        ends: tuple[Side, Side] = (f"start of {name}", f"end of {name}")
        if grid.has_world:
            ends = _SIDES[_OPPOSITE[codes[axis]]], _SIDES[codes[axis]]
        if box.start[axis] == 0:
            found.append(ends[0])
        if box.stop[axis] == grid.shape[axis]:
            found.append(ends[1])
    return tuple(found)


def _mean_entropy(labels: Integer[np.ndarray, "D H W"], classes: ClassSet, grid: Geometry, path: Path) -> float | None:
    entropy = read_volume(path)
    require_same_grid(grid, entropy.geometry, f"label map and {path.name}")
    total, count = 0.0, 0
    values = sorted(classes.foreground_values)
    for plane, unsure in zip(labels, entropy.array[0], strict=True):
        inside = np.isin(plane, values)
        total += float(unsure[inside].sum(dtype=np.float64))
        count += int(inside.sum())
    return round(total / count, 6) if count else None
