"""From a folder of labelled scans to a bundle, doing every step that is missing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.cache import Cache
from sagittal.data.case_weights import CaseWeights, require_same_weights
from sagittal.data.dataset import Dataset, content_hash, read_dataset
from sagittal.data.known import known_digests
from sagittal.data.split_files import SPLITS_NAME, write_splits
from sagittal.data.splits import Fold
from sagittal.errors import PlanError, TrainingError
from sagittal.kernels import cpu_available, keep_freed_memory
from sagittal.kernels.choice import require_kernels, use_kernels
from sagittal.plan.plan import Configuration, Plan
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.choice import PlanChoice
from sagittal.training.cross_validation import Run, cases_of, train_folds
from sagittal.training.determinism import deterministic_operations
from sagittal.training.fold import COMPLETE, Ended
from sagittal.training.initialization import StartFrom, try_fill
from sagittal.training.joining import bundle_at, finished_before, weights_name
from sagittal.training.manifest import attempt, facts_of, now, remember_data
from sagittal.training.peers import process_device, require_enough_samples, require_shared, together
from sagittal.training.precision import require_precision
from sagittal.training.run_folder import HANDED_OUT
from sagittal.training.side_by_side import places_on
from sagittal.training.split import SplitSources, folds_of
from sagittal.training.stages import (
    Budget,
    RunOptions,
    check,
    find_plan,
    fit_budget,
    plan_sha256,
    preprocess,
    read_weights,
)
from sagittal.training.trackers import require_known

FoldName = Literal["0", "1", "2", "3", "4", "all", "none"]

FOLDS = ("0", "1", "2", "3", "4")
"""Names of the folds; a plan may have fewer."""
COMPILING_PAYS_S = 1800.0
"""In a shorter budget the minutes that compiling takes would not come back."""
FINISH_S = 5.0
"""Seconds of a budget kept for writing the bundle and leaving."""


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
        fold: which fifth is held out, `all` for five networks (one after the other, or side by side on the `devices` of
            `options`), `none` to train on all cases. A fold that fails does not stop the others.
        budget_s: seconds for everything together; the schedule is fitted to what a step is measured to take.
        init_from: bundle to start from: the same network but for kernels (UpKern), channels, labels (docs/weights.md).
        freeze_encoder_epochs: epochs of 250 steps in which the encoder stays as `init_from` has it.
        configuration: what to plan for where no plan is given: `3d` (the default), `3d-low` or `2d`.
        preset: the protocol that a plan made here starts from, for example `mednext-paper`.
        options: device, folders, workers: what can't change a weight.

    Raises:
        DataError: the data set has errors (`sagittal doctor` lists them), or changed since the run began.
        PlanError: an unknown network or field, a plan for other data, too small a budget, weights that do not fit.
        TrainingError: training can't go on, a fold of several failed, or `out` holds a result that would be lost.
        BundleError: `out` or `init_from` is something else than a bundle, or a damaged one.
        ResourceError: disk, memory or device is missing or too small; checkpoints stay intact.
    """
    options = options or RunOptions()
    choice = PlanChoice(network, plan, settings or {}, _start(init_from, freeze_encoder_epochs), configuration, preset)
    budget = None
    if budget_s is not None:
        budget = Budget(budget_s, time.monotonic() + budget_s - options.passed_s - FINISH_S)
    if budget is not None and budget.total_s < COMPILING_PAYS_S and options.compile == "auto":
        options = replace(options, compile="off")
    with use_kernels(options.kernels, options.known_kernels):
        return _train(Path(dataset), _bundle_folder(Path(out)), fold, choice, budget, options)


def _train(
    dataset: Path, out: Path, fold: FoldName, choice: PlanChoice, budget: Budget | None, options: RunOptions
) -> TrainResult:
    """Do what `train` does, with its wishes in order."""
    started = now()
    folder = out.with_name(out.name + ".run")
    devices = _devices(fold, options)
    require_known(options.trackers)
    for device in devices:
        require_kernels(device, on_cpu=cpu_available())
    keep_freed_memory()
    if not options.world.main:
        options = replace(options, say=lambda line: None)
    with together(options.world, devices[0]) as peers:
        ready = peers.on_main(lambda: _prepare(dataset, out, folder, fold, choice, devices, options))
        require_shared(folder, ready.cache.folder, peers.world)
        plan, validation_s = ready.plan, None
        if budget is not None and ready.is_new:
            peers.on_main(lambda: _require_time(budget))
            plan, validation_s = _fit_budget(ready, devices, choice, budget, options)
        peers.on_main(lambda: plan.write(folder / "plan.json"))
        run = Run(
            plan=plan,
            data=ready.data,
            content_sha256=ready.content_sha256,
            cache=ready.cache,
            folds=ready.folds,
            out=out,
            folder=folder,
            devices=devices,
            options=options,
            budget=budget,
            validation_s=validation_s,
            source=None if choice.start is None else choice.start.bundle,
            case_weights=ready.case_weights,
        )
        facts = facts_of(plan, plan_sha256(plan), ready.content_sha256, devices, processes=peers.world.size)
        with attempt(folder, facts, ready.names, started=started, write=peers.world.main) as outcome:
            metrics, ended = train_folds(run, ready.names, peers)
            outcome.append(ended)
    return TrainResult(bundle=out, plan=plan, metrics=metrics, ended=ended)


