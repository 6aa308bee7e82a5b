"""From a folder of labelled scans to a bundle, doing every step that is missing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sagittal.bundle import read_bundle
from sagittal.data.cache import Cache
from sagittal.data.dataset import Dataset, content_hash, read_dataset
from sagittal.data.splits import five_folds
from sagittal.errors import DataError, PlanError, TrainingError
from sagittal.inference.predictor import resolve_device
from sagittal.kernels import keep_freed_memory
from sagittal.plan.base import write_atomically
from sagittal.plan.plan import Plan
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.finish import finish_fold
from sagittal.training.fold import FoldJob, train_fold
from sagittal.training.signals import StopFlag, graceful_stop
from sagittal.training.stages import PlanChoice, RunOptions, check, find_plan, fit_budget, plan_sha256, preprocess

FoldName = Literal["0", "1", "2", "3", "4", "all", "none"]
Ended = Literal["finished", "shortened", "interrupted", "terminated"]

FINISH_S = 5.0
"""Seconds of a budget kept for writing the bundle and leaving."""
VALIDATION_RESERVE = 0.1
"""Share of the time kept for the validation at the end where a resumed run has not measured it."""


@dataclass(frozen=True)
class TrainResult:
    """Where the bundle is and how training ended."""

    bundle: Path
    plan: Plan
    metrics: Mapping[str, Any]
    ended: Ended

    @property
    def complete(self) -> bool:
        """Whether every fold asked for reached its end."""
        return self.ended in ("finished", "shortened")


def train(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    fold: FoldName = "0",
    budget_s: float | None = None,
    options: RunOptions | None = None,
) -> TrainResult:
    """Train a network on a data set and write a bundle: check, plan, preprocess where that is missing, then train.

    Ctrl-C and SIGTERM end training after the step in progress, with a checkpoint and a usable bundle.

    Args:
        dataset: folder in nnU-Net's layout.
        out: the bundle to write; `OUT.run` beside it holds plan, log, checkpoints and report.
        network: name of the network to plan for, `mednext-s` where no plan is given either.
        plan: a plan or the path of one.
        settings: overrides of the plan by dotted name, for example `{"schedule.steps": 500}`, recorded in its reasons.
        fold: which fifth is held out, `all` for five networks one after the other, `none` to train on all cases.
        budget_s: seconds for everything together; the schedule is fitted to what a step is measured to take.
        options: device, folders, workers: what can't change a weight.

    Returns:
        The bundle's path, the plan that was used, the metrics, and how training ended.

    Raises:
        DataError: the data set has errors (`sagittal doctor` lists them), or changed since the run began.
        PlanError: an unknown network or field, a plan for another data set, or a budget that is too small.
        TrainingError: training can't go on, or `out` holds a result that would be lost.
        ResourceError: disk, memory or device is missing or too small; checkpoints stay intact.
    """
    options = options or RunOptions()
    began = time.monotonic()
    out = Path(out)
    run_folder = out.with_name(out.name + ".run")
    names = ("0", "1", "2", "3", "4") if fold == "all" else (fold,)
    device = resolve_device(options.device)
    keep_freed_memory()
    started = _started(out, run_folder, names, options)

    data = read_dataset(dataset)
    check(data, options)
    stored = run_folder / "plan.json" if started else None
    choice = PlanChoice(network=network, plan=plan, settings=settings or {})
    the_plan, is_new = find_plan(data, stored, choice, options)
    content = content_hash(data)
    _remember_data(data, content, run_folder, started)
    cache = preprocess(data, content, the_plan, options.cache or run_folder / "cache", options)

    def left_s(folds_left: int) -> float:
        assert budget_s is not None
        return (budget_s - FINISH_S - (time.monotonic() - began)) / folds_left

    validation_s = None
    if budget_s is not None and is_new:
        the_plan, validation_s = fit_budget(
            the_plan,
            cache,
            _cases(cache, the_plan, names[0]),
            device,
            may_shrink=plan is None and not {"patch.size", "training.batch_size"} & set(choice.settings),
            left_s=lambda: left_s(len(names)),
            budget_s=budget_s,
            say=options.say,
        )
    the_plan.write(run_folder / "plan.json")

    metrics: Mapping[str, Any] = {}
    ended: Ended = "finished"
    with graceful_stop() as stop:
        for position, name in enumerate(names):
            finished = _finished_before(out, the_plan, name)
            if finished is not None:
                metrics = finished
                options.say(f"train: fold {name} is finished already")
                continue
            share_s = None if budget_s is None else left_s(len(names) - position)
            train_cases, held_out = _cases(cache, the_plan, name)
            job = FoldJob(
                plan=the_plan,
                plan_sha256=plan_sha256(the_plan),
                cache=cache,
                name=name,
                train=train_cases,
                validation=held_out,
                folder=run_folder / f"fold_{name}",
                device=device,
                deadline=_deadline(share_s, held_out, validation_s),
                checkpoint_every_s=options.checkpoint_every_s,
            )
            outcome, metrics = _train_one(job, data, out, stop, options, share_s)
            ended = outcome if outcome != "finished" else ended
            if outcome in ("interrupted", "terminated"):
                break
    return TrainResult(bundle=out, plan=the_plan, metrics=metrics, ended=ended)


def _train_one(
    job: FoldJob, data: Dataset, out: Path, stop: StopFlag, options: RunOptions, share_s: float | None
) -> tuple[Ended, Mapping[str, Any]]:
    began = time.monotonic()
    held_out = f"{len(job.validation)} held out" if job.validation else "none held out"
    options.say(f"train: fold {job.name}, {job.plan.network_name} on {job.device}, {len(job.train)} cases, {held_out}")
    run = train_fold(job, stop, options.say)
    validation_s = None if share_s is None else share_s - (time.monotonic() - began)
    return run.ended, finish_fold(job, run, data, out, stop=stop, validation_s=validation_s, say=options.say)


def _finished_before(out: Path, plan: Plan, name: str) -> Mapping[str, Any] | None:
    """Return the bundle's metrics where it holds this fold, trained to its end by the same plan."""
    if not out.exists():
        return None
    bundle = read_bundle(out)
    entry = bundle.metrics.get("folds", {}).get(name)
    complete = entry is not None and entry["ended"] in ("finished", "shortened")
    return bundle.metrics if complete and bundle.plan == plan else None


