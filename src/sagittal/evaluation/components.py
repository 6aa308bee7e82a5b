"""Connected components of two masks, and where those of one overlap those of the other.

A scan may hold hundreds of lesions, so nothing here visits the volume once per component: one pass numbers them, and
what is needed of each is counted over the voxels of the masks alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64
from scipy import ndimage

from sagittal.plan.base import Triple
from sagittal.volumes.crop import Box, bounding_box

Connectivity = Literal[6, 18, 26]
_RANK: dict[int, int] = {6: 1, 18: 2, 26: 3}
"""scipy's name for them: along how many axes a neighbour may differ."""


@dataclass(frozen=True)
class Components:
    """The components of one mask, in the order in which a pass through the array meets them."""

    sizes: tuple[int, ...]
    """Voxels."""
    boxes: tuple[Box, ...]
    """Bounding boxes in the image, of their own voxels."""

    def centre_vox(self, number: int) -> Triple:
        """Return the middle voxel of a component's box."""
        (a, b, c), (d, e, f) = self.boxes[number].start, self.boxes[number].stop
        return (a + d - 1) // 2, (b + e - 1) // 2, (c + f - 1) // 2


@dataclass(frozen=True)
class Pair:
    """A component of the reference and one of the prediction that share voxels; both counted from 0."""

    reference: int
    prediction: int
    shared: int
    """Voxels that both have."""
    iou: float


@dataclass(frozen=True)
class Overlaps:
    """The components of both masks and every pair that shares a voxel, by reference, then prediction."""

    reference: Components
    prediction: Components
    pairs: tuple[Pair, ...]


def overlapping_components(
    reference: Bool[np.ndarray, "D H W"],
    prediction: Bool[np.ndarray, "D H W"],
    connectivity: Connectivity,
    dilation_vox: int = 0,
) -> Overlaps:
    """Return the components of both masks and which of them overlap.

    Args:
        reference: mask.
        prediction: mask of the same shape.
        connectivity: neighbours by which voxels belong together.
        dilation_vox: components that meet where each mask is dilated so many times are one; voxels stay as they are.
    """
    both = joint_box(reference, prediction)
    if both is None:
        none = Components((), ())
        return Overlaps(none, none, ())
    reference, prediction = reference[both.slices], prediction[both.slices]
    shared = reference & prediction
    # One numbered volume at a time: it takes four bytes per voxel.
    owners, components = [], []
    for mask in (reference, prediction):
        numbers, count = number_components(mask, connectivity, dilation_vox)
        owners.append(numbers[shared].astype(np.int64) - 1)
        components.append(components_of(numbers, mask, count, both))
    pairs = tuple(
        Pair(r, p, n, n / (components[0].sizes[r] + components[1].sizes[p] - n))
        for r, p, n in shared_counts(owners[0], owners[1])
    )
    return Overlaps(components[0], components[1], pairs)


def joint_box(reference: Bool[np.ndarray, "D H W"], prediction: Bool[np.ndarray, "D H W"]) -> Box | None:
    """Return the box of both masks, None where both are empty.

    Dilation needs no margin around it: a way that two components grow together beyond the box has its shadow on the
    box's border, which is no longer.
    """
    boxes = [box for box in map(bounding_box, (reference, prediction)) if box is not None]
    return boxes[0].union(boxes[-1]) if boxes else None


def number_components(
    mask: Bool[np.ndarray, "D H W"], connectivity: Connectivity, dilation_vox: int = 0
) -> tuple[Int32[np.ndarray, "D H W"], int]:
    """Return the number of each voxel's component, from 1, 0 outside of the mask, and how many there are.

    With `dilation_vox` they are the components of the dilated mask, cut down to the mask itself.
    """
    structure = ndimage.generate_binary_structure(3, _RANK[connectivity])
    numbers = np.empty(mask.shape, np.int32)
    if not dilation_vox:
        return numbers, ndimage.label(mask, structure, output=numbers)
    count = ndimage.label(dilate(mask, connectivity, dilation_vox), structure, output=numbers)
    numbers[~mask] = 0
    return numbers, count


def components_of(
    numbers: Int32[np.ndarray, "D H W"], mask: Bool[np.ndarray, "D H W"], count: int, place: Box
) -> Components:
    """Return sizes and boxes of numbered components; `place` is where the arrays lie in the image."""
    sizes = np.bincount(numbers[mask], minlength=count + 1)[1:]
    boxes = []
    for found in ndimage.find_objects(numbers, count):
        start = [place.start[axis] + found[axis].start for axis in range(3)]
        stop = [place.start[axis] + found[axis].stop for axis in range(3)]
        boxes.append(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return Components(tuple(sizes.tolist()), tuple(boxes))


def shared_counts(first: Int64[np.ndarray, " n"], second: Int64[np.ndarray, " n"]) -> list[tuple[int, int, int]]:
    """Return every pair of values that stand at one place, from 0, and at how many places; in ascending order."""
    if not first.size:
        return []
    width = int(second.max()) + 1
    keys, counts = np.unique(first * width + second, return_counts=True)
    return [(int(key) // width, int(key) % width, int(count)) for key, count in zip(keys, counts, strict=True)]


def dilate(mask: Bool[np.ndarray, "D H W"], connectivity: Connectivity, times: int) -> Bool[np.ndarray, "D H W"]:
    """Return the mask grown `times` by its 6, 18 or 26 neighbours; what grows beyond the array is lost.

    The same as scipy's `binary_dilation` with `iterations=times`, made of shifts along axes: several times faster.
    """
    for _ in range(times):
        mask = _dilate_once(mask, connectivity)
    return mask


def _dilate_once(mask: Bool[np.ndarray, "D H W"], connectivity: Connectivity) -> Bool[np.ndarray, "D H W"]:
    along_w = _grown(mask, 2)
    if connectivity == 26:
        return _grown(_grown(along_w, 1), 0)
    along_h = _grown(mask, 1)
    grown: Bool[np.ndarray, "D H W"]
    if connectivity == 6:
        grown = along_w | along_h
        grown |= _grown(mask, 0)
        return grown
    # 18 neighbours differ along two axes at the most: the union of three squares.
    grown = _grown(along_w, 1)
    grown |= _grown(along_w, 0)
    grown |= _grown(along_h, 0)
    return grown


def _grown(mask: Bool[np.ndarray, "D H W"], axis: int) -> Bool[np.ndarray, "D H W"]:
    grown: Bool[np.ndarray, "D H W"] = mask.copy()
    before, after = [slice(None)] * 3, [slice(None)] * 3
    before[axis], after[axis] = slice(None, -1), slice(1, None)
    grown[tuple(after)] |= mask[tuple(before)]
    grown[tuple(before)] |= mask[tuple(after)]
    return grown
