"""Two folders of label maps -> every case scored, and metrics.json, metrics.csv and report.html.

A case that can't be scored is told with its reason and the others go on. A prediction that is missing stops everything:
a mean over the cases that happen to be there is the mean of something else.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from sagittal.errors import DataError, SagittalError
from sagittal.evaluation import CaseScore, ClassSet, Evaluation, Failure, evaluate_case
from sagittal.evaluation.classes import present_values
from sagittal.plan.base import write_atomically
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
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.volume import require_same_grid

METRICS_JSON = "metrics.json"
METRICS_CSV = "metrics.csv"
REPORT_HTML = "report.html"

MAX_WORKERS = 8
"""Each holds two label maps and a transform of them: more cores than this would buy speed with much memory."""


def evaluate(
    predictions: str | os.PathLike[str],
    references: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: ClassSet | Mapping[str, Any] | None = None,
    images: str | os.PathLike[str] | None = None,
    cases: Collection[str] | None = None,
    workers: int | None = None,
    page: Page | None = None,
) -> Evaluation:
    """Score predictions against references and, where `out` is given, write metrics.json, metrics.csv and report.html.

    Cases are matched by file name without its ending. A case whose files can't be read or lie on two grids is put into
    `failures` of the result and is in no mean: whoever calls decides what that means (the command line exits 1).

    Args:
        predictions: folder of label maps, or one file.
        references: folder of label maps, one file, or a data set with a folder labelsTr.
        out: folder for the three files; nothing is written without it.
        labels: what to score, like the `labels` of a dataset.json. By itself: those of the dataset.json in the
            references' folder, above it, or in the predictions' folder; else every value that the references hold.
        images: folder of scans (CASE_0000.nii.gz) for the pictures. By itself: imagesTr beside labelsTr.
        cases: names to score, where only some of the references were predicted on purpose; all of them otherwise.
        workers: cases scored at the same time, each with its two maps in memory; by itself the cores, at most 8.
        page: title, notes, settings, floor and training curve for the report.

    Raises:
        DataError: no references, references without a prediction (each is named), or labels that make no sense.
        ResourceError: the results can't be written.
    """
    predictions, references = Path(predictions), Path(references)
    matched = match_cases(predictions, references, cases)
    declaration = find_declaration(references, predictions)
    classes, remarks = _classes(labels, declaration, matched)
    strict = labels is None and declaration is not None
    with ThreadPoolExecutor(workers or min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        # Threads suffice: unpacking, counting and distance transforms all run outside of Python's lock.
        outcomes = list(pool.map(lambda files: _score(files, classes, strict), matched.cases))
    evaluation = Evaluation.of_cases(
        classes,
        [outcome.score for outcome in outcomes if outcome.score],
        failures=[outcome.failure for outcome in outcomes if outcome.failure],
        warnings=[*matched.warnings, *remarks, *_undeclared(outcomes)],
    )
    if out is None:
        return evaluation
    shown = {item.score.case for item in highlights(evaluation)}
    scans = {
        files: find_image(files.case, references, None if images is None else Path(images))
        for files in matched.cases
        if files.case in shown
    }
    is_ct = declaration is not None and declaration.first_channel == "CT"
    pictures, complaints = draw_cases(scans, classes, is_ct=is_ct)
    evaluation = evaluation.replace(warnings=(*evaluation.warnings, *complaints))
    source = "the caller" if labels is not None else "dataset.json" if declaration else "the values in the references"
    told = _with_files(page or Page(), predictions, references, source)
    _write(Path(out), evaluation, told, pictures)
    return evaluation


def _write(out: Path, evaluation: Evaluation, page: Page, pictures: Mapping[str, CaseView]) -> None:
    # The largest file first: where the disk is too full for it, an earlier result stays as it was.
    write_report(out / REPORT_HTML, evaluation, page=page, pictures=pictures)
    write_atomically(out / METRICS_CSV, evaluation.to_csv().encode())
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


@dataclass(frozen=True)
class _Outcome:
    score: CaseScore | None = None
    failure: Failure | None = None
    undeclared: tuple[str, ...] = ()


def _score(files: CaseFiles, classes: ClassSet, strict: bool) -> _Outcome:
    try:
        reference, grid = read_labels(files.reference)
        prediction, other = read_labels(files.prediction)
        require_same_grid(grid, other, "reference and prediction")
        reference, prediction = classes.in_own_values(reference), classes.in_own_values(prediction)
        unknown = [value for value in present_values(reference) if value not in classes.declared_values]
        if unknown and strict:
            raise DataError(
                f"the reference has the values {unknown}, which dataset.json lacks. "
                f"Expected {sorted(classes.declared_values)}. Correct {files.reference.name} or dataset.json.",
                code="unknown_label",
            )
        score = evaluate_case(reference, prediction, grid.spacing_mm, classes, case=files.case)
    except SagittalError as error:
        return _Outcome(failure=Failure(case=files.case, code=error.code, message=error.message))
    in_prediction = [value for value in present_values(prediction) if value not in classes.declared_values]
    sides = (("reference", unknown), ("prediction", in_prediction))
    return _Outcome(
        score=score,
        undeclared=tuple(f"{files.case}: the {side} has the values {values}" for side, values in sides if values),
    )


def _undeclared(outcomes: Sequence[_Outcome]) -> list[str]:
    told = [text for outcome in outcomes for text in outcome.undeclared]
    end = "which no class names; they count as background"
    if len(told) <= 3:
        return [f"{text}, {end}." for text in told]
    return [f"{told[0]}, {end}. The same kind of thing in {len(told) - 1} other label maps."]


def _classes(
    labels: ClassSet | Mapping[str, Any] | None, declaration: Declaration | None, matched: Matched
) -> tuple[ClassSet, list[str]]:
    if labels is not None:
        return labels if isinstance(labels, ClassSet) else ClassSet.of_mapping(labels), []
    if declaration is not None:
        named, source = declaration.labels, str(declaration.path)
        return ClassSet.of_mapping(named, source=source, label_map=declaration.label_map), []
    values: set[int] = set()
    for files in matched.cases:
        try:
            values.update(present_values(read_labels(files.reference)[0]))
        except DataError:
            continue  # It fails again, and is told, when the case is scored.
    names = sorted(values - {0})
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
