"""`sagittal evaluate`: predictions against references, as numbers and as a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sagittal.cli.evaluation_options import (
    Cases,
    LesionRules,
    Metrics,
    Tolerances,
    declared_classes,
    evaluation_settings,
    listed_patients,
    named_cases,
)
from sagittal.cli.options import Workers
from sagittal.cli.progress import CountLines
from sagittal.cli.stopping import ended_by_sigterm
from sagittal.errors import DataError, PlanError

if TYPE_CHECKING:
    from sagittal.evaluation import Evaluation
    from sagittal.report.scoring_pool import ScoreAll

Switch = Annotated[bool, Parameter(negative="")]


def evaluate(
    predictions: Path,
    references: Path,
    *,
    out: Path | None = None,
    labels: Path | None = None,
    images: Path | None = None,
    probabilities: Path | None = None,
    patients: Path | None = None,
    cases: Cases = None,
    protocol: str = "sagittal",
    metrics: Metrics = None,
    tolerance_mm: Tolerances = None,
    lesions: Switch = False,
    lesion_rule: LesionRules = None,
    workers: Workers = None,
    on: str | None = None,
    log: Path | None = None,
    json: Switch = False,
) -> int:
    """Score label maps against references: any tool's, not only ours.

    With --out it writes metrics.json, metrics.csv, report.html and tables for papers. Exits 1 where a case could not
    be scored.

    Args:
        predictions: folder of label maps, or one file
        references: folder of label maps with the same names, a data set with labelsTr, or one file
        out: folder for the results
        labels: dataset.json whose labels are scored; by default the one beside the references
        images: folder of the scans, for the pictures of the report
        probabilities: folder of CASE.npz, as 'sagittal predict --probabilities' writes them, for the calibration
        patients: table with the columns case and patient: scans of a patient are one piece of evidence
        protocol: whose definitions: sagittal, nnunet, monai, brats2021, brats2023 (also -ssa, -men, -ped, -met), msd,
            nnformer-synapse or acdc
        lesions: match and count the lesions of every class, one by one
        workers: cases at the same time; by default the processors
        on: a Ray cluster that scores the cases: ray, ray:HOST:PORT or ray://HOST:PORT; its nodes see the same folders
        log: log.jsonl of the training, for its curve in the report
        json: print the whole result as JSON
    """
    from sagittal.report.evaluation import REPORT_HTML, Beside
    from sagittal.report.evaluation import evaluate as evaluate_folders
    from sagittal.report.page import Page
    from sagittal.report.scoring_pool import score_all
    from sagittal.training.log import read_log

    if log is not None and not log.is_file():
        raise DataError(f"{log}: no such file. Expected a training's log, BUNDLE.run/fold_0/log.jsonl for example.")
    settings = evaluation_settings(protocol, tolerance_mm, metrics=metrics, lesion_rules=lesion_rule, lesions=lesions)
    wanted = named_cases(cases)
    with ended_by_sigterm():
        result = evaluate_folders(
            predictions,
            references,
            out,
            labels=declared_classes(labels),
            settings=settings,
            beside=Beside(
                images=images,
                probabilities=probabilities,
                patients=listed_patients(patients),
                cases=wanted,
                told=CountLines("scored"),
                score=score_all if on is None else _scored_on(on),
            ),
            workers=workers,
            page=Page(
                curve=read_log(log) if log is not None else (),
                facts={} if wanted is None else {"Compared": {"Cases": f"the {len(wanted)} that were named"}},
            ),
        )
    if json:
        print(result.to_json(), end="")
    else:
        _print(result)
        dice = "" if "dice" not in result.metrics else f" dice {_number(result.mean_dice, 4)}"
        print(f"report: {out / REPORT_HTML}{dice}" if out is not None else f"mean{dice}")
    return 1 if result.failures else 0


def _scored_on(on: str) -> ScoreAll:
    """Return what scores the cases on a cluster."""
    from functools import partial

    from sagittal.cluster.evaluate import score_on_ray
    from sagittal.cluster.places import parse_place

    place = parse_place(on)
    if place.kind != "ray":
        raise PlanError(
            f"--on {on}: cases are scored on Ray. Expected ray or ray:HOST:PORT; in a SLURM queue, give the command "
            "without --on inside a job (srun sagittal evaluate ...).",
            code="usage",
        )
    return partial(score_on_ray, place, say=partial(print, file=sys.stderr, flush=True))


def _print(result: Evaluation) -> None:
    from sagittal.cli.wide_table import print_wide
    from sagittal.report.tables import titled

    shown = list(result.metrics.items())
    rows = [
        (name, *(_number(found.metrics[key].mean, metric.digits) for key, metric in shown), str(found.missed))
        for name, found in result.summary.classes.items()
    ]
    number = result.summary.cases
    title = f"Mean over {number} case{'s' if number != 1 else ''}"
    print_wide(("class", *(titled(metric) for _, metric in shown), "missed"), rows, title=title)
    for warning in result.warnings:
        print(f"warning: {warning}")
    for failure in result.failures:
        print(f"failed: {failure.case}: {failure.message}")


def _number(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"
