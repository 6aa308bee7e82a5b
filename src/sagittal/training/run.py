"""From a folder of labelled scans to a bundle, doing every step that is missing."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.cache import Cache
from sagittal.data.dataset import Dataset, content_hash, read_dataset
from sagittal.data.known import known_digests
from sagittal.data.split_files import SPLITS_NAME, write_splits
from sagittal.data.splits import Fold
from sagittal.errors import DataError, PlanError, TrainingError
from sagittal.kernels import keep_freed_memory
from sagittal.plan.base import write_atomically
from sagittal.plan.plan import Configuration, Plan
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.choice import PlanChoice
from sagittal.training.finish import bundle_at, finish_fold, weights_name
from sagittal.training.fold import COMPLETE, Ended, FoldJob, train_fold
from sagittal.training.initialization import StartFrom, try_fill
from sagittal.training.peers import Peers, agree, process_device, require_enough_samples, require_shared, together
from sagittal.training.precision import require_precision
from sagittal.training.signals import StopFlag, graceful_stop
from sagittal.training.split import SplitSources, folds_of
from sagittal.training.stages import (
    Budget,
    RunOptions,
    check,
    find_plan,
    fit_budget,
    plan_sha256,
    preprocess,
)

FoldName = Literal["0", "1", "2", "3", "4", "all", "none"]

FOLDS = ("0", "1", "2", "3", "4")
"""Names of the folds; a plan may have fewer."""
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
        return self.ended in COMPLETE


def train(
    dataset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    fold: FoldName = "0",
    budget_s: float | None = None,
    init_from: Bundle | str | os.PathLike[str] | None = None,
    freeze_encoder_epochs: int | None = None,
    configuration: Configuration | None = None,
    preset: str | None = None,
    options: RunOptions | None = None,
) -> TrainResult:
    """Train a network on a data set and write a bundle: check, plan, preprocess where that is missing, then train.

    Ctrl-C and SIGTERM end training after the step in progress, with a checkpoint and a usable bundle.

    Args:
        dataset: folder in nnU-Net's layout.
        out: the bundle to write; `OUT.run` beside it holds plan, log, checkpoints and report.
        network: name of the network to plan for; where no plan is given either, that of `init_from`, of the preset, or
            `mednext-s`.
        plan: a plan or the path of one.
        settings: overrides of the plan by dotted name, for example `{"schedule.steps": 500}`, recorded in its reasons.
        fold: which fifth is held out, `all` for five networks one after the other, `none` to train on all cases.
        budget_s: seconds for everything together; the schedule is fitted to what a step is measured to take.
        init_from: bundle to start from: the same network but for kernels (UpKern), channels, labels (docs/weights.md).
        freeze_encoder_epochs: epochs of 250 steps in which the encoder stays as `init_from` has it.
        configuration: what to plan for where no plan is given: `3d` (the default), `3d-low` or `2d`.
        preset: the protocol that a plan made here starts from, for example `mednext-paper`.
        options: device, folders, workers: what can't change a weight.

    Raises:
        DataError: the data set has errors (`sagittal doctor` lists them), or changed since the run began.
        PlanError: an unknown network or field, a plan for other data, too small a budget, weights that do not fit.
        TrainingError: training can't go on, or `out` holds a result that would be lost.
        BundleError: `out` or `init_from` is something else than a bundle, or a damaged one.
        ResourceError: disk, memory or device is missing or too small; checkpoints stay intact.
    """
    options = options or RunOptions()
    start = _start(init_from, freeze_encoder_epochs)
    budget = None if budget_s is None else Budget(budget_s, time.monotonic() + budget_s - FINISH_S)
    out = _bundle_folder(Path(out))
    folder = out.with_name(out.name + ".run")
    device = process_device(options.device, options.world)
    keep_freed_memory()
    choice = PlanChoice(network, plan, settings or {}, start, configuration, preset)
    if not options.world.main:
        options = replace(options, say=lambda line: None)
    with together(options.world, device) as peers:
        ready = peers.on_main(lambda: _prepare(Path(dataset), out, folder, fold, choice, device, options))
        require_shared(folder, ready.cache.folder, peers.world)
        the_plan, validation_s = ready.plan, None
        if budget is not None and ready.is_new:
            cases = _cases(ready.cache, ready.folds, ready.names[0])
            the_plan, validation_s = fit_budget(
                the_plan, ready.cache, cases, device, choice, budget, folds=len(ready.names), options=options
            )
        peers.on_main(lambda: the_plan.write(folder / "plan.json"))
        source = None if start is None else start.bundle
        run = _Run(
            the_plan,
            ready.data,
            ready.cache,
            ready.folds,
            out,
            folder,
            device,
            options,
            budget,
            validation_s,
            source,
            peers,
        )
        metrics, ended = _train_folds(run, ready.names)
    return TrainResult(bundle=out, plan=the_plan, metrics=metrics, ended=ended)


@dataclass(frozen=True)
class _Ready:
    """What is there before training begins; one process sees to it, and all receive it."""

    plan: Plan
    is_new: bool
    data: Dataset
    cache: Cache
    folds: tuple[Fold, ...]
    names: tuple[str, ...]


def _prepare(
    dataset: Path,
    out: Path,
    folder: Path,
    fold: FoldName,
    choice: PlanChoice,
    device: torch.device,
    options: RunOptions,
) -> _Ready:
    """Check the data set, find or make the plan, fill the cache and split."""
    stored = _stored_plan(out, folder, fold, options)
    data = read_dataset(dataset)
    check(data, options)
    plan, is_new = find_plan(data, stored, choice, options)
    require_precision(plan, device)
    require_enough_samples(plan, options.world)
    names = _fold_names(fold, plan)
    _require_source(plan, choice.start, names, out, folder)
    digests = known_digests(data, options.known, workers=options.workers)
    _remember_data(data, content_hash(data, digests), folder, started=stored is not None, processes=options.world.size)
    cache = preprocess(data, digests, plan, options.cache or folder / "cache", device, options)
    folds = () if fold == "none" else _split(data, plan, options, folder, started=stored is not None)
    return _Ready(plan, is_new, data, cache, folds, names)


def _bundle_folder(out: Path) -> Path:
    """Return `out` by a name beside which the run folder can lie.

    Raises:
        TrainingError: it is the root of the file system.
    """
    named = out.resolve() if out.name in ("", "..") else out
    if not named.name:
        raise TrainingError(f"{named}: no folder for a bundle, which is replaced as a whole. Choose another --out.")
    return named


@dataclass(frozen=True)
class _Run:
    """What the folds of a run share; `validation_s` is what the budget keeps for the validation of each."""

    plan: Plan
    data: Dataset
    cache: Cache
    folds: tuple[Fold, ...]
    out: Path
    folder: Path
    device: torch.device
    options: RunOptions
    budget: Budget | None
    validation_s: float | None
    source: Bundle | None
    peers: Peers


def _train_folds(run: _Run, names: tuple[str, ...]) -> tuple[Mapping[str, Any], Ended]:
    """Train those of the folds that are not finished; return the bundle's metrics and how it ended."""
    metrics: Mapping[str, Any] = {}
    ended: Ended = "finished"
    with graceful_stop() as stop:
        for position, name in enumerate(names):
            finished = run.peers.on_main(partial(_finished_before, run.out, run.plan, name))
            if finished is not None:
                metrics = finished
                run.options.say(f"train: fold {name} is finished already")
                continue
            agree(stop, False, run.peers.world)
            if stop.reason is not None:
                return metrics, stop.reason
            share_s = None if run.budget is None else run.budget.share_s(len(names) - position)
            outcome, metrics = _train_one(run, name, share_s, stop)
            ended = outcome if outcome != "finished" else ended
            if outcome in ("interrupted", "terminated"):
                break
    return metrics, ended


