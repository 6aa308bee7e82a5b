"""Outlines of a mask as closed polygons: halfway between voxels of the mask and others, holes joined by a keyhole.

A polygon's corners lie midway between the centres of neighbouring voxels, so that a voxel belongs to the mask exactly
where its centre is inside. A hole is joined to what is around it by a slit of no width (the keyhole of PS3.3,
C.8.8.6.3): one polygon then says the same to readers that fill by the even-odd rule, by winding number, or that unite
polygons. The slit runs a quarter of a voxel beside the centres, so that none lies on it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from jaxtyping import Bool, Float64

Polygon = Float64[np.ndarray, "_ 2"]
_SLIT = 0.25
_ABOVE = 2.0
"""More than any voxel of a mask has."""


def outlines(mask: Bool[np.ndarray, "H W"]) -> list[Polygon]:
    """Return the parts of a mask as polygons of (column, row) in voxels, the first point not repeated at the end."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    top, left = rows[0], columns[0]
    padded = np.zeros((rows[-1] - top + 3, columns[-1] - left + 3))
    padded[1:-1, 1:-1] = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    generator: Any = contour_generator(z=padded, fill_type=FillType.OuterOffset, name="serial")
    points, offsets = generator.filled(0.5, _ABOVE)
    polygons = []
    for corners, starts in zip(points, offsets, strict=True):
        rings = [corners[start : stop - 1] for start, stop in pairwise(starts.tolist())]
        outer, *holes = (_straightened(ring) for ring in rings)
        polygons.append(_joined(outer, holes) + np.array([left - 1.0, top - 1.0]))
    return polygons


def _straightened(ring: Polygon) -> Polygon:
    """Return a ring without the points that lie on the line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])


def _joined(outer: Polygon, holes: list[Polygon]) -> Polygon:
    """Return one polygon that goes round the holes too."""
    # The one that reaches furthest to the right first: what the slit of the next one meets is then joined already.
    for hole in sorted(holes, key=lambda ring: -float(ring[:, 0].max())):
        height = float(hole[hole[:, 0].argmax(), 1]) + _SLIT
        place, end = max(_crossings(hole, height), key=lambda crossing: crossing[1])
        meets = ((edge, column) for edge, column in _crossings(outer, height) if column > end)
        edge, start = min(meets, key=lambda crossing: crossing[1])
        inner = np.roll(hole, -(place + 1), axis=0)
        slit = np.array([[start, height], [end, height]])
        outer = np.concatenate([outer[: edge + 1], slit, inner, slit[::-1], outer[edge + 1 :]])
    return outer


def _crossings(ring: Polygon, height: float) -> list[tuple[int, float]]:
    """Return the edges that cross a height, by the number of their first point, and the column where they do."""
    first, second = ring, np.roll(ring, -1, axis=0)
    low, high = np.minimum(first[:, 1], second[:, 1]), np.maximum(first[:, 1], second[:, 1])
    edges = np.flatnonzero((low <= height) & (height < high))
    (x, y), (to_x, to_y) = first[edges].T, second[edges].T
    columns = x + (height - y) / (to_y - y) * (to_x - x)
    return list(zip(edges.tolist(), columns.tolist(), strict=True))
