"""The picture that the papers of both networks open with: parameters against Dice, one plot per data set, as SVG.

Every point bears its name; shape and fill tell what it is, so that no meaning rests on colour alone. The picture brings
its own background, light or dark by what its reader prefers.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from sagittal.report.axes import Axis, linear_axis
from sagittal.report.label_placement import Anchor, Box, Pixel, place_labels
from sagittal.report.published import Score, ScoreSet

Family = Literal["mednext-k3", "mednext-k5", "segformer3d", "other"]

_JOINED: tuple[Family, ...] = ("mednext-k3", "mednext-k5")
"""Families whose points are sizes of one network and joined by a line."""

WIDTH, HEIGHT = 470.0, 280.0
"""Of the frame that points lie in, in pixels."""
_TICKS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
_LOW, _HIGH = 3.2, 220.0
_MARK_RADIUS = 6.0
_TEXT_HEIGHT = 13.0
_LETTER_WIDTH, _BOLD_LETTER_WIDTH = 7.6, 8.5
"""Of the labels' font, 13 pixels high, on average in the widest of the fonts that may be taken."""
_LEADER = 15.0
"""A label farther than this from its point is joined to it by a line."""
_NOTE_LETTERS = 74


@dataclass(frozen=True)
class Mark:
    """A point of a plot, in pixels from the frame's top left."""

    score: Score
    family: Family
    x: float
    y: float

    @property
    def title(self) -> str:
        """What a pointer resting on the mark is told."""
        assert self.score.size is not None
        return (
            f"{self.score.name}: Dice {self.score.dice:g} ({self.score.source}; {self.score.standing}), "
            f"{self.score.size.millions:g}M parameters ({self.score.size.source})"
        )


@dataclass(frozen=True)
class Label:
    """The name of a point, where it stands."""

    text: str
    family: Family
    box: Box
    point: Pixel
    leader: tuple[Pixel, Pixel] | None

    @property
    def side(self) -> Literal["start", "middle", "end"]:
        """Which part of the text is at `x`: what is nearest to its point, whatever the width of the reader's font."""
        if self.box.left > self.point[0]:
            return "start"
        return "end" if self.box.right < self.point[0] else "middle"

    @property
    def x(self) -> float:
        """Where that part is."""
        middle = (self.box.left + self.box.right) / 2
        return {"start": self.box.left, "middle": middle, "end": self.box.right}[self.side]

    @property
    def baseline(self) -> float:
        """Where its letters stand."""
        return self.box.bottom - 3


@dataclass(frozen=True)
class Plot:
    """One data set: what to draw, in pixels from the frame's top left."""

    scores: ScoreSet
    y: Axis
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    lines: tuple[tuple[Family, tuple[Pixel, ...]], ...]

    @property
    def note(self) -> tuple[str, ...]:
        """Lines on the networks that are not drawn."""
        names = ", ".join(score.name for score in self.scores.omitted)
        text = f"Size not known, not drawn: {names}." if names else ""
        return tuple(textwrap.wrap(text, _NOTE_LETTERS, break_on_hyphens=False))


def parameter_ticks() -> tuple[tuple[float, float], ...]:
    """Return the millions marked on the logarithmic axis and where they lie, in pixels from its start."""
    return tuple((tick, _x(tick)) for tick in _TICKS)


def plot(scores: ScoreSet) -> Plot:
    """Place the points and labels of one data set."""
    dice = [score.dice for score in scores.drawn]
    y = linear_axis(min(dice) - 0.3, max(dice) + 0.3, intervals=5)
    marks = tuple(
        Mark(score, _family(score.name), _x(score.size.millions), HEIGHT * (1 - y.percent(score.dice) / 100))
        for score in scores.drawn
        if score.size is not None
    )
    lines = tuple(
        (family, tuple((mark.x, mark.y) for mark in marks if mark.family == family))
        for family in _JOINED
        if any(mark.family == family for mark in marks)
    )
    return Plot(scores, y, marks, _labels(marks, [points for _, points in lines]), lines)


def picture(sets: Sequence[ScoreSet]) -> str:
    """Return the plots of all `sets`, two in a row, with a legend, as one SVG."""
    environment = Environment(
        loader=PackageLoader("sagittal.report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("scatter.svg.j2").render(
        plots=[plot(scores) for scores in sets], ticks=parameter_ticks(), width=WIDTH, height=HEIGHT
    )


def _labels(marks: Sequence[Mark], lines: Sequence[Sequence[Pixel]]) -> tuple[Label, ...]:
    named = [mark for mark in marks if _text(mark)]
    anchors = [Anchor((mark.x, mark.y), _text_width(mark), _TEXT_HEIGHT) for mark in named]
    boxes = place_labels(
        anchors,
        marks=[_box(mark) for mark in marks],
        lines=lines,
        frame=Box(2, 2, WIDTH - 2, HEIGHT - 2),
    )
    return tuple(
        Label(_text(mark), mark.family, box, (mark.x, mark.y), _leader((mark.x, mark.y), box))
        for mark, box in zip(named, boxes, strict=True)
    )


def _leader(point: Pixel, box: Box) -> tuple[Pixel, Pixel] | None:
    """Return a line from a point to the nearest place of its label, where it is far from it."""
    x, y = box.nearest(point)
    distance = box.distance(point)
    if distance <= _LEADER:
        return None
    start = _MARK_RADIUS / distance
    return (point[0] + start * (x - point[0]), point[1] + start * (y - point[1])), (x, y)


def _text(mark: Mark) -> str:
    """The name of a point; in MedNeXt's lines the smallest size, the letters of the others, and at the end the kernel.

    Both lines have the same sizes at almost the same places: one set of letters does.
    """
    if mark.family not in _JOINED:
        return mark.score.name
    size, kernel = mark.score.name.removeprefix("MedNeXt-").split()
    if size == "L":
        return f"{size} {kernel}"
    if mark.family == "mednext-k5":
        return ""
    return f"MedNeXt-{size}" if size == "S" else size


def _text_width(mark: Mark) -> float:
    return len(_text(mark)) * (_LETTER_WIDTH if mark.family == "other" else _BOLD_LETTER_WIDTH)


def _family(name: str) -> Family:
    if name.startswith("MedNeXt"):
        return "mednext-k5" if name.endswith("k5") else "mednext-k3"
    return "segformer3d" if name.startswith("SegFormer3D") else "other"


def _x(millions: float) -> float:
    return WIDTH * math.log(millions / _LOW) / math.log(_HIGH / _LOW)


def _box(mark: Mark) -> Box:
    return Box(mark.x - _MARK_RADIUS, mark.y - _MARK_RADIUS, mark.x + _MARK_RADIUS, mark.y + _MARK_RADIUS)
