"""Folders of predictions of several methods -> one comparison, and its files: page, tables, CSV, JSON.

Any tool's predictions will do: label maps named like the references. What each method lacks is asked for before
anything is scored, because a comparison of different cases is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sagittal.errors import DataError, SagittalError
from sagittal.evaluation import ClassSet, Evaluation, EvaluationSettings
from sagittal.evaluation.comparison import Comparison, ComparisonSettings, compare_evaluations
from sagittal.evaluation.joining import join_evaluations
from sagittal.evaluation.protocols import PROTOCOLS
from sagittal.evaluation.settings import SAGITTAL
from sagittal.plan.base import require_writable, write_atomically
from sagittal.report.comparison_page import render_comparison
from sagittal.report.comparison_tables import comparison_tables
from sagittal.report.evaluation import METRICS_JSON, Beside, evaluate
from sagittal.report.layout import find_declaration, label_files, named, references_folder
from sagittal.report.tables import write_papers

COMPARISON_JSON = "comparison.json"
COMPARISON_CSV = "comparison.csv"
COMPARISON_HTML = "comparison.html"
VALUES_CSV = "values.csv"
VALIDATION = "validation"
"""Folder of the held-out predictions of a fold, in runs of Sagittal and of nnU-Net alike."""


@dataclass(frozen=True)
class Scoring:
    """How methods are scored; no number depends on it.

    Attributes:
        reuse: whether a metrics.json may stand for scoring.
        workers: cases scored at the same time; by itself as `evaluate` does.
        told: called after every case with how many are done, how many there are, and the method, from any thread.
    """

    reuse: bool = True
    workers: int | None = None
    told: Callable[[int, int, str], None] | None = None


@dataclass(frozen=True)
class Method:
    """One method's predictions: the label maps of every case, by the folder that they are in."""

    name: str
    folder: Path
    parts: Mapping[str, Path]
    """Folders of label maps by name; several are the folds of one run. Empty where there is only a metrics.json."""
    files: Mapping[str, Path]
    """Label map of every case."""


def compare_folders(
    predictions: Mapping[str, str | os.PathLike[str]],
    references: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: ClassSet | Mapping[str, Any] | None = None,
    settings: EvaluationSettings | None = None,
    statistics: ComparisonSettings | None = None,
    patients: Mapping[str, str] | None = None,
    scoring: Scoring | None = None,
) -> Comparison:
    """Score several methods on the same cases, compare them and, where `out` is given, write everything there.

    The cases are the references that at least one method predicted. A folder that holds fold_0/validation,
    fold_1/validation and so on stands for all of these. A metrics.json of `evaluate` in a folder is read in place of
    scoring where its settings and cases are those that are asked for and it is newer than the label maps.

    Args:
        predictions: folder of each method by the method's name, in the order in which they are shown.
        references: folder of label maps, or a data set with a folder labelsTr.
        out: folder for comparison.html, comparison.json, comparison.csv, values.csv, tables.md and tables.tex.
        labels: what to score, as for `evaluate`; by itself what the first method is scored with.
        settings: how every method is scored.
        statistics: how they are compared.
        patients: the patient of each case.
        scoring: whether earlier results may serve, how many cases at the same time, and who is told of progress.

    Raises:
        DataError: fewer than two methods, no label maps, no common cases, cases that a method or the patients lack, or
            classes that differ.
        ResourceError: the results can't be written.
    """
    settings, statistics = settings or EvaluationSettings(), statistics or ComparisonSettings()
    scoring = scoring or Scoring()
    if len(predictions) < 2:
        raise DataError(
            f"one method ({', '.join(predictions) or 'none'}) can't be compared. Expected the folders of two or more.",
            code="usage",
        )
    references = Path(references)
    known = label_files(references_folder(references))
    methods = [_method(name, Path(folder)) for name, folder in predictions.items()]
    cases, warnings = _cases(methods, known, statistics)
    wanted = None if labels is None else labels if isinstance(labels, ClassSet) else ClassSet.of_mapping(labels)
    _require_patients(cases, patients)
    if out is not None:
        require_writable(Path(out))
    evaluations, notes = {}, []
    declared = settings.protocol != SAGITTAL or find_declaration(references, references) is not None
    for method in methods:
        own = {case: known[case] for case in cases if case in method.files}
        found = _recorded(method, own, settings, wanted) if scoring.reuse else None
        if found is not None:
            notes.append(f"{method.name}: read from {METRICS_JSON}, not scored again.")
        evaluations[method.name] = found or _scored(method, list(own), references, wanted, settings, scoring)
        if not declared:
            # By itself every method would be scored on the values of the references that it predicted.
            wanted = wanted or evaluations[method.name].classes
    comparison = compare_evaluations(evaluations, statistics=statistics, patients=patients)
    told = tuple(dict.fromkeys([*warnings, *comparison.warnings]))
    comparison = comparison.replace(warnings=told, notes=(*comparison.notes, *notes))
    if out is not None:
        write_comparison(Path(out), comparison, references=references.resolve().name)
    return comparison


