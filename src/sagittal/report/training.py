"""The page of a run that is going on: how far, how good, what is wrong, where it errs. One file, no script, no network.

It is written again and again while the run lasts, so it costs little: curves are drawn by the browser from a few
points, and pictures come as planes that were cut out during the validation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from jinja2 import Template

from sagittal.plan.base import TripleMm, write_atomically
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.report.curves import Record, progress_panels
from sagittal.report.cuts import CutCase, draw_cuts
from sagittal.report.page import environment

REFRESH_S = 30
"""How often a browser that shows the page of a run in progress looks again."""


@dataclass(frozen=True)
class ClassStanding:
    """A class in the last validation and at its best; None where there was none, or no case has it."""

    name: str
    dice: float | None
    best: float | None
    best_step: int | None
    references: int | None
    """How many references of the last validation have it."""
    alarm: bool = False


@dataclass(frozen=True)
class Warned:
    """What is wrong, and what to do about it."""

    text: str
    advice: str


@dataclass(frozen=True)
class WorstCases:
    """Cases of the last validation that came out worst."""

    step: int
    cases: Sequence[CutCase] = ()
    spacing_mm: TripleMm = (1.0, 1.0, 1.0)
    """Of the network's grid, along D, H, W."""
    sides_known: bool = True
    """Whether D, H, W run to the head, the front and the right."""


@dataclass(frozen=True)
class Final:
    """The evaluation after the end, on the scans themselves.

    Attributes:
        dice: mean over cases and classes; None where it is undefined.
        cases: how many, in words.
        report: relative address of the report.
    """

    dice: float | None
    cases: str
    report: str


@dataclass(frozen=True)
class TrainingPage:
    """What the page tells.

    Attributes:
        title: data set, network and fold.
        state: `running`, or how it ended, in words.
        running: whether a browser should look again.
        step, end: finished steps, and the last one as things stand.
        elapsed, left: times in words.
        numbers: the tiles: what it is, and the number in words.
        mean_dice, best_dice, best_step: of whole held-out cases; None where none was validated.
        classes: in the order of the declaration.
        series, validations: see `progress_panels`.
        alarms: classes that collapsed, and what else needs a person.
        facts: settings and versions, by section.
        worst: pictures.
        final: the evaluation after the end, once there is one.
    """

    title: str
    state: str
    running: bool
    step: int
    end: int
    elapsed: str
    left: str
    numbers: Mapping[str, str]
    mean_dice: float | None
    best_dice: float | None
    best_step: int | None
    classes: Sequence[ClassStanding]
    series: Mapping[str, np.ndarray]
    validations: Sequence[Record]
    alarms: Sequence[Warned] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    worst: WorstCases = field(default_factory=lambda: WorstCases(0))
    final: Final | None = None

    @property
    def headline_dice(self) -> float | None:
        """The Dice that counts: of the evaluation after the end, before it of the last validation."""
        return self.mean_dice if self.final is None else self.final.dice


def write_training_page(path: str | os.PathLike[str], page: TrainingPage) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        ResourceError: the file can't be written.
    """
    return write_atomically(path, render_training_page(page).encode())


def render_training_page(page: TrainingPage) -> str:
    """Return the page's HTML."""
    names = [one.name for one in page.classes]
    worst = page.worst
    views = [(case, draw_cuts(case, names, worst.spacing_mm, sides_known=worst.sides_known)) for case in worst.cases]
    return _template().render(
        page=page,
        refresh_s=REFRESH_S,
        percent=100.0 * min(page.step / max(page.end, 1), 1.0),
        colours={name: class_colour(number) for number, name in enumerate(names)},
        prediction_colour=PREDICTION_COLOUR,
        panels=progress_panels(page.series, page.validations, end=page.end),
        views=views,
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    # Compiling it takes as long as twenty pages.
    return environment().get_template("training.html.j2")
