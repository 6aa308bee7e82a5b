"""Where the labels of a plot's points go, so that none hides a point, a line or another label.

Each label tries some places around its point; in a few rounds, each takes the place that is in nobody's way, given
where the others are. Coordinates in pixels, y down. The result depends on nothing but the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Pixel = tuple[float, float]
Array = Float[np.ndarray, "..."]

_DISTANCES = (9.0, 14.0, 20.0, 30.0, 42.0)
_DIRECTIONS = (0, 180, 270, 90, 315, 225, 45, 135)
"""Degrees, clockwise from the right; the first that suits is taken."""
_ROUNDS = 8
_LINE_STEP = 3.0
_OUTSIDE, _ON_LABEL, _ON_MARK, _ON_LINE, _NEARER = 1e6, 100.0, 60.0, 25.0, 12.0
"""What a place costs: to leave the frame; each square pixel on a label or a mark; each 3 pixels of line covered; each
mark that is nearer than the label's own."""


class Box(NamedTuple):
    """A rectangle from (left, top) to (right, bottom)."""

    left: float
    top: float
    right: float
    bottom: float

    def distance(self, point: Pixel) -> float:
        """Return how far `point` is from the nearest place inside."""
        return math.dist(point, self.nearest(point))

    def nearest(self, point: Pixel) -> Pixel:
        """Return the place inside that is nearest to `point`."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.top), self.bottom)


@dataclass(frozen=True)
class Anchor:
    """A label to be placed: the size of its text and the point that it belongs to."""

    point: Pixel
    width: float
    height: float


def place_labels(
    anchors: Sequence[Anchor], *, marks: Sequence[Box], lines: Sequence[Sequence[Pixel]], frame: Box
) -> tuple[Box, ...]:
    """Return a box for each anchor.

    Args:
        anchors: labels, in the order in which they choose.
        marks: what is drawn at the points, the labels' own included.
        lines: polylines that labels should not cover.
        frame: where labels must be.
    """
    every_mark = np.array(marks, dtype=np.float64).reshape(-1, 4)
    on_lines = np.array([pixel for line in lines for pixel in _along(line)], dtype=np.float64).reshape(-1, 2)
    choices = [_candidates(anchor) for anchor in anchors]
    fixed = [
        _place_cost() + _standing_cost(boxes, anchor, every_mark, on_lines, frame)
        for boxes, anchor in zip(choices, anchors, strict=True)
    ]
    placed = np.array([boxes[0] for boxes in choices]).reshape(-1, 4)
    for _ in range(_ROUNDS):
        before = placed.copy()
        for index, boxes in enumerate(choices):
            others = np.delete(placed, index, axis=0)
            placed[index] = boxes[np.argmin(fixed[index] + _ON_LABEL * _overlaps(boxes, others))]
        if np.array_equal(placed, before):
            break
    return tuple(Box(*map(float, box)) for box in placed)


def _candidates(anchor: Anchor) -> Array:
    """Return boxes (places, 4) around a point, near ones first."""
    angles = np.radians(_DIRECTIONS)
    half = np.array([anchor.width, anchor.height]) / 2
    away = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    middles = np.concatenate([np.array(anchor.point) + away * (distance + half) for distance in _DISTANCES])
    return np.concatenate([middles - half, middles + half], axis=1)


def _place_cost() -> Array:
    """Return what distance and direction of each candidate cost (places,)."""
    distances = 4 * (np.array(_DISTANCES) - _DISTANCES[0])
    return np.asarray(np.add.outer(distances, np.arange(len(_DIRECTIONS)))).ravel()


def _standing_cost(boxes: Array, anchor: Anchor, marks: Array, on_lines: Array, frame: Box) -> Array:
    """Return what each of `boxes` costs wherever the other labels are (places,)."""
    low, high = boxes[:, :2], boxes[:, 2:]
    outside = np.maximum(0, np.array(frame[:2]) - low) + np.maximum(0, high - np.array(frame[2:]))
    covered = np.all((low[:, None] < on_lines) & (on_lines < high[:, None]), axis=-1)
    middles = (marks[:, :2] + marks[:, 2:]) / 2
    nearer = _distances(boxes, middles) < _distances(boxes, np.array([anchor.point])) - 1
    cost: Array = _OUTSIDE * outside.sum(axis=1) + _ON_MARK * _overlaps(boxes, marks)
    cost += _ON_LINE * covered.sum(axis=1) + _NEARER * nearer.sum(axis=1)
    return cost


def _overlaps(boxes: Array, others: Array) -> Array:
    """Return the area of each of `boxes` (n, 4) that lies under `others` (m, 4), each counted (n,)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    areas: Array = np.maximum(0, high - low).prod(axis=-1)
    return np.asarray(areas.sum(axis=1))


def _distances(boxes: Array, points: Array) -> Array:
    """Return how far each of `points` (m, 2) is from each of `boxes` (n, 4): (n, m)."""
    nearest = np.clip(points, boxes[:, None, :2], boxes[:, None, 2:])
    return np.asarray(np.linalg.norm(nearest - points, axis=-1))


def _along(line: Sequence[Pixel]) -> list[Pixel]:
    """Return points on a polyline, three pixels apart."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / _LINE_STEP))
        found += [(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps) for step in range(steps + 1)]
    return found