def write_comparison(out: Path, comparison: Comparison, *, references: str = "") -> Path:
    """Write comparison.html, the tables, both CSV files and comparison.json into `out`; return the page's path.

    Raises:
        ResourceError: a file can't be written.
    """
    page = write_atomically(out / COMPARISON_HTML, render_comparison(comparison, references=references).encode())
    write_papers(out, comparison_tables(comparison))
    write_atomically(out / VALUES_CSV, comparison.values_csv().encode())
    write_atomically(out / COMPARISON_CSV, comparison.to_csv().encode())
    write_atomically(out / COMPARISON_JSON, comparison.to_json().encode())
    return page


def name_methods(folders: Sequence[Path], names: Sequence[str] | None = None) -> dict[str, Path]:
    """Return folders by the names of their methods: `names`, else the names of the folders.

    Raises:
        DataError: another number of names than of folders, an empty name, or two that are equal.
    """
    given = [folder.resolve().name for folder in folders] if names is None else [name.strip() for name in names]
    if len(given) != len(folders):
        raise DataError(
            f"--names has {len(given)} names for {len(folders)} folders. Expected one for each, with commas between.",
            code="usage",
        )
    repeated = sorted({name for name in given if given.count(name) > 1})
    if repeated or not all(given):
        told = f"two methods are called {repeated[0]}" if repeated else "a method has no name"
        raise DataError(
            f"{told} ({', '.join(str(folder) for folder in folders)}). Expected a name of its own for each. Give them "
            "with --names A,B.",
            code="usage",
        )
    return dict(zip(given, folders, strict=True))


def _method(name: str, folder: Path) -> Method:
    files = label_files(folder)
    if files or (folder / METRICS_JSON).is_file():
        return Method(name, folder, {name: folder} if files else {}, files or _recorded_cases(folder))
    parts = {
        f"{name}, {inner.parent.name}": inner
        for inner in sorted(folder.glob(f"fold_*/{VALIDATION}"))
        if inner.is_dir() and label_files(inner)
    }
    if not parts:
        raise DataError(
            f"{folder}: no label maps. Expected files like CASE.nii.gz, a {METRICS_JSON} of 'sagittal evaluate', or "
            f"folders fold_0/{VALIDATION}, fold_1/{VALIDATION} of a run.",
            code="no_predictions",
        )
    found: dict[str, Path] = {}
    for part, inner in parts.items():
        for case, path in label_files(inner).items():
            if case in found:
                raise DataError(
                    f"{case} is in {found[case].parent.parent.name} and in {inner.parent.name} of {folder} ({part}). "
                    "Expected every case in one fold only. Compare folds of one split.",
                    code="repeated_case",
                )
            found[case] = path
    return Method(name, folder, parts, found)


def _recorded_cases(folder: Path) -> dict[str, Path]:
    path = folder / METRICS_JSON
    evaluation = Evaluation.read(path)
    names = (*(score.case for score in evaluation.cases), *(failure.case for failure in evaluation.failures))
    return dict.fromkeys(names, path)


