"""Surfaces as elements with an area: the surface that marching cubes draws, one element per corner between voxels.

Eight voxels meet in a corner. Where some are inside and some outside, the surface passes between them: it cuts the cube
of their centres in polygons through the middles of those edges that lead from inside to outside, and their area is the
element's. A count of surface voxels instead takes a slanted surface for a smaller one, and on thick slices weighs all
directions alike.

Two rules make the polygons definite, and with them the areas are those of DeepMind's surface-distance (Nikolov et al.,
Journal of Medical Internet Research 23, 2021): where a face of the cube has both diagonals mixed, the corners of the
rarer kind in the cube (inside, if both are four) are cut off one by one; and a polygon that isn't flat is cut into
those triangles that have the greatest area in a cube of side 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from sagittal.evaluation.distances import nearest_mm
from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.plan.base import TripleMm
from sagittal.volumes.crop import bounding_box

Point = tuple[int, int, int]
"""In half sides of the cube, so that a corner has coordinates of 0 and 2 and the middle of an edge is whole too."""
Polygon = tuple[Point, ...]

_CORNERS: tuple[Point, ...] = tuple((2 * d, 2 * h, 2 * w) for d, h, w in itertools.product((0, 1), repeat=3))
"""In the order of their bits in a code."""
_CODES = 256
_FULL = 255
_MOST_TRIANGLES = 4


class SurfelDistances(NamedTuple):
    """Of each surface element of one mask its distance to the nearest of the other, and its area; unordered."""

    from_reference_mm: Float64[np.ndarray, " R"]
    reference_mm2: Float64[np.ndarray, " R"]
    from_prediction_mm: Float64[np.ndarray, " P"]
    prediction_mm2: Float64[np.ndarray, " P"]

    @property
    def hd95_mm(self) -> float:
        """The larger of the two distances within which 95 % of a surface's area lie."""
        return max(
            _distance_of_share(self.from_reference_mm, self.reference_mm2, 0.95),
            _distance_of_share(self.from_prediction_mm, self.prediction_mm2, 0.95),
        )

    def nsd(self, tolerance_mm: float) -> float:
        """Return the share of both surfaces' area whose distance is at most `tolerance_mm`."""
        within = self.reference_mm2[self.from_reference_mm <= tolerance_mm].sum()
        within += self.prediction_mm2[self.from_prediction_mm <= tolerance_mm].sum()
        return float(within / (self.reference_mm2.sum() + self.prediction_mm2.sum()))


def _distance_of_share(
    distances_mm: Float64[np.ndarray, " N"], areas: Float64[np.ndarray, " N"], share: float
) -> float:
    order = np.argsort(distances_mm, kind="stable")
    summed = np.cumsum(areas[order])
    place = int(np.searchsorted(summed / summed[-1], share))
    return float(distances_mm[order[min(place, len(order) - 1)]])


