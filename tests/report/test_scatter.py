"""The picture of parameters against Dice: every point where its figures say, every name readable."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import pytest

from sagittal.report.label_placement import Box
from sagittal.report.published import SCORE_SETS, Score, ScoreSet, Size
from sagittal.report.scatter import HEIGHT, WIDTH, Plot, parameter_ticks, picture, plot


def overlap(one: Box, other: Box) -> float:
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(0.0, width) * max(0.0, height)


PLOTS = {scores.title: plot(scores) for scores in SCORE_SETS}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("drawn", PLOTS.values(), ids=PLOTS.keys())
def test_points_lie_where_their_figures_say(drawn: Plot) -> None:
    (first, x0), (last, x1) = parameter_ticks()[0], parameter_ticks()[-1]
    assert len(drawn.marks) == len(drawn.scores.drawn) > 1
    for mark in drawn.marks:
        assert 0 < mark.x < WIDTH and 0 < mark.y < HEIGHT
        assert mark.score.size is not None
        millions = first * (last / first) ** ((mark.x - x0) / (x1 - x0))
        assert millions == pytest.approx(mark.score.size.millions)
        dice = drawn.y.low + (1 - mark.y / HEIGHT) * (drawn.y.high - drawn.y.low)
        assert dice == pytest.approx(mark.score.dice)


@pytest.mark.parametrize("drawn", PLOTS.values(), ids=PLOTS.keys())
def test_every_name_can_be_read(drawn: Plot) -> None:
    boxes = [label.box for label in drawn.labels]
    assert not any(overlap(one, other) for one, other in combinations(boxes, 2))
    assert all(box.left >= 0 and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT for box in boxes)
    for box in boxes:
        assert not any(box.distance((mark.x, mark.y)) == 0 for mark in drawn.marks)
    named = {label.text for label in drawn.labels}
    assert {mark.score.name for mark in drawn.marks if not mark.score.name.startswith("MedNeXt")} <= named


def test_lines_join_the_sizes_of_mednext_from_small_to_large() -> None:
    drawn = PLOTS["AMOS22"]
    assert [family for family, _ in drawn.lines] == ["mednext-k3", "mednext-k5"]
    for _, points in drawn.lines:
        assert len(points) == 4
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [label.text for label in drawn.labels if label.family.startswith("mednext")] == [
        "MedNeXt-S",
        "B",
        "M",
        "L k3",
        "L k5",
    ]
    assert PLOTS["Synapse"].lines == ()


def test_networks_without_a_known_size_are_named_below_and_not_drawn() -> None:
    drawn = PLOTS["Synapse"]
    assert "MISSFormer" in " ".join(drawn.note)
    assert "MISSFormer" not in {mark.score.name for mark in drawn.marks}
    whole = ScoreSet("A", "B", "C", 1, 2, (Score("one", 80.0, "published", "here", Size(7.0, "there")),))
    assert plot(whole).note == ()


def test_a_far_label_has_a_line_to_its_point() -> None:
    crowd = tuple(
        Score(f"network {number}", 80.0 + 0.01 * number, "published", "here", Size(30.0 + 0.1 * number, "there"))
        for number in range(12)
    )
    drawn = plot(ScoreSet("A", "B", "C", 1, 2, (*crowd, Score("low", 60.0, "published", "here", Size(9.0, "there")))))
    leaders = [label for label in drawn.labels if label.leader]
    assert leaders
    for label in leaders:
        assert label.leader is not None
        start, end = label.leader
        assert math.dist(start, label.point) < math.dist(end, label.point)
        assert label.box.distance(end) == pytest.approx(0)


def test_the_picture_is_svg_with_a_source_for_every_point() -> None:
    root = ElementTree.fromstring(picture(SCORE_SETS))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(titles) == 1 + sum(len(scores.drawn) for scores in SCORE_SETS)
    assert "UNETR++: Dice 87.22 (published; not in SegFormer3D's table; left out), 42.96M parameters" in "\n".join(
        titles
    )
    letters = "".join(text.text or "" for text in root.iter(f"{SVG}text"))
    for scores in SCORE_SETS:
        assert scores.title in letters and scores.paper in letters
    assert picture(SCORE_SETS) == picture(SCORE_SETS)


def test_unconfirmed_points_are_hollow_and_names_are_escaped() -> None:
    scores = tuple(
        Score(f"<{standing}>", 80.0 + index, standing, "here", Size(10.0 * (index + 1), "there"))
        for index, standing in enumerate(("published", "unconfirmed", "left out", "re-run"))
    )
    root = ElementTree.fromstring(picture([ScoreSet("A & B", "paper", "C", 1, 2, scores)]))
    marks = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    assert [mark[1].get("class") for mark in marks] == ["other full", "other hollow", "other full", "other cross"]
    assert "A & B" in [text.text for text in root.iter(f"{SVG}text")]
