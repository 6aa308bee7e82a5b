"""The report of an evaluation: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sagittal.evaluation import AGGREGATION_RULES, CaseScore, Evaluation
from sagittal.plan.base import write_atomically
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.report.curves import Record, training_panels
from sagittal.report.pictures import CaseView
from sagittal.report.strips import make_strips

MAX_ROWS = 4000
"""Rows of the table of cases: a phone still opens it; the CSV has them all."""


@dataclass(frozen=True)
class Page:
    """What a report tells beside the evaluation itself.

    Attributes:
        title: heading of the page.
        lead: a sentence or two on what was done.
        floor: mean Dice of a method that never looks at the image, shown beside the mean Dice.
        floor_note: what the floor is, for example "mean label map of the training cases".
        notes: paragraphs to read before the numbers are believed.
        facts: settings and versions, by section, in order.
        curve: records of the training run, see `sagittal.report.curves`.
    """

    title: str = "Segmentation report"
    lead: str = ""
    floor: float | None = None
    floor_note: str = "a method that never looks at the image"
    notes: Sequence[str] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    curve: Sequence[Record] = ()


@dataclass(frozen=True)
class Highlight:
    """A case that is shown in pictures, and why it is."""

    role: str
    score: CaseScore


def highlights(evaluation: Evaluation) -> tuple[Highlight, ...]:
    """Return the worst, the median and the best case by mean Dice; fewer where there are fewer cases."""
    ranked = evaluation.ranked
    places = {0: "Worst case", (len(ranked) - 1) // 2: "Median case", len(ranked) - 1: "Best case"}
    if len(ranked) == 1:
        places = {0: "The case"}
    elif len(ranked) == 2:
        places = {0: "Worst case", 1: "Best case"}
    return tuple(Highlight(role, ranked[place]) for place, role in places.items() if ranked)


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    page: Page | None = None,
    pictures: Mapping[str, CaseView] | None = None,
) -> Path:
    """Write the report as one HTML file, whole or not at all, and return its path.

    Args:
        path: file to write.
        evaluation: what was measured.
        page: title, floor, notes, settings and training curve.
        pictures: views of cases by name; those of `highlights(evaluation)` are shown.

    Raises:
        ResourceError: the file can't be written.
    """
    return write_atomically(path, render_report(evaluation, page=page, pictures=pictures).encode())


def render_report(
    evaluation: Evaluation, *, page: Page | None = None, pictures: Mapping[str, CaseView] | None = None
) -> str:
    """Return the report's HTML; see `write_report`."""
    page = page or Page()
    views = pictures or {}
    names = evaluation.classes.names
    rows = _rows(evaluation)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            evaluation=evaluation,
            summary=evaluation.summary,
            sentence=summary_sentence(evaluation, page),
            strips=make_strips(evaluation, floor=page.floor),
            shown=[(item, views[item.score.case]) for item in highlights(evaluation) if item.score.case in views],
            colours={name: class_colour(number) for number, name in enumerate(names)},
            prediction_colour=PREDICTION_COLOUR,
            panels=training_panels(page.curve),
            rows=rows[:MAX_ROWS],
            hidden_rows=max(0, len(rows) - MAX_ROWS),
            metrics=evaluation.metrics,
            rules=AGGREGATION_RULES,
            facts={**page.facts, "Versions": {**versions(), **page.facts.get("Versions", {})}},
        )
    )


def summary_sentence(evaluation: Evaluation, page: Page) -> str:
    """Tell the result in words: what a reader takes home who reads nothing else."""
    summary = evaluation.summary
    names = evaluation.classes.names
    told = [f"{_count(summary.cases, 'case')} scored in {_count(len(names), 'class', 'classes')}."]
    if evaluation.mean_dice is None:
        return f"{told[0]} No class is present in any of them, so there is no mean Dice."
    if page.floor is not None:
        gain = evaluation.mean_dice - page.floor
        side = "above" if gain >= 0 else "below"
        told.append(f"The mean Dice is {abs(gain):.3f} {side} the floor of {page.floor:.3f} ({page.floor_note}).")
    means = [(mean, name) for name in names if (mean := summary.classes[name].metrics["dice"].mean) is not None]
    (low, weakest), (high, strongest) = min(means), max(means)
    if high - low >= 0.0005:
        told.append(f"Strongest class: {strongest} ({high:.3f}). Weakest: {weakest} ({low:.3f}).")
    missed = sum(scores.missed for scores in summary.classes.values())
    alarms = sum(scores.false_alarms for scores in summary.classes.values())
    if missed or alarms:
        told.append(f"{_count(missed, 'structure')} missed, {_count(alarms, 'false alarm')}.")
    else:
        told.append("No structure was missed and there are no false alarms.")
    return " ".join(told)


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    found = {"Python": platform.python_version()}
    for package in ("sagittal", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _rows(evaluation: Evaluation) -> list[tuple[CaseScore, bool, str]]:
    """Return a row per case and class, lowest mean Dice first; the flag marks the first row of a case."""
    unranked = [case for case in evaluation.cases if case.mean_dice is None]
    return [
        (case, place == 0, name)
        for case in (*evaluation.ranked, *unranked)
        for place, name in enumerate(evaluation.classes.names)
    ]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _millilitres(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.4f}" if 0 < value < 0.1 else f"{value:.2f}"


def environment() -> Environment:
    """Return the environment of the templates, which escapes everything and knows no undefined names."""
    environment = Environment(
        loader=PackageLoader("sagittal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"number": _number, "millilitres": _millilitres}
    environment.filters.update(filters)
    return environment
