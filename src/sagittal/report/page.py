"""The report of an evaluation: one HTML file that needs no network and no other file, and is whole without script."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sagittal.evaluation import CaseScore, Evaluation
from sagittal.evaluation.columns import rules_of
from sagittal.plan.base import write_atomically
from sagittal.report.colours import PREDICTION_COLOUR
from sagittal.report.curves import Record, training_panels
from sagittal.report.findings import calibration_panels, detection_panels, lesion_rows
from sagittal.report.main_columns import class_colours, distance_metric, headline_metric, in_words, main_metrics
from sagittal.report.pictures import CaseView
from sagittal.report.strips import make_strips
from sagittal.report.summary import (
    cases_to_look_at,
    glance,
    millilitres,
    plain_words,
    ranked_cases,
    summary_facts,
)
from sagittal.report.volume_plot import make_volume_panels

MAX_ROWS = 4000
"""Rows of the table of cases: a phone still opens it; the CSV has them all."""
SCRIPT = "report.js"
"""Sorts and filters the table of cases; the policy of the page names its hash, so that nothing else can run."""


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


@dataclass(frozen=True)
class Row:
    """A row of the table of cases: one class of one case."""

    case: CaseScore
    name: str
    first: bool
    """Whether it is the first row of its case."""
    anchor: str | None
    """Name to link to, for the first row of a case."""


def highlights(evaluation: Evaluation) -> tuple[Highlight, ...]:
    """Return the worst, the median and the best case by the mean of the headline metric; fewer where there are fewer.

    The headline metric is Dice where it was measured.
    """
    ranked = ranked_cases(evaluation)
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
    page, views, metrics = page or Page(), pictures or {}, evaluation.metrics
    rows = _rows(evaluation)
    shown_rows = rows[:MAX_ROWS]
    main = main_metrics(metrics)
    templates = environment()
    script = script_source(templates)
    return templates.get_template("report.html.j2").render(
        page=page,
        evaluation=evaluation,
        summary=evaluation.summary,
        metrics=metrics,
        headline=headline_metric(metrics),
        distance=distance_metric(metrics),
        main={key: metrics[key] for key in main},
        others={key: metrics[key] for key in metrics if key not in main},
        words=plain_words(evaluation, floor=page.floor, floor_note=page.floor_note),
        glance=glance(evaluation),
        look=cases_to_look_at(evaluation),
        anchors={row.case.case: row.anchor for row in shown_rows if row.anchor},
        strips=make_strips(evaluation, floor=page.floor),
        volumes=make_volume_panels(evaluation),
        shown=[(item, views[item.score.case]) for item in highlights(evaluation) if item.score.case in views],
        colours=class_colours(evaluation),
        prediction_colour=PREDICTION_COLOUR,
        lesions=lesion_rows(evaluation),
        detection=detection_panels(evaluation),
        calibration=calibration_panels(evaluation),
        panels=training_panels(page.curve),
        rows=shown_rows,
        hidden_rows=len(rows) - len(shown_rows),
        places={key: number for number, key in enumerate(metrics, start=1)},
        rules=rules_of(evaluation.settings),
        facts=_facts(evaluation, page),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def script_source(templates: Environment) -> str:
    """Return the page's script as it stands in the page: the bytes that the policy's hash is of."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, SCRIPT)[0]


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    found = {"Python": platform.python_version()}
    for package in ("sagittal", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _facts(evaluation: Evaluation, page: Page) -> dict[str, Mapping[str, object]]:
    """Return the evaluation's settings first, then what the caller tells, and the versions."""
    own = {"Evaluation": summary_facts(evaluation)}
    told = {name: {**own.get(name, {}), **values} for name, values in {**own, **page.facts}.items()}
    return {**told, "Versions": {**versions(), **page.facts.get("Versions", {})}}


def _rows(evaluation: Evaluation) -> list[Row]:
    """Return a row per case and class, the lowest first; cases in which nothing is defined come last."""
    ranked = ranked_cases(evaluation)
    known = {case.case for case in ranked}
    ordered = (*ranked, *(case for case in evaluation.cases if case.case not in known))
    return [
        Row(case, name, place == 0, f"case-{number}" if place == 0 else None)
        for number, case in enumerate(ordered, start=1)
        for place, name in enumerate(evaluation.classes.names)
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@lru_cache(maxsize=4096)
def breakable(name: str) -> Markup:
    """Return a name that a narrow page breaks after an underscore, before it would break a word."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the environment of the templates, which escapes everything and knows no undefined names."""
    environment = Environment(
        loader=PackageLoader("sagittal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"number": _number, "millilitres": millilitres, "in_words": in_words}
    environment.filters.update(filters, breakable=breakable)
    return environment
