"""The end of a fold: held-out cases predicted from their scans and scored, the report, and the bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from sagittal.bundle import Bundle, hash_case, read_bundle, write_bundle
from sagittal.data.dataset import Case, Dataset
from sagittal.evaluation import ClassSet, Evaluation
from sagittal.inference.predictor import Predictor
from sagittal.plan.plan import Plan
from sagittal.report.evaluation import evaluate
from sagittal.report.page import Page
from sagittal.training.fold import COMPLETE, FoldJob, FoldRun
from sagittal.training.initialization import may_have_seen_held_out, weights_for
from sagittal.training.log import read_log
from sagittal.training.peers import agree
from sagittal.training.signals import StopFlag

NOT_VALIDATED = {
    "none": "not validated: every case was used for training",
    "stopped": "not validated: the run was stopped before its end",
    "no_time": "not validated: no time of the budget was left",
}


def finish_fold(
    job: FoldJob,
    run: FoldRun,
    data: Dataset,
    out: Path,
    *,
    stop: StopFlag,
    validation_s: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Validate a fold on its held-out scans, and write it into the bundle beside the finished folds that are there.

    Finished folds predict together; one that was stopped is in the bundle only as long as none is finished.

    Args:
        job, run: the fold and its weights.
        data: where the held-out scans are.
        out: the bundle.
        stop: a raised flag ends the validation after the case in progress.
        validation_s: seconds that the validation may take, or None.
        say: receives lines for a person.

    Returns:
        The metrics that the bundle holds.
    """
    done: tuple[str, ...] = ()
    why = "none" if not job.validation else "stopped"
    agree(stop, False, job.world)
    if job.validation and run.complete and not stop:
        done = _predict_held_out(job, run, data, stop, validation_s)
        agree(stop, False, job.world)
        why = "stopped" if stop else "no_time"
    return job.peers.on_main(lambda: _write(job, run, data, out, done=done, why=why, stopped=bool(stop), say=say))


