"""Connected components of two masks, and where those of one overlap those of the other.

A scan may hold hundreds of lesions, so nothing here visits the volume once per component, and most of the scan only
once: where there is nothing in a block of voxels, nothing else is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from scipy import ndimage

from sagittal.plan.base import Triple
from sagittal.volumes.crop import Box, bounding_box

Connectivity = Literal[6, 18, 26]
_BLOCK = 16
_RANK: dict[int, int] = {6: 1, 18: 2, 26: 3}
"""scipy's name for them: along how many axes a neighbour may differ."""


@dataclass(frozen=True)
class Components:
    """The components of one mask, in the order of their first voxels."""

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
    references, predictions, pairs = _Found(), _Found(), []
    for island in islands(reference | prediction, dilation_vox):
        own, other = island.cut(reference), island.cut(prediction)
        shared, owners = own & other, []
        for found, mask in ((references, own), (predictions, other)):
            numbers, count = number_components(mask, connectivity, dilation_vox)
            owners.append(numbers[shared].astype(np.int64) + (len(found.sizes) - 1))
            found.add(numbers, mask, count, island.box)
        pairs += shared_counts(owners[0], owners[1])
    first, second = references.ordered(), predictions.ordered()
    return Overlaps(
        first.components,
        second.components,
        tuple(
            Pair(r, p, n, n / (first.components.sizes[r] + second.components.sizes[p] - n))
            for r, p, n in sorted((first.places[r], second.places[p], n) for r, p, n in pairs)
        ),
    )


@dataclass(frozen=True)
class Island:
    """A part of a mask that is far from all others: nothing in it belongs together with anything outside."""

    box: Box
    own: Bool[np.ndarray, "d h w"]
    """Which voxels of the box may belong to it; the others are near another island."""

    def cut(self, mask: Bool[np.ndarray, "D H W"]) -> Bool[np.ndarray, "d h w"]:
        """Return the island's share of a mask."""
        share: Bool[np.ndarray, "d h w"] = mask[self.box.slices] & self.own
        return share


def islands(mask: Bool[np.ndarray, "D H W"], dilation_vox: int = 0) -> Iterator[Island]:
    """Yield the parts of a mask that stay apart even where it is dilated `dilation_vox` times.

    Lesions mostly fill a small part of a scan: what is done island by island costs what lesions cost, not what the scan
    does. The mask is looked at in blocks, and blocks that touch belong to one island; between two islands lies at least
    a whole block.
    """
    if not mask.size:
        return
    edge = max(_BLOCK, 2 * dilation_vox + 1)
    blocks = mask
    for axis in range(3):
        blocks = np.logical_or.reduceat(blocks, np.arange(0, mask.shape[axis], edge), axis=axis)
    numbers = np.empty(blocks.shape, np.int32)
    ndimage.label(blocks, np.ones((3, 3, 3)), output=numbers)
    for number, found in enumerate(ndimage.find_objects(numbers), start=1):
        own = numbers[found] == number
        start = [part.start * edge for part in found]
        stop = [min(part.stop * edge, length) for part, length in zip(found, mask.shape, strict=True)]
        for axis in range(3):
            own = own.repeat(edge, axis)
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        yield Island(box, own[: box.shape[0], : box.shape[1], : box.shape[2]])


class _Found:
    """Components of one mask as they are found, island after island."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.boxes: list[Box] = []
        self.first_voxels: list[tuple[int, ...]] = []

    def add(self, numbers: Int32[np.ndarray, "d h w"], mask: Bool[np.ndarray, "d h w"], count: int, place: Box) -> None:
        where = np.flatnonzero(mask)
        owners, firsts = np.unique(numbers.ravel()[where], return_index=True)
        assert owners.size == count
        voxels = np.stack(np.unravel_index(where[firsts], mask.shape), axis=1) + place.start
        self.first_voxels += [tuple(voxel) for voxel in voxels.tolist()]
        self.sizes += np.bincount(numbers.ravel()[where], minlength=count + 1)[1:].tolist()
        for found in ndimage.find_objects(numbers, count):
            start = [place.start[axis] + found[axis].start for axis in range(3)]
            stop = [place.start[axis] + found[axis].stop for axis in range(3)]
            self.boxes.append(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))

    def ordered(self) -> _Ordered:
        """Return them in the order of their first voxels."""
        order = sorted(range(len(self.sizes)), key=self.first_voxels.__getitem__)
        return _Ordered(
            Components(tuple(self.sizes[i] for i in order), tuple(self.boxes[i] for i in order)),
            {found: place for place, found in enumerate(order)},
        )


class _Ordered(NamedTuple):
    components: Components
    places: dict[int, int]
    """Where a component stands now, by its place in the order in which it was found."""


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
