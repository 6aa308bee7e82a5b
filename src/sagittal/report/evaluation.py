"""Two folders of label maps -> every case scored, and metrics.json, metrics.csv and report.html.

A case that can't be scored is told with its reason and the others go on. A prediction that is missing stops everything:
a mean over the cases that happen to be there is the mean of something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from sagittal.errors import DataError
from sagittal.evaluation import ClassSet, Evaluation
from sagittal.evaluation.cases import check_tolerances
from sagittal.evaluation.protocols import PROTOCOLS
from sagittal.evaluation.settings import SAGITTAL, EvaluationSettings
from sagittal.plan.base import require_writable, write_atomically
from sagittal.report.layout import (
    CaseFiles,
    Declaration,
    Matched,
    find_declaration,
    find_image,
    match_cases,
)
from sagittal.report.page import Page, highlights, write_report
from sagittal.report.pictures import CT_SOFT_TISSUE, CaseView, view_case
from sagittal.report.scoring import Job, Outcome
from sagittal.report.scoring_pool import ScoreAll, read_values, score_all
from sagittal.report.tables import write_tables
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.volume import require_same_grid

METRICS_JSON = "metrics.json"
METRICS_CSV = "metrics.csv"
REPORT_HTML = "report.html"


@dataclass(frozen=True)
class Beside:
    """What an evaluation takes beside the label maps, all of it optional.

    Attributes:
        images: folder of scans (CASE_0000.nii.gz) for the pictures; by itself imagesTr beside labelsTr.
        probabilities: folder of CASE.npz as `sagittal predict --probabilities` writes them, for calibration.
        patients: case -> patient, where patients have several cases: intervals draw patients.
        cases: names to score, where only some of the references were predicted on purpose; all of them otherwise.
        told: called after every case with how many are done and how many there are, from any thread.
        score: scores the cases in place of this machine's processes, on a cluster for example; see `score_all`.
    """

    images: str | os.PathLike[str] | None = None
    probabilities: str | os.PathLike[str] | None = None
    patients: Mapping[str, str] | None = None
    cases: Collection[str] | None = None
    told: Callable[[int, int], None] | None = None
    score: ScoreAll = score_all


def evaluate(
    predictions: str | os.PathLike[str],
    references: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: ClassSet | Mapping[str, Any] | None = None,
    settings: EvaluationSettings | None = None,
    beside: Beside | None = None,
    workers: int | None = None,
    page: Page | None = None,
) -> Evaluation:
    """Score predictions against references and, where `out` is given, write the result there.

    These are report.html, metrics.json, metrics.csv (a row per case and class), summary.csv, tables.md, tables.tex.

    Cases are matched by file name without its ending. A case whose files can't be read or lie on two grids is put into
    `failures` of the result and is in no mean: whoever calls decides what that means (the command line exits 1).

    Args:
        predictions: folder of label maps, or one file.
        references: folder of label maps, one file, or a data set with a folder labelsTr.
        out: folder for these files; nothing is written without it.
        labels: what to score, like the `labels` of a dataset.json. By itself: those of the dataset.json in the
            references' folder, above it, or in the predictions' folder; else every value that the references hold.
        settings: metrics, tolerances and protocol; by itself those of `EvaluationSettings()`.
        beside: scans, probabilities, patients, and which cases.
        workers: cases scored at the same time, each with its two maps in memory; by itself the processors, at most 32,
            and fewer where memory is short.
        page: title, notes, settings, floor and training curve for the report.

    Raises:
        DataError: no references, references without a prediction (each is named), labels that make no sense or that
            the protocol can't use, a tolerance of no class, a patient or probabilities missing.
        ResourceError: the results can't be written, or a metric needs a package that is not installed.
    """
    predictions, references = Path(predictions), Path(references)
    beside, page = beside or Beside(), page or Page()
    matched = match_cases(predictions, references, beside.cases)
    declaration = find_declaration(references, predictions)
    classes, remarks = _classes(labels, declaration, matched, workers)
    classes, settings = _by_protocol(classes, settings or EvaluationSettings())
    check_tolerances(settings, classes)  # Here, or every case fails with it.
    strict = labels is None and declaration is not None and settings.protocol == SAGITTAL
    if out is not None:
        require_writable(Path(out))
    jobs = _jobs(matched, classes, settings, beside, strict=strict)
    outcomes = beside.score(jobs, workers, None if beside.told is None else _counted(beside.told, len(jobs)))
    evaluation = Evaluation.of_cases(
        classes,
        [outcome.score for outcome in outcomes if outcome.score],
        settings=settings,
        failures=[outcome.failure for outcome in outcomes if outcome.failure],
        warnings=[*matched.warnings, *remarks, *_undeclared(outcomes)],
    )
    if out is None:
        return evaluation
    shown = {item.score.case for item in highlights(evaluation)}
    images = None if beside.images is None else Path(beside.images)
    scans = {files: find_image(files.case, references, images) for files in matched.cases if files.case in shown}
    is_ct = declaration is not None and declaration.first_channel == "CT"
    pictures, complaints = draw_cases(scans, classes, is_ct=is_ct)
    evaluation = evaluation.replace(warnings=(*evaluation.warnings, *complaints))
    source = "the caller" if labels is not None else "dataset.json" if declaration else "the values in the references"
    _write(Path(out), evaluation, _with_files(page, predictions, references, source), pictures)
    return evaluation


def _counted(told: Callable[[int, int], None], of: int) -> Callable[[Outcome], None]:
    done = count(1)
    return lambda outcome: told(next(done), of)


def _by_protocol(classes: ClassSet, settings: EvaluationSettings) -> tuple[ClassSet, EvaluationSettings]:
    """Return what a protocol scores of these classes, and its settings for them."""
    if settings.protocol == SAGITTAL:
        return classes, settings
    protocol = PROTOCOLS[settings.protocol]
    classes = protocol.classes(classes)
    return classes, protocol.settings(settings, classes)


def _jobs(
    matched: Matched, classes: ClassSet, settings: EvaluationSettings, beside: Beside, *, strict: bool
) -> list[Job]:
    names = [files.case for files in matched.cases]
    _require_all("patients: no patient is given for", names, names if beside.patients is None else beside.patients)
    probabilities = None if beside.probabilities is None else Path(beside.probabilities)
    if probabilities is not None:
        there = [name for name in names if (probabilities / f"{name}.npz").is_file()]
        _require_all(f"{probabilities}: no probabilities (CASE.npz) of", names, there)
    return [
        Job(
            case=files.case,
            reference=files.reference,
            prediction=files.prediction,
            probabilities=None if probabilities is None else probabilities / f"{files.case}.npz",
            patient=None if beside.patients is None else beside.patients[files.case],
            classes=classes,
            settings=settings,
            strict=strict,
        )
        for files in matched.cases
    ]


def _require_all(what: str, names: Sequence[str], there: Collection[str]) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{what} {len(missing)} of {len(names)} cases ({', '.join(missing[:5])}{' ...' if missing[5:] else ''}). "
            "Give all of them, or name the cases to score (--cases).",
            code="missing_input",
        )


def _write(out: Path, evaluation: Evaluation, page: Page, pictures: Mapping[str, CaseView]) -> None:
    # The largest file first: where the disk is too full for it, an earlier result stays as it was.
    write_report(out / REPORT_HTML, evaluation, page=page, pictures=pictures)
    write_atomically(out / METRICS_CSV, evaluation.to_csv().encode())
    write_tables(out, evaluation)
    write_atomically(out / METRICS_JSON, evaluation.to_json().encode())


def draw_cases(
    cases: Mapping[CaseFiles, Path | None], classes: ClassSet, *, is_ct: bool = False
) -> tuple[dict[str, CaseView], list[str]]:
    """Draw cases, each on its scan where there is one; return the views by case, and what could not be shown."""
    views, complaints = {}, []
    for files, scan in cases.items():
        reference, grid = read_labels(files.reference)
        prediction, _ = read_labels(files.prediction)
        image = None
        if scan is not None:
            try:
                image = read_volume(scan)
                require_same_grid(grid, image.geometry, "reference and scan")
            except DataError as error:
                image = None
                complaints.append(f"{files.case} is shown without its scan: {error.message}")
        turned = [_in_ras(classes.in_own_values(labels), grid) for labels in (reference, prediction)]
        views[files.case] = view_case(
            files.case,
            turned[0].array[0],
            turned[1].array[0],
            turned[0].spacing_mm,
            classes,
            image=None if image is None else image.reoriented().array[0],
            window=CT_SOFT_TISSUE if is_ct else None,
        )
    return views, complaints


def _undeclared(outcomes: Sequence[Outcome]) -> list[str]:
    told = [text for outcome in outcomes for text in outcome.undeclared]
    end = "which no class names; they count as background"
    if len(told) <= 3:
        return [f"{text}, {end}." for text in told]
    return [f"{told[0]}, {end}. The same kind of thing in {len(told) - 1} other label maps."]


def _classes(
    labels: ClassSet | Mapping[str, Any] | None,
    declaration: Declaration | None,
    matched: Matched,
    workers: int | None,
) -> tuple[ClassSet, list[str]]:
    if labels is not None:
        return labels if isinstance(labels, ClassSet) else ClassSet.of_mapping(labels), []
    if declaration is not None:
        named, source = declaration.labels, str(declaration.path)
        return ClassSet.of_mapping(named, source=source, label_map=declaration.label_map), []
    found = read_values([files.reference for files in matched.cases], workers)
    names = sorted(set().union(*found) - {0})
    if not names:
        raise DataError(
            "No reference holds a label above 0 and no dataset.json names any: there is nothing to score. "
            "Check the folder of references, or give the labels.",
            code="no_classes",
        )
    told = ", ".join(str(value) for value in names)
    return ClassSet.of_values(names), [f"No dataset.json: the classes are the values in the references ({told})."]


def _in_ras(labels: Integer[np.ndarray, "D H W"], grid: Geometry) -> Volume:
    return Volume.on(grid, labels).reoriented()


def _with_files(page: Page, predictions: Path, references: Path, labels_from: str) -> Page:
    # Names only: a full path tells a reader of the page who ran it, and where.
    files = {
        "Predictions": predictions.resolve().name,
        "References": references.resolve().name,
        "Labels from": labels_from,
    }
    return replace(page, facts={**page.facts, "Compared": {**files, **page.facts.get("Compared", {})}})