def _write(
    job: FoldJob,
    run: FoldRun,
    data: Dataset,
    out: Path,
    *,
    done: tuple[str, ...],
    why: str,
    stopped: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Score the predictions of the cases `done` and write report and bundle; return its metrics."""
    evaluation = _evaluate(job, run, data, done, say) if done else None
    validated = 0 if evaluation is None else len(evaluation.cases)
    entry: dict[str, Any] = {
        "steps": run.progress.step,
        "planned_steps": job.plan.schedule.steps,
        "ended": run.ended,
        "shortening": None if run.progress.shortening is None else run.progress.shortening.model_dump(mode="json"),
        "seconds": round(run.progress.elapsed_s, 1),
        "waited_for_data_s": round(run.waited_s, 1),
        "device": str(job.device),
        "training_cases": len(job.train),
        "held_out_cases": len(job.validation),
        "validation": NOT_VALIDATED[why] if evaluation is None else f"{validated} held-out cases",
        "validation_stopped": run.complete and stopped and validated < len(job.validation),
        "cases": {} if evaluation is None else _by_case(evaluation),
        **_started_from(job),
    }
    weights, folds = _finished(out, job.plan)
    if folds and not run.complete:
        say(f"fold {job.name}: not finished, so it is left out of {out}")
        return join_folds(job.plan, folds)
    weights[weights_name(job.name)] = run.weights()
    folds[job.name] = entry
    metrics = join_folds(job.plan, folds)
    write_bundle(out, plan=job.plan, weights=weights, metrics=metrics)
    return metrics


def bundle_at(out: Path) -> Bundle | None:
    """Return the bundle at `out`, None where there is nothing or an empty folder.

    Raises:
        BundleError: there is something else, or a damaged bundle.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    return read_bundle(out)


def weights_name(fold: str) -> str:
    """Return what a bundle calls the weights of a fold."""
    return "all" if fold == "none" else f"fold_{fold}"


def join_folds(plan: Plan, folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the bundle's metrics from those of its folds: Dice per label over all held-out cases, then over labels."""
    scores: dict[str, dict[str, float | None]] = {}
    for entry in folds.values():
        scores.update(entry["cases"])
    dice: dict[str, float | None] = {}
    for label in plan.dataset.labels:
        known = [value for case in scores.values() if (value := case.get(label.name)) is not None]
        dice[label.name] = mean(known) if known else None
    defined = [value for value in dice.values() if value is not None]
    reasons = sorted({str(entry["validation"]) for entry in folds.values()})
    return {
        "dice": dice,
        "mean_dice": mean(defined) if defined else None,
        "validation": f"{len(scores)} held-out cases, each predicted by networks that {_unseen(folds)}"
        if scores
        else "; ".join(reasons),
        "training_cases": max(int(entry["training_cases"]) for entry in folds.values()),
        "folds": {name: dict(folds[name]) for name in sorted(folds)},
    }


def _started_from(job: FoldJob) -> dict[str, Any]:
    start = job.plan.training.initialization
    if start is None:
        return {}
    return {
        "started_from": f"{weights_for(start, job.name)} of {start.network_name}",
        "start_may_have_seen_held_out": may_have_seen_held_out(job.plan, job.name),
    }


def _unseen(folds: Mapping[str, Mapping[str, Any]]) -> str:
    if any(entry.get("start_may_have_seen_held_out", False) for entry in folds.values()):
        return "were not trained on it here; the weights that they started from may have seen it"
    return "never saw it"


def _predict_held_out(
    job: FoldJob, run: FoldRun, data: Dataset, stop: StopFlag, validation_s: float | None
) -> tuple[str, ...]:
    """Predict held-out scans, shared out to the processes, and return the cases that were done, in their order."""
    began = time.monotonic()
    done: list[str] = []
    predictor = Predictor(job.plan, (run.network,), job.device)
    cases = _held_out(job, data)
    for case in cases[job.world.rank :: job.world.size]:
        taken = time.monotonic() - began
        # The next case must fit as well as those before it did.
        if stop or (validation_s is not None and taken * (len(done) + 1) / max(len(done), 1) > validation_s):
            break
        predictor.predict(case.images, mirror=False).write(_prediction(job, case.id))
        done.append(case.id)
    everyone = {name for part in job.world.gather_objects(done) for name in part}
    return tuple(case.id for case in cases if case.id in everyone)


def _prediction(job: FoldJob, case: str) -> Path:
    return job.folder / "validation" / f"{case}{job.plan.dataset.file_ending}"


def _evaluate(
    job: FoldJob, run: FoldRun, data: Dataset, done: tuple[str, ...], say: Callable[[str], None]
) -> Evaluation:
    evaluation = evaluate(
        job.folder / "validation",
        data.folder / "labelsTr",
        job.folder / "report",
        labels=ClassSet.of_spec(job.plan.dataset),
        cases=done,
        page=_page(job, run, len(done)),
    )
    dice = evaluation.summary.mean["dice"]
    shown = "undefined" if dice is None else f"{dice:.4f}"
    say(f"validate: Dice {shown} on {len(done)} of {len(job.validation)} held-out cases")
    say(f"report: {job.folder / 'report' / 'report.html'}")
    return evaluation


def _held_out(job: FoldJob, data: Dataset) -> list[Case]:
    wanted = {job.cache.case_ids[position] for position in job.validation}
    return [case for case in data.cases if case.id in wanted]


def _page(job: FoldJob, run: FoldRun, scored: int) -> Page:
    plan = job.plan
    return Page(
        title=f"{plan.dataset.name}: {plan.network_name}, fold {job.name}",
        lead=f"{scored} of {len(job.validation)} held-out cases, predicted whole on their scans' grid, not mirrored.",
        facts={
            "Plan": dict(plan.reasons),
            "Run": {
                "steps": f"{run.progress.step} of {plan.schedule.steps} ({run.ended})",
                "training time": f"{run.progress.elapsed_s:.0f} s, {run.waited_s:.1f} s of it waiting for data",
                "device": str(job.device),
                "patch (D, H, W)": " x ".join(map(str, plan.patch.size)),
                "batch": plan.training.batch_size,
            },
        },
        curve=read_log(job.folder / "log.jsonl"),
    )


def _by_case(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    return {
        hash_case(case.case): {name: score.metrics["dice"] for name, score in case.classes.items()}
        for case in evaluation.cases
    }


def _finished(out: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and metrics of the folds that the bundle holds, trained to their end by the same plan."""
    bundle = bundle_at(out)
    if bundle is None or bundle.plan != plan:
        return {}, {}
    folds = {name: entry for name, entry in bundle.metrics.get("folds", {}).items() if entry["ended"] in COMPLETE}
    weights = {weights_name(name): bundle.weights(weights_name(name)) for name in folds}
    return weights, folds