def _deadline(share_s: float | None, held_out: tuple[int, ...], validation_s: float | None) -> float | None:
    """Return when training must end, so that the validation still fits."""
    if share_s is None:
        return None
    kept_s = VALIDATION_RESERVE * share_s if validation_s is None else validation_s
    return time.monotonic() + share_s - (kept_s if held_out else 0.0)


def _started(out: Path, run_folder: Path, names: tuple[str, ...], options: RunOptions) -> bool:
    """Tell whether the run folder holds a run to go on with; refuse to overwrite one that was not asked for.

    Raises:
        TrainingError: there are checkpoints or finished folds, and `resume` was not given.
    """
    found = {name for name in names if newest_checkpoint(run_folder / f"fold_{name}") is not None}
    if not options.resume:
        if found or (out.exists() and not _is_bundle_without(out, names)):
            where = run_folder if found else out
            raise TrainingError(
                f"{where}: holds an earlier run or result, which would be lost. Go on with it by --resume, choose "
                "another --out, or remove it.",
                code="would_overwrite",
            )
    elif not found:
        options.say(f"resume: no checkpoint in {run_folder}, training starts afresh")
    return bool(found) or (out.exists() and (run_folder / "plan.json").exists())


def _is_bundle_without(out: Path, names: tuple[str, ...]) -> bool:
    if not out.is_dir():
        return False
    held = read_bundle(out).weight_names
    return "all" not in held and "none" not in names and not any(f"fold_{name}" in held for name in names)


def _remember_data(data: Dataset, content: str, run_folder: Path, started: bool) -> None:
    """Write down what the run is made of; refuse to go on where the data set changed.

    Raises:
        DataError: the data set is not the one that the run began with.
    """
    path = run_folder / "run.json"
    if started and path.exists() and json.loads(path.read_text())["content_sha256"] != content:
        raise DataError(
            f"{data.folder}: changed since the run in {run_folder} began, so it can't be continued exactly. "
            "Restore the data, or train into another --out.",
            code="data_changed",
        )
    facts = {
        "content_sha256": content,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    write_atomically(path, (json.dumps(facts, indent=2) + "\n").encode())


def _cases(cache: Cache, plan: Plan, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of the cases to learn from and of those held out."""
    if name == "none":
        return tuple(range(len(cache.case_ids))), ()
    folds = five_folds(cache.case_ids, plan.training)
    if int(name) >= len(folds):
        raise PlanError(f"fold {name}: the plan has {len(folds)} folds, 0 to {len(folds) - 1}.", code="unknown_fold")
    position = {case: number for number, case in enumerate(cache.case_ids)}
    chosen = folds[int(name)]
    return tuple(position[case] for case in chosen.train), tuple(position[case] for case in chosen.validation)