def _train_one(run: _Run, name: str, share_s: float | None, stop: StopFlag) -> tuple[Ended, Mapping[str, Any]]:
    began = time.monotonic()
    say, (train_cases, held_out) = run.options.say, _cases(run.cache, run.folds, name)
    job = FoldJob(
        plan=run.plan,
        plan_sha256=plan_sha256(run.plan),
        cache=run.cache,
        name=name,
        train=train_cases,
        validation=held_out,
        folder=run.folder / f"fold_{name}",
        device=run.device,
        deadline=_deadline(share_s, held_out, run.validation_s),
        checkpoint_every_s=run.options.checkpoint_every_s,
        source=run.source,
        peers=run.peers,
        keep_checkpoints=run.options.keep_checkpoints,
        loader_workers=run.options.loader_workers,
        compile=run.options.compile,
        trackers=run.options.trackers,
    )
    told = f"{len(held_out)} held out" if held_out else "none held out"
    say(f"train: fold {name}, {run.plan.network_name} on {run.device}, {len(train_cases)} cases, {told}")
    outcome = train_fold(job, stop, say)
    validation_s = None if share_s is None else share_s - (time.monotonic() - began)
    metrics = finish_fold(job, outcome, run.data, run.out, stop=stop, validation_s=validation_s, say=say)
    if stop.reason is not None and _validation_was_stopped(metrics, name):
        return stop.reason, metrics
    return outcome.ended, metrics


def _validation_was_stopped(metrics: Mapping[str, Any], name: str) -> bool:
    return bool(metrics["folds"].get(name, {}).get("validation_stopped", False))


def _finished_before(out: Path, plan: Plan, name: str) -> Mapping[str, Any] | None:
    """Return the bundle's metrics where it holds this fold, trained and validated to its end by the same plan."""
    bundle = bundle_at(out)
    if bundle is None or bundle.plan != plan:
        return None
    entry = bundle.metrics.get("folds", {}).get(name)
    finished = entry is not None and entry["ended"] in COMPLETE and not _validation_was_stopped(bundle.metrics, name)
    return bundle.metrics if finished else None


