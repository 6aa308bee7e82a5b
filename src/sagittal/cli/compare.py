"""`sagittal compare`: several methods' predictions of the same cases, with tests, ranks and the patients needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sagittal.cli.evaluation_options import (
    Metrics,
    Tolerances,
    declared_classes,
    evaluation_settings,
    listed_patients,
)
from sagittal.cli.options import Workers
from sagittal.cli.progress import CountLines
from sagittal.cli.stopping import ended_by_sigterm
from sagittal.errors import PlanError

if TYPE_CHECKING:
    from sagittal.evaluation import Metric
    from sagittal.evaluation.comparison import Comparison
    from sagittal.evaluation.contests import Contest

Switch = Annotated[bool, Parameter(negative="")]


def compare(
    *predictions: Path,
    reference: Path,
    out: Path | None = None,
    names: str | None = None,
    labels: Path | None = None,
    patients: Path | None = None,
    protocol: str = "sagittal",
    metrics: Metrics = None,
    tolerance_mm: Tolerances = None,
    margin: float = 0.005,
    missing: Literal["refuse", "worst"] = "refuse",
    rescore: Switch = False,
    workers: Workers = None,
    json: Switch = False,
) -> int:
    """Compare the predictions of several methods on the same cases: any tool's, not only ours.

    Exits 1 where a case could not be scored.

    Args:
        predictions: folder of each method: label maps named like the references, folds (fold_0/validation and so on),
            or a metrics.json of 'sagittal evaluate'
        reference: folder of the reference label maps, or a data set with labelsTr
        out: folder for comparison.html, comparison.json, comparison.csv, values.csv, tables.md and tables.tex
        names: names of the methods, with commas between; by default those of the folders
        labels: dataset.json whose labels are scored; by default the one beside the references
        patients: table with the columns case and patient: scans of a patient are one piece of evidence
        protocol: whose definitions: sagittal, nnunet, monai, brats2021, brats2023 (also -ssa, -men, -ped, -met), msd,
            nnformer-synapse or acdc
        margin: difference that counts as none, of metrics between 0 and 1: for equality and for the patients needed
        missing: what becomes of a case that a method lacks: refuse it, or count it as the worst result
        rescore: score again even where a metrics.json in the folder of predictions would do
        workers: cases at the same time; by default the processors
        json: print the whole comparison as JSON
    """
    from sagittal.evaluation.comparison import ComparisonSettings
    from sagittal.report.comparison import COMPARISON_HTML, Scoring, compare_folders, name_methods

    if not 0 < margin < math.inf:
        raise PlanError(f"--margin {margin:g}: expected a number above 0, for example 0.005.", code="usage")
    named = None if names is None else names.split(",")
    with ended_by_sigterm():
        comparison = compare_folders(
            name_methods(predictions, named),
            reference,
            out,
            labels=declared_classes(labels),
            settings=evaluation_settings(protocol, tolerance_mm, metrics=metrics),
            statistics=ComparisonSettings(margin=margin, missing=missing),
            patients=listed_patients(patients),
            scoring=Scoring(reuse=not rescore, workers=workers, told=CountLines("scored")),
        )
    if json:
        print(comparison.to_json(), end="")
    else:
        _print(comparison)
        if out is not None:
            print(f"report: {out / COMPARISON_HTML}")
    return 1 if comparison.failures else 0


def _print(comparison: Comparison) -> None:
    from sagittal.evaluation import metrics_of
    from sagittal.report.comparison_page import verdict

    metric = metrics_of(comparison.settings)[comparison.primary]
    contest = comparison.metrics[comparison.primary].mean
    _print_tables(comparison, metric, contest)
    for sentence in verdict(comparison, metric, contest):
        print(sentence)
    for note in comparison.notes:
        print(f"note: {note}")
    for warning in comparison.warnings:
        print(f"warning: {warning}")
    for name, failures in comparison.failures.items():
        for failure in failures:
            print(f"failed: {name}, {failure.case}: {failure.message}")


def _print_tables(comparison: Comparison, metric: Metric, contest: Contest) -> None:
    from sagittal.cli.wide_table import print_wide
    from sagittal.report.comparison_tables import methods_table, needed_text, pair_texts

    made = methods_table(comparison, comparison.primary, metric)
    bold = {(line, place) for line, row in enumerate(made.rows) for place, cell in enumerate(row) if cell.bold}
    rows = [[_broken(cell.text) for cell in row] for row in made.rows]
    print_wide(made.header, rows, title=made.caption, caption=" ".join(made.notes), bold=frozenset(bold))
    header = (
        "pair",
        "difference",
        "p Wilcoxon",
        "p permutation",
        f"patients to show {comparison.statistics.margin:g} (80, 90 %)",
    )
    pairs = []
    for pair in contest.pairs:
        difference, *tests = pair_texts(pair, metric)[:3]
        needed = ",\n".join(needed_text(item) for item in pair.power.to_show) if pair.power else "–"
        pairs.append((f"{pair.first} – {pair.second}", _broken(difference), *tests, needed))
    better = frozenset((line, 1) for line, pair in enumerate(contest.pairs) if pair.better is not None)
    caption = "First minus second; p after Holm's correction; bold: one is better"
    print_wide(header, pairs, title="Pairs of methods", caption=caption, bold=better)


def _broken(text: str) -> str:
    """Put the interval of a value below it."""
    return text.replace(" [", "\n[")