def _cases(
    methods: Sequence[Method], known: Mapping[str, Path], statistics: ComparisonSettings
) -> tuple[list[str], list[str]]:
    """Return the cases to compare, and warnings; refuse what a method lacks where that is wanted."""
    predicted = {case for method in methods for case in method.files}
    cases = [case for case in sorted(known) if case in predicted]
    if not any(all(case in method.files for method in methods) for case in cases):
        found = "; ".join(f"{method.name}: {named(sorted(method.files))}" for method in methods)
        raise DataError(
            f"the methods and the references have no case in common. Expected files of the same names. The references "
            f"are {named(sorted(known)) or 'none'}. Found are {found}.",
            code="no_common_cases",
        )
    lacking = {method.name: [case for case in cases if case not in method.files] for method in methods}
    told = [
        f"{name} lacks {len(absent)} of {len(cases)} cases: {named(absent)}"
        for name, absent in lacking.items()
        if absent
    ]
    if told and statistics.missing == "refuse":
        raise DataError(
            f"{'; '.join(told)}. Every method needs every case that another one has, or the comparison is of different "
            "cases. Predict them, or count them as the worst result with --missing worst.",
            code="missing_cases",
        )
    warnings = [f"{text}; counted as the worst result." for text in told]
    nobody = [case for case in sorted(known) if case not in predicted]
    if nobody:
        warnings.append(f"References that no method predicted, left out ({len(nobody)}): {named(nobody)}.")
    for method in methods:
        extra = sorted(set(method.files) - set(known))
        if extra:
            warnings.append(f"{method.name}: predictions without a reference, left out ({len(extra)}): {named(extra)}.")
    return cases, warnings


def _require_patients(cases: Sequence[str], patients: Mapping[str, str] | None) -> None:
    absent = [] if patients is None else [case for case in cases if case not in patients]
    if absent:
        raise DataError(
            f"no patient is given for {named(absent)}. Expected every case that is compared, or scans of one patient "
            "would count as several. Add them to the table of patients.",
            code="bad_patients",
        )


def _scored(
    method: Method,
    cases: Sequence[str],
    references: Path,
    classes: ClassSet | None,
    settings: EvaluationSettings,
    scoring: Scoring,
) -> Evaluation:
    if not method.parts:
        raise DataError(
            f"{method.folder}: its {METRICS_JSON} was made with other settings, classes or cases than are asked for, "
            "and there are no label maps to score. Give the folder of the predictions, or the same settings.",
            code="settings_differ",
        )
    scored = {}
    for part, folder in method.parts.items():
        own = [case for case in cases if method.files[case].parent == folder]
        if own:
            told = None if scoring.told is None else partial(_tell, scoring.told, part)
            scored[part] = evaluate(
                folder,
                references,
                labels=classes,
                settings=settings,
                beside=Beside(cases=own, told=told),
                workers=scoring.workers,
            )
            classes = classes or scored[part].classes
    return join_evaluations(scored) if len(scored) > 1 else next(iter(scored.values()))


def _settled(settings: EvaluationSettings, classes: ClassSet) -> EvaluationSettings | None:
    try:
        return PROTOCOLS[settings.protocol].settings(settings, classes)
    except (DataError, KeyError):
        return None  # It is refused, with the reason, when the label maps are scored.


def _tell(told: Callable[[int, int, str], None], part: str, done: int, of: int) -> None:
    told(done, of, part)


def _recorded(
    method: Method, references: Mapping[str, Path], settings: EvaluationSettings, classes: ClassSet | None
) -> Evaluation | None:
    """Return what an earlier evaluation measured where it is what is asked for; None where it has to be scored."""
    path = method.folder / METRICS_JSON
    try:
        found = Evaluation.read(path)
        made = path.stat().st_mtime
        # Without label maps there is nothing to score instead: the volumes of the references are compared later on.
        inputs = (*references.values(), *method.files.values()) if method.parts else ()
        stale = any(file.stat().st_mtime > made for file in inputs)
    except (OSError, SagittalError):
        return None
    cases = {*(score.case for score in found.cases), *(failure.case for failure in found.failures)}
    if settings.protocol == SAGITTAL:
        fits = found.settings == settings and (classes is None or found.classes.labels == classes.labels)
    else:
        # A protocol merges classes in its own way, and fills in its own tolerances for those.
        fits = found.settings == _settled(settings, found.classes)
    if not fits or stale or not cases >= set(references):
        return None
    if cases == set(references):
        return found
    return Evaluation.of_cases(
        found.classes,
        [score for score in found.cases if score.case in references],
        settings=found.settings,
        failures=[failure for failure in found.failures if failure.case in references],
        warnings=found.warnings,
    )