def surfel_distances_mm(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> SurfelDistances | None:
    """Measure the distances between the surface elements of two boolean masks (D, H, W).

    Args:
        reference: boolean mask (D, H, W).
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order.

    Returns:
        Distances between corners, where beyond the image is outside; None where either mask is empty.

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.
    """
    check_masks(reference, prediction)
    spacing = check_spacing(spacing_mm)
    boxes = bounding_box(reference), bounding_box(prediction)
    if boxes[0] is None or boxes[1] is None:
        return None
    joint = boxes[0].union(boxes[1]).slices
    areas = areas_mm2(spacing)
    codes = corner_codes(reference[joint])
    of_reference = (codes != 0) & (codes != _FULL)
    reference_mm2 = areas[codes[of_reference]]
    codes = corner_codes(prediction[joint])
    of_prediction = (codes != 0) & (codes != _FULL)
    return SurfelDistances(
        from_reference_mm=nearest_mm(of_reference, of_prediction, spacing),
        reference_mm2=reference_mm2,
        from_prediction_mm=nearest_mm(of_prediction, of_reference, spacing),
        prediction_mm2=areas[codes[of_prediction]],
    )


def corner_codes(mask: Bool[np.ndarray, "D H W"]) -> UInt8[np.ndarray, "D+1 H+1 W+1"]:
    """Return for every corner of voxels which of the eight around it are inside, a bit each."""
    codes = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for bit, corner in enumerate(_CORNERS):
        # The voxel that lies towards the cube's far side of a corner starts at that corner, its neighbour one earlier.
        window = tuple(slice(1 - at // 2, 1 - at // 2 + size) for at, size in zip(corner, mask.shape, strict=True))
        codes[window] |= mask.view(np.uint8) << np.uint8(bit)
    return codes


def areas_mm2(spacing_mm: TripleMm) -> Float64[np.ndarray, " codes"]:
    """Return the area of the surface element of every code, for voxels of this size."""
    d, h, w = spacing_mm
    scaled = _normals() * np.array([h * w, d * w, d * h])
    areas: Float64[np.ndarray, " codes"] = np.sqrt((scaled**2).sum(-1)).sum(-1)
    return areas


@cache
def _normals() -> Float64[np.ndarray, "codes triangles 3"]:
    """Return the normal of every triangle, as long as its area is large, in a cube of side 1; 0 where there is none."""
    table = np.zeros((_CODES, _MOST_TRIANGLES, 3))
    for code in range(_CODES):
        inside = frozenset(corner for bit, corner in enumerate(_CORNERS) if code >> bit & 1)
        triangles = [triangle for polygon in _polygons(inside) for triangle in _cut(polygon)]
        for place, triangle in enumerate(triangles):
            table[code, place] = _normal(triangle)
    return table


def _polygons(inside: frozenset[Point]) -> list[Polygon]:
    """Return the polygons that part the corners of a cube that are inside from those that are outside."""
    rarer = inside if len(inside) <= len(_CORNERS) // 2 else frozenset(_CORNERS) - inside
    links: dict[Point, list[Point]] = {}
    for axis, side in itertools.product(range(3), (0, 2)):
        for one, other in _segments(_face(axis, side), rarer):
            links.setdefault(one, []).append(other)
            links.setdefault(other, []).append(one)
    found = []
    while links:
        # Every middle lies on two faces, so that it has two links and each walk comes back to its start.
        path = [next(iter(links))]
        while following := [point for point in links.pop(path[-1]) if point in links]:
            path.append(following[0])
        found.append(tuple(path))
    return found


def _face(axis: int, side: int) -> list[Point]:
    """Return the four corners of a face, in a ring."""
    face = [corner for corner in _CORNERS if corner[axis] == side]
    return [face[0], face[1], face[3], face[2]]


def _segments(ring: Sequence[Point], rarer: frozenset[Point]) -> list[tuple[Point, Point]]:
    """Return where the surface crosses a face: lines between the middles of two of its edges."""
    middles = [_middle(ring[place], ring[(place + 1) % 4]) for place in range(4)]
    cut = [(ring[place] in rarer) != (ring[(place + 1) % 4] in rarer) for place in range(4)]
    if sum(cut) == 2:
        one, other = (middle for middle, is_cut in zip(middles, cut, strict=True) if is_cut)
        return [(one, other)]
    if sum(cut) == 4:
        return [(middles[place - 1], middles[place]) for place in range(4) if ring[place] in rarer]
    return []


def _middle(one: Point, other: Point) -> Point:
    return (one[0] + other[0]) // 2, (one[1] + other[1]) // 2, (one[2] + other[2]) // 2


def _cut(polygon: Polygon) -> list[Polygon]:
    """Return the triangles of a polygon: of all ways to cut it the first of those with the greatest area."""
    return max(_ways_to_cut(polygon), key=lambda triangles: round(sum(math.hypot(*_normal(t)) for t in triangles), 9))


def _ways_to_cut(polygon: Polygon) -> Iterator[list[Polygon]]:
    if len(polygon) < 3:
        yield []
        return
    # The edge from the last point to the first belongs to one triangle, whose tip may be any other point.
    for tip in range(1, len(polygon) - 1):
        for before in _ways_to_cut(polygon[: tip + 1]):
            for after in _ways_to_cut(polygon[tip:]):
                yield [*before, (polygon[0], polygon[tip], polygon[-1]), *after]


@cache
def _normal(triangle: Polygon) -> tuple[float, float, float]:
    first, second, third = triangle
    a, b, c = (to - at for at, to in zip(first, second, strict=True))
    d, e, f = (to - at for at, to in zip(first, third, strict=True))
    # Half of the product is the triangle's; another quarter for points given in half sides.
    return (b * f - c * e) / 8, (c * d - a * f) / 8, (a * e - b * d) / 8