def _devices(fold: FoldName, options: RunOptions) -> tuple[torch.device, ...]:
    """Return the devices of the run, one for each fold that is trained at a time.

    Raises:
        ResourceError: this machine lacks one.
        TrainingError: several devices, and nothing that they could share out.
    """
    if options.carrier is not None and (options.devices or options.world.size > 1):
        what = f"--devices {','.join(options.devices)}" if options.devices else "torchrun"
        raise TrainingError(
            f"{what}: with --on the folds are trained on other machines, each on the --device there. Leave out {what}.",
            code="options",
        )
    if not options.devices:
        return (process_device(options.device, options.world),)
    if fold != "all" or options.world.size > 1:
        why = f"--fold {fold} is one network" if fold != "all" else "torchrun started several processes for each fold"
        raise TrainingError(
            f"--devices {','.join(options.devices)}: these train folds side by side, and {why}. Give --fold all and "
            "start one process, or name one --device (several GPUs train one network with torchrun).",
            code="options",
        )
    return tuple(process_device(name, options.world) for name in options.devices)


def _require_time(budget: Budget) -> None:
    """Refuse a budget that was used up by what comes before training, instead of measuring a step after its end.

    Raises:
        PlanError: it was.
    """
    left_s = budget.ends - time.monotonic()
    if left_s <= 0:
        raise PlanError(
            f"a budget of {budget.total_s:.0f} s was over before training: to check, plan and preprocess took "
            f"{budget.total_s - FINISH_S - left_s:.0f} s, {FINISH_S:.0f} s are for the end, and at least 10 steps are "
            "needed. Give more time; what was prepared is kept.",
            code="budget_too_small",
        )


def _fit_budget(
    ready: _Ready, devices: tuple[torch.device, ...], choice: PlanChoice, budget: Budget, options: RunOptions
) -> tuple[Plan, float]:
    """Fit the plan's schedule to the time, measured with the threads that a fold will have."""
    at_once = max(len(devices), options.at_once)
    before, rounds = torch.get_num_threads(), math.ceil(len(ready.names) / at_once)
    torch.set_num_threads(places_on(devices)[0].threads)
    try:
        cases = cases_of(ready.cache, ready.folds, ready.names[0])
        with deterministic_operations(devices[0], wanted=ready.plan.training.deterministic):
            return fit_budget(ready.plan, ready.cache, cases, devices[0], choice, budget, folds=rounds, options=options)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Ready:
    """What is there before training begins; one process sees to it, and all receive it."""

    plan: Plan
    is_new: bool
    data: Dataset
    content_sha256: str
    cache: Cache
    case_weights: CaseWeights | None
    folds: tuple[Fold, ...]
    names: tuple[str, ...]


def _prepare(
    dataset: Path,
    out: Path,
    folder: Path,
    fold: FoldName,
    choice: PlanChoice,
    devices: tuple[torch.device, ...],
    options: RunOptions,
) -> _Ready:
    """Check the data set, find or make the plan, fill the cache and split."""
    stored = _stored_plan(out, folder, fold, options)
    data = read_dataset(dataset)
    check(data, options)
    plan, is_new = find_plan(data, stored, choice, options)
    for device in devices:
        require_precision(plan, device)
    require_enough_samples(plan, options.world)
    names = _fold_names(fold, plan)
    _require_source(plan, choice.start, names, out, folder)
    digests = known_digests(data, options.known, workers=options.workers)
    content = content_hash(data, digests)
    remember_data(folder, data.folder, content, started=stored is not None)
    weights = require_same_weights(plan.training, read_weights(data))
    cache = preprocess(data, digests, plan, options.cache or folder / "cache", devices[0], options)
    folds = () if fold == "none" else _split(data, plan, options, folder, started=stored is not None)
    return _Ready(plan, is_new, data, content, cache, weights, folds, names)


def _bundle_folder(out: Path) -> Path:
    """Return `out` by a name beside which the run folder can lie.

    Raises:
        TrainingError: it is the root of the file system.
    """
    named = out.resolve() if out.name in ("", "..") else out
    if not named.name:
        raise TrainingError(f"{named}: no folder for a bundle, which is replaced as a whole. Choose another --out.")
    return named


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
    handed_out = options.resume and (folder / HANDED_OUT).is_file()
    if options.resume and not again and not handed_out:
        options.say(f"resume: no checkpoint in {folder}, training starts afresh")
    if (begun or held or handed_out) and (folder / "plan.json").exists():
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
        if newest_checkpoint(folder / f"fold_{name}") is None and finished_before(out, plan, name) is None
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
