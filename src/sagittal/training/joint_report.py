"""One report over the held-out cases of all folds, each predicted by the network of its fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sagittal.bundle import hash_case
from sagittal.data.dataset import Dataset
from sagittal.errors import DataError, SagittalError
from sagittal.evaluation import FAST_METRICS, CaseScore, ClassSet, Evaluation, EvaluationSettings
from sagittal.evaluation.joining import join_evaluations
from sagittal.plan.base import write_atomically
from sagittal.plan.plan import Plan
from sagittal.report.evaluation import METRICS_CSV, METRICS_JSON, REPORT_HTML, draw_cases
from sagittal.report.layout import CaseFiles
from sagittal.report.page import Page, highlights, write_report
from sagittal.training.joining import unseen

REPORT_FOLDER = "report"


def write_joint_report(
    run_folder: Path, plan: Plan, data: Dataset, metrics: Mapping[str, Any], say: Callable[[str], None]
) -> Path | None:
    """Write metrics.json, metrics.csv and report.html over all folds into OUT.run/report, from the reports of each.

    Args:
        run_folder: where the folds' predictions and reports are.
        plan: the run's.
        data: scans and labels, for the pictures.
        metrics: the bundle's, which say how every fold ended.
        say: receives lines for a person.

    Returns:
        The page; None where fewer than two folds have a report that fits the bundle.
    """
    reports = {name: told for name in metrics["folds"] if (told := _report_of(run_folder, name, metrics)) is not None}
    scored = {name: told.cases for name, told in reports.items()}
    if len(scored) < 2:
        return None
    classes = ClassSet.of_spec(plan.dataset)
    fold_of = {score.case: name for name, cases in scored.items() for score in cases}
    evaluation = _joined(reports, classes)
    chosen = {item.score.case for item in highlights(evaluation)}
    scans = {
        _files(run_folder, data, plan, fold_of[case.id], case.id): case.images[0]
        for case in data.cases
        if case.id in chosen
    }
    pictures, complaints = draw_cases(scans, classes, is_ct=plan.dataset.channel_names[0] == "CT")
    evaluation = evaluation.replace(warnings=(*evaluation.warnings, *complaints))
    folder = run_folder / REPORT_FOLDER
    page = write_report(folder / REPORT_HTML, evaluation, page=_page(plan, metrics, scored), pictures=pictures)
    write_atomically(folder / METRICS_CSV, evaluation.to_csv().encode())
    write_atomically(folder / METRICS_JSON, evaluation.to_json().encode())
    say(f"report: {page}")
    return page


def interval_lines(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return the Dice of every class and of their mean in words, with intervals; `scores` as `joining.scores_of`."""
    named = {**{name: classes["dice"] for name, classes in scores["classes"].items()}, "mean": scores["mean"]["dice"]}
    return {name: _words(value) for name, value in named.items()}


def _words(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "undefined"
    bounds = value["ci95"]
    told = "too few for an interval" if bounds is None else f"95 % interval {bounds[0]:.3f} to {bounds[1]:.3f}"
    return f"{value['mean']:.3f} ({told}, {value['n']} cases)"


def _joined(reports: Mapping[str, Evaluation], classes: ClassSet) -> Evaluation:
    """Return one evaluation over the cases of all folds, what could not be scored and the warnings included."""
    try:
        return join_evaluations({f"fold {name}": told for name, told in reports.items()})
    except DataError as error:
        if error.code not in ("repeated_case", "classes_differ"):
            raise
    # Own splits may hold a case out twice: then it is two results. A fold of an earlier version measured less.
    parts = reports.values()
    return Evaluation.of_cases(
        classes,
        [score for part in parts for score in part.cases],
        failures=[failure for part in parts for failure in part.failures],
        warnings=list(dict.fromkeys(warning for part in parts for warning in part.warnings)),
        settings=_common_settings(reports),
    )


def _common_settings(reports: Mapping[str, Evaluation]) -> EvaluationSettings:
    """Return the folds' settings; where they differ (a fold of an earlier version), what every version measured."""
    first, *others = (told.settings for told in reports.values())
    return first if all(other == first for other in others) else EvaluationSettings(metrics=FAST_METRICS)


def _report_of(run_folder: Path, name: str, metrics: Mapping[str, Any]) -> Evaluation | None:
    """Return the evaluation in a fold's report where it is of the cases that the bundle tells of."""
    path = run_folder / f"fold_{name}" / REPORT_FOLDER / METRICS_JSON
    try:
        told = Evaluation.from_json(path.read_bytes(), source=str(path))
    except (OSError, SagittalError):
        return None
    known = set(metrics["folds"][name]["cases"])
    return told if told.cases and {hash_case(score.case) for score in told.cases} == known else None


def _files(run_folder: Path, data: Dataset, plan: Plan, fold: str, case: str) -> CaseFiles:
    ending = plan.dataset.file_ending
    return CaseFiles(
        case=case,
        reference=data.folder / "labelsTr" / f"{case}{ending}",
        prediction=run_folder / f"fold_{fold}" / "validation" / f"{case}{ending}",
    )


def _page(plan: Plan, metrics: Mapping[str, Any], scored: Mapping[str, tuple[CaseScore, ...]]) -> Page:
    together = metrics["out_of_fold"]
    total = sum(len(cases) for cases in scored.values())
    absent = sorted({*metrics["missing_folds"], *metrics["folds"]} - set(scored))
    notes = [f"Not in this report: the folds {', '.join(absent)}."] if absent else []
    per_fold = {f"fold {name}": f"{_fold_words(metrics['folds'][name])}, {len(scored[name])} cases" for name in scored}
    return Page(
        title=f"{plan.dataset.name}: {plan.network_name}, {len(scored)} folds",
        lead=f"{total} held-out cases, each predicted whole by networks that {unseen(plan, metrics['folds'])}.",
        notes=notes,
        facts={
            "Plan": dict(plan.reasons),
            "Dice and what it may be for other cases": {
                **interval_lines(together),
                "how": together["interval"],
            },
            "Folds": per_fold,
            **_postprocessing(metrics.get("postprocessing")),
        },
    )


def _postprocessing(told: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what the page tells of the rules that were chosen: the gain of each; the scores of the page lack them."""
    if told is None:
        return {}
    if told.get("why") is not None:
        return {"Post-processing": {"none": told["why"]}}
    gains = {
        item["words"]: ", ".join(f"{name} {gain:+.4f} Dice" for name, gain in item["gain"].items())
        or "with the next rule"
        for item in told["chosen"]
    }
    return {"Post-processing": {**gains, "how": told["note"]}}


def _fold_words(entry: Mapping[str, Any]) -> str:
    dice = entry["scores"]["mean"]["dice"]["mean"]
    return f"{entry['ended']} after {entry['steps']} steps, Dice {'undefined' if dice is None else f'{dice:.3f}'}"
