"""The end of a fold: held-out cases predicted from their scans and scored, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sagittal.bundle import hash_case
from sagittal.data.dataset import Case, Dataset
from sagittal.evaluation import ClassSet, Evaluation
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.predictor import Predictor
from sagittal.report.evaluation import Beside, evaluate
from sagittal.report.page import Page
from sagittal.report.training import Final
from sagittal.training.fast_cost import KEY as FAST_CASES_KEY
from sagittal.training.fast_cost import Dices, dice_of_fast
from sagittal.training.fold import FoldJob, FoldRun
from sagittal.training.initialization import may_have_seen_held_out, weights_for
from sagittal.training.joining import CASE_SCORES, scores_of
from sagittal.training.log import read_log
from sagittal.training.peers import agree
from sagittal.training.signals import StopFlag

REPORT = "report/report.html"
"""Of a fold, within its folder."""
NOT_VALIDATED = {
    "none": "not validated: every case was used for training",
    "stopped": "not validated: the run was stopped before its end",
    "no_time": "not validated: no time of the budget was left",
}


def finish_fold(
    job: FoldJob,
    run: FoldRun,
    data: Dataset,
    *,
    patients: Mapping[str, str],
    stop: StopFlag,
    validation_s: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Validate a fold on its held-out scans and return its entry in the bundle's metrics, which names no case.

    Args:
        job, run: the fold and its weights.
        data: where the held-out scans are.
        patients: patient by hash of the case, where cases repeat.
        stop: a raised flag ends the validation after the case in progress.
        validation_s: seconds that the validation may take, or None.
        say: receives lines for a person.
    """
    began = time.monotonic()
    done: tuple[str, ...] = ()
    fast: Dices = {}
    why = "none" if not job.validation else "stopped"
    agree(stop, False, job.world)
    if job.validation and run.complete and not stop:
        predictor = Predictor(job.plan, TorchEngine(job.plan, (run.network,), job.device))
        done = _predict_held_out(job, predictor, data, stop, validation_s)
        agree(stop, False, job.world)
        why = "stopped" if stop else "no_time"
        cases = [case for case in _held_out(job, data) if case.id in done]
        left_s = None if validation_s is None else validation_s - (time.monotonic() - began)
        fast = dice_of_fast(predictor, data, cases, job.world, stop, left_s)
        agree(stop, False, job.world)

    def score() -> dict[str, Any]:
        evaluation = _evaluate(job, run, data, done, patients=patients, say=say) if done else None
        entry = _entry(job, run, evaluation, why=why, stopped=bool(stop))
        entry |= {FAST_CASES_KEY: fast} if fast else {}
        scores = {} if evaluation is None else {"scores": scores_of(job.plan, {job.name: entry}, patients)}
        return {**entry, **scores}

    return job.peers.on_main(score)


def _entry(job: FoldJob, run: FoldRun, evaluation: Evaluation | None, *, why: str, stopped: bool) -> dict[str, Any]:
    validated = 0 if evaluation is None else len(evaluation.cases)
    return {
        "steps": run.progress.step,
        "weights_step": run.weights_step,
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
        **{key: _by_case(evaluation, metric) for metric, key in CASE_SCORES.items()},
        **_started_from(job),
    }


def _started_from(job: FoldJob) -> dict[str, Any]:
    start = job.plan.training.initialization
    if start is None:
        return {}
    return {
        "started_from": f"{weights_for(start, job.name)} of {start.network_name}",
        "start_may_have_seen_held_out": may_have_seen_held_out(job.plan, job.name),
    }


def _predict_held_out(
    job: FoldJob, predictor: Predictor, data: Dataset, stop: StopFlag, validation_s: float | None
) -> tuple[str, ...]:
    """Predict held-out scans, shared out to the processes, and return the cases that were done, in their order."""
    began = time.monotonic()
    done: list[str] = []
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
    job: FoldJob,
    run: FoldRun,
    data: Dataset,
    done: tuple[str, ...],
    *,
    patients: Mapping[str, str],
    say: Callable[[str], None],
) -> Evaluation:
    evaluation = evaluate(
        job.folder / "validation",
        data.folder / "labelsTr",
        job.folder / "report",
        labels=ClassSet.of_spec(job.plan.dataset),
        beside=Beside(cases=done, patients={case: patients.get(hash_case(case), case) for case in done}),
        page=_page(job, run, len(done)),
    )
    dice = evaluation.summary.mean["dice"]
    shown = "undefined" if dice is None else f"{dice:.4f}"
    cases = f"{len(done)} of {len(job.validation)} held-out cases"
    say(f"validate: Dice {shown} on {cases}")
    say(f"report: {job.folder / REPORT}")
    if run.monitor is not None:
        run.monitor.add_evaluation(Final(dice, cases, REPORT))
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
                "weights": f"of step {run.weights_step}",
                "training time": f"{run.progress.elapsed_s:.0f} s, {run.waited_s:.1f} s of it waiting for data",
                "device": str(job.device),
                "patch (D, H, W)": " x ".join(map(str, plan.patch.size)),
                "batch": plan.training.batch_size,
            },
        },
        curve=read_log(job.folder / "log.jsonl"),
    )


def _by_case(evaluation: Evaluation | None, metric: str) -> dict[str, dict[str, float | None]]:
    cases = () if evaluation is None else evaluation.cases
    return {
        hash_case(case.case): {name: score.metrics[metric] for name, score in case.classes.items()} for case in cases
    }
