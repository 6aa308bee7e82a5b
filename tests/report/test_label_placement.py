"""Labels stay in their frame and off points, lines and each other wherever there is room."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.report.label_placement import Anchor, Box, place_labels

FRAME = Box(0.0, 0.0, 400.0, 300.0)
PIXELS = st.tuples(st.floats(20, 380), st.floats(20, 280))


def overlap(one: Box, other: Box) -> float:
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(0.0, width) * max(0.0, height)


def _mark(x: float, y: float) -> Box:
    return Box(x - 5, y - 5, x + 5, y + 5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(PIXELS, min_size=1, max_size=6), st.floats(10, 90))
def test_few_labels_never_collide(points: list[tuple[float, float]], width: float) -> None:
    marks = [_mark(x, y) for x, y in points]
    boxes = place_labels([Anchor(point, width, 12.0) for point in points], marks=marks, lines=[], frame=FRAME)
    assert all(box.right - box.left == pytest.approx(width) for box in boxes)
    assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
    assert not any(overlap(box, mark) for box in boxes for mark in marks)
    assert all(box.left >= 0 and box.top >= 0 and box.right <= 400 and box.bottom <= 300 for box in boxes)


def test_a_label_stands_to_the_right_of_its_point_where_nothing_hinders_it() -> None:
    (box,) = place_labels([Anchor((100.0, 100.0), 40.0, 12.0)], marks=[_mark(100.0, 100.0)], lines=[], frame=FRAME)
    assert box.left > 105
    assert (box.top + box.bottom) / 2 == pytest.approx(100)


def test_a_label_gets_out_of_the_way_of_a_line_and_of_the_frame() -> None:
    line = [(100.0, 100.0), (399.0, 100.0)]
    (box,) = place_labels([Anchor((100.0, 100.0), 40.0, 12.0)], marks=[_mark(100.0, 100.0)], lines=[line], frame=FRAME)
    assert not any(box.distance((float(x), 100.0)) == 0 for x in range(100, 400))
    (box,) = place_labels([Anchor((390.0, 100.0), 40.0, 12.0)], marks=[_mark(390.0, 100.0)], lines=[], frame=FRAME)
    assert box.right <= 390


def test_a_label_is_nearest_to_its_own_point() -> None:
    points = [(100.0, 100.0), (102.0, 92.0)]
    boxes = place_labels(
        [Anchor(point, 30.0, 12.0) for point in points],
        marks=[_mark(*point) for point in points],
        lines=[],
        frame=FRAME,
    )
    for index, box in enumerate(boxes):
        assert box.distance(points[index]) <= box.distance(points[1 - index]) + 1


def test_distances_from_boxes() -> None:
    box = Box(10.0, 10.0, 30.0, 20.0)
    assert box.distance((20.0, 15.0)) == 0
    assert box.distance((34.0, 23.0)) == pytest.approx(5)