def _deadline(share_s: float | None, held_out: tuple[int, ...], validation_s: float | None) -> float | None:
    """Return when training must end, so that the validation still fits."""
    if share_s is None:
        return None
    kept_s = VALIDATION_RESERVE * share_s if validation_s is None else validation_s
    return time.monotonic() + share_s - (kept_s if held_out else 0.0)


def _stored_plan(out: Path, folder: Path, fold: FoldName, options: RunOptions) -> Path | None:
    """Return the plan of the run or the bundle that this one belongs to, None where there is neither.

    All folds of a run have one plan, also those that are trained later.

    Raises:
        TrainingError: a result would be lost: `resume` was not given, or the bundle's folds can't be joined.
        BundleError: `out` is something else than a bundle, or a damaged one.
    """
    bundle = bundle_at(out)
    held = () if bundle is None else bundle.weight_names
    wanted = FOLDS if fold == "all" else (fold,)
    begun = [name for name in (*FOLDS, "none") if newest_checkpoint(folder / f"fold_{name}") is not None]
    if held and ("all" in held) != (fold == "none"):
        raise TrainingError(
            f"{out}: holds {', '.join(held)}, which --fold {fold} can't join: a bundle holds folds, or one network "
            "trained on all cases. Choose another --out.",
            code="would_overwrite",
        )
    again = bool(set(begun) & set(wanted))
    if not options.resume and (again or set(held) & {weights_name(name) for name in wanted}):
        raise TrainingError(
            f"{folder if again else out}: holds an earlier run or result, which would be lost. Go on with it by "
            "--resume, choose another --out, or remove it.",
            code="would_overwrite",
        )
    if options.resume and not again:
        options.say(f"resume: no checkpoint in {folder}, training starts afresh")
    if (begun or held) and (folder / "plan.json").exists():
        return folder / "plan.json"
    return out / "plan.json" if held else None


def _start(init_from: Bundle | str | os.PathLike[str] | None, freeze_encoder_epochs: int | None) -> StartFrom | None:
    if init_from is not None:
        bundle = init_from if isinstance(init_from, Bundle) else read_bundle(init_from)
        return StartFrom(bundle, freeze_encoder_epochs)
    if freeze_encoder_epochs:
        raise PlanError(
            f"--freeze-encoder {freeze_encoder_epochs}: an encoder of random weights would stay as it is. Give trained "
            "ones with --init-from BUNDLE.",
            code="nothing_to_freeze",
        )
    return None


def _require_source(plan: Plan, start: StartFrom | None, names: tuple[str, ...], out: Path, folder: Path) -> None:
    """Make sure that every fold that has yet to begin can begin from the weights that the plan names.

    Raises:
        PlanError: they are needed and not given, or they do not fit.
    """
    initialization = plan.training.initialization
    if initialization is None:
        return
    new = [
        name
        for name in names
        if newest_checkpoint(folder / f"fold_{name}") is None and _finished_before(out, plan, name) is None
    ]
    if start is not None and new:
        try_fill(plan, start.bundle, new[0])
    elif new:
        raise PlanError(
            f"fold {new[0]} starts, by its plan, from trained weights of {initialization.network_name}, and has no "
            "checkpoint yet. Give their bundle with --init-from BUNDLE.",
            code="initialization_missing",
        )


def _fold_names(fold: FoldName, plan: Plan) -> tuple[str, ...]:
    """Return the folds to train.

    Raises:
        PlanError: the plan has fewer folds.
    """
    names = FOLDS[: plan.training.folds]
    if fold not in (*names, "all", "none"):
        raise PlanError(
            f"--fold {fold}: the plan has {len(names)} folds (training.folds), {names[0]} to {names[-1]}. Choose one "
            "of them, all or none.",
            code="unknown_fold",
        )
    return names if fold == "all" else (fold,)


def _remember_data(data: Dataset, content: str, run_folder: Path, *, started: bool, processes: int) -> None:
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
        "processes": processes,
        "platform": platform.platform(),
    }
    write_atomically(path, (json.dumps(facts, indent=2) + "\n").encode())


def _split(data: Dataset, plan: Plan, options: RunOptions, folder: Path, *, started: bool) -> tuple[Fold, ...]:
    """Return the folds of the run, which keeps them beside its plan.

    Raises:
        DataError: the cases can't be split by the plan, or no longer as it was made with.
    """
    kept = folder / SPLITS_NAME
    given = options.splits or (kept if started and plan.training.split == "own" and kept.is_file() else None)
    folds = folds_of(plan, SplitSources(data, given, options.workers, options.say))
    write_splits(kept, folds)
    return folds


def _cases(cache: Cache, folds: tuple[Fold, ...], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of the cases to learn from and of those held out."""
    if name == "none":
        return tuple(range(len(cache.case_ids))), ()
    position = {case: number for number, case in enumerate(cache.case_ids)}
    chosen = folds[int(name)]
    return tuple(position[case] for case in chosen.train), tuple(position[case] for case in chosen.validation)
