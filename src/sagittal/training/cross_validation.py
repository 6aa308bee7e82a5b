"""The folds of a run: one after the other, or side by side; one that fails does not take the others with it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.cache import Cache
from sagittal.data.case_weights import CaseWeights
from sagittal.data.dataset import Dataset
from sagittal.data.splits import Fold
from sagittal.errors import SagittalError, TrainingError
from sagittal.plan.plan import Plan
from sagittal.training.checkpoint import told_what_is_intact
from sagittal.training.determinism import deterministic_operations
from sagittal.training.finish import finish_fold
from sagittal.training.fold import Ended, FoldJob, train_fold
from sagittal.training.joining import (
    finished_before,
    join_bundle,
    note_failures,
    patients_by_case,
    weights_name,
)
from sagittal.training.joint_report import write_joint_report
from sagittal.training.manifest import facts_of
from sagittal.training.memory import told_of_memory
from sagittal.training.peers import NO_PEERS, Peers, agree
from sagittal.training.postprocessing_bundle import choose_for_bundle, is_due
from sagittal.training.run_folder import alone_with_bundle
from sagittal.training.schedules import validation_steps
from sagittal.training.side_by_side import FOLD_BUNDLE, OUTPUT_LOG, Ending, Place, places_on, train_side_by_side
from sagittal.training.signals import StopFlag, StopReason, graceful_stop
from sagittal.training.stages import Budget, RunOptions, plan_sha256
from sagittal.training.trackers import prepare_trackers

VALIDATION_RESERVE = 0.1
"""Share of the time kept for the validation at the end where a resumed run has not measured it."""
_STOPPED: tuple[StopReason, ...] = ("interrupted", "terminated")


@dataclass(frozen=True)
class Run:
    """What the folds of a run share.

    Attributes:
        content_sha256: hash over the data set's files.
        folds: empty where all cases are trained on.
        out: the bundle.
        folder: what lies beside it.
        devices: one for each fold that is trained at a time.
        validation_s: what the budget keeps for the validation of each fold.
        source: the weights to start from.
        case_weights: how often each case is drawn.
    """

    plan: Plan
    data: Dataset
    content_sha256: str
    cache: Cache
    folds: tuple[Fold, ...]
    out: Path
    folder: Path
    devices: tuple[torch.device, ...]
    options: RunOptions
    budget: Budget | None
    validation_s: float | None
    source: Bundle | None
    case_weights: CaseWeights | None

    @property
    def device(self) -> torch.device:
        """The device of what is done once for all folds."""
        return self.devices[0]

    @property
    def patients(self) -> dict[str, str]:
        """Patient by hash of the case."""
        return patients_by_case(self.data, self.plan)

    def cases(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the indices of the cases that a fold learns from and of those that it holds out."""
        return cases_of(self.cache, self.folds, name)


@dataclass(frozen=True)
class FoldTask:
    """What the process of one fold is told: `ends` is the budget's end on the clock of `time.monotonic`."""

    run: Run
    name: str
    threads: int
    ends: float | None


def cases_of(cache: Cache, folds: tuple[Fold, ...], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of the cases to learn from and of those held out, for a fold or for `none`."""
    if name == "none":
        return tuple(range(len(cache.case_ids))), ()
    position = {case: number for number, case in enumerate(cache.case_ids)}
    chosen = folds[int(name)]
    return tuple(position[case] for case in chosen.train), tuple(position[case] for case in chosen.validation)


def train_folds(run: Run, names: tuple[str, ...], peers: Peers) -> tuple[Mapping[str, Any], Ended]:
    """Train those of the folds that are not finished; return the bundle's metrics and how it ended.

    A fold that fails is told at the end; the others are trained and joined before. Ctrl-C and SIGTERM stop all, and a
    run that was stopped ends as such, so that it is begun again, also where a fold had failed before.

    Raises:
        TrainingError: one of several folds failed; its notes (`__notes__`) tell what each said. What a single fold
            raises is raised as it is.
    """
    failures: dict[str, Exception] = {}
    with graceful_stop() as stop, deterministic_operations(run.device, wanted=run.plan.training.deterministic):
        left = [name for name in names if not _is_finished(run, name, peers)]
        if left and run.options.carrier is not None:
            ended = joined(run, left, stop, failures, run.options.carrier(run, left, stop))
        elif len(run.devices) > 1 and len(left) > 1:
            ended = _side_by_side(run, left, stop, failures)
        else:
            ended = _in_turn(run, left, stop, failures, peers, alone=len(names) == 1)
        close = partial(_close, run, names, failures, stop, stopped=ended in _STOPPED)
        metrics: Mapping[str, Any] = peers.on_main(close)
        agree(stop, False, peers.world)
        if stop.reason is not None and is_due(run.plan, metrics):
            ended = stop.reason
    if failures and ended not in _STOPPED:
        raise _all_of(failures, names, sorted(metrics.get("folds", {}))) from next(iter(failures.values()))
    return metrics, ended


def _all_of(failures: Mapping[str, Exception], names: tuple[str, ...], there: list[str]) -> TrainingError:
    """Return the error that ends a run of which folds failed.

    What each of them said was said when it failed: it is in the error's notes, which a traceback shows, and not in the
    message again.
    """
    kinds = ", ".join(f"fold {name} ({kind})" for name, kind in _kinds(failures).items())
    bundle = f"The bundle has the folds {', '.join(there)}" if there else "No fold was finished"
    error = TrainingError(
        f"{len(failures)} of {len(names)} folds failed: {kinds}; why is said above. {bundle}. Go on with --resume, "
        "which trains the others again, once the cause is removed.",
        code="folds_failed",
    )
    for name, failure in failures.items():
        error.add_note(f"fold {name}: {_message(failure)}")
    return error


def run_task(task: FoldTask, stop: StopFlag, say: Callable[[str], None]) -> Ended:
    """Do what the process of one fold is there for, and return how it ended; see `train_one`."""
    run = dataclasses.replace(task.run, options=dataclasses.replace(task.run.options, say=say))
    share_s = None if task.ends is None else task.ends - time.monotonic()
    with deterministic_operations(run.device, wanted=run.plan.training.deterministic):
        return train_one(run, task.name, share_s, stop, peers=NO_PEERS, failed={})


def train_one(
    run: Run, name: str, share_s: float | None, stop: StopFlag, *, peers: Peers, failed: Mapping[str, str]
) -> Ended:
    """Train, validate and write one fold into the bundle; return how it ended.

    Args:
        run: what it shares with others.
        name: which fold.
        share_s: seconds of the budget for training and validation, or None.
        stop: a raised flag ends it after the step or the case in progress.
        peers: the processes that train it together.
        failed: folds that failed before, and by what kind of error, for the bundle.
    """
    began = time.monotonic()
    say, (train_cases, held_out) = run.options.say, run.cases(name)
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
        peers=peers,
        keep_checkpoints=run.options.keep_checkpoints,
        loader_workers=run.options.loader_workers,
        compile=run.options.compile,
        trackers=run.options.trackers,
        live=run.options.live,
        case_weights=run.case_weights,
    )
    told = f"{len(held_out)} held out" if held_out else "none held out"
    say(f"train: fold {name}, {run.plan.network_name} on {run.device}, {len(train_cases)} cases, {told}")
    for line in _without_effect(run.plan, held_out):
        say(line)
    with told_of_memory(run.plan, run.device, f"fold {name}"), told_what_is_intact(job.folder):
        outcome = train_fold(job, stop, say)
    timed = share_s is not None and not run.options.validate_all
    validation_s = share_s - (time.monotonic() - began) if timed and share_s is not None else None
    patients = run.patients
    entry = finish_fold(job, outcome, run.data, patients=patients, stop=stop, validation_s=validation_s, say=say)

    def join() -> None:
        made = facts_of(run.plan, job.plan_sha256, run.content_sha256, [job.device], processes=peers.world.size)
        entry_made, weights = {**entry, "made_with": made}, outcome.weights()
        with alone_with_bundle(run.folder):
            metrics = join_bundle(run.out, run.plan, name, entry_made, weights, patients=patients, failed=failed)
        if name not in metrics["folds"]:
            say(f"fold {name}: not finished, so it is left out of {run.out}")

    peers.on_main(join)
    return stop.reason if stop.reason is not None and entry["validation_stopped"] else outcome.ended


def _without_effect(plan: Plan, held_out: tuple[int, ...]) -> list[str]:
    """Return a line for each wish of the plan that needs validations which there are none of."""
    schedule, patience = plan.schedule, plan.schedule.early_stop_validations
    lines = []
    if schedule.keep == "best" and not held_out:
        lines.append("  schedule.keep=best has no effect: no case is held out to tell which weights are best")
    if patience and not (held_out and validation_steps(schedule)):
        why = f"schedule.validations is {schedule.validations}" if held_out else "no case is held out"
        lines.append(f"  schedule.early_stop_validations={patience} has no effect: {why}")
    return lines


def _is_finished(run: Run, name: str, peers: Peers) -> bool:
    finished = peers.on_main(lambda: finished_before(run.out, run.plan, name) is not None)
    if finished:
        run.options.say(f"train: fold {name} is finished already")
    return finished


def _in_turn(
    run: Run, names: list[str], stop: StopFlag, failures: dict[str, Exception], peers: Peers, *, alone: bool
) -> Ended:
    """Train folds one after the other; return how it ended."""
    ended: Ended = "finished"
    for position, name in enumerate(names):
        agree(stop, False, peers.world)
        if stop.reason is not None:
            return stop.reason
        share_s = None if run.budget is None else run.budget.share_s(len(names) - position)
        try:
            outcome = train_one(run, name, share_s, stop, peers=peers, failed=_kinds(failures))
        except Exception as error:
            # Processes that train together end together: the others wait for the one that failed.
            if alone or peers.world.size > 1:
                raise
            failures[name] = _kept(run, name, error)
            continue
        ended = outcome if outcome != "finished" else ended
        if outcome in _STOPPED:
            break
    return ended


def _side_by_side(run: Run, names: list[str], stop: StopFlag, failures: dict[str, Exception]) -> Ended:
    """Train folds in processes of their own, one at a time on each device; return how it ended."""
    places = places_on(run.devices)
    options = dataclasses.replace(run.options, devices=(), live=False, say=_nobody)

    def task_of(name: str, place: Place, left: int) -> FoldTask:
        share_s = None if run.budget is None else run.budget.share_s(math.ceil(left / len(places)))
        own = dataclasses.replace(run, out=own_bundle(run, name), devices=(place.device,), options=options)
        return FoldTask(own, name, place.threads, None if share_s is None else time.monotonic() + share_s)

    prepare_trackers(run.options.trackers, run.folder)
    told = ", ".join(f"{place.device}" for place in places)
    run.options.say(f"train: folds {', '.join(names)} side by side on {told}, {places[0].threads} threads each")
    endings = train_side_by_side(names, places, task_of, run.folder, stop, run.options.say)
    return joined(run, names, stop, failures, endings)


def joined(
    run: Run, names: list[str], stop: StopFlag, failures: dict[str, Exception], endings: Iterable[Ending]
) -> Ended:
    """Take each fold that was trained elsewhere into the bundle as soon as it has ended; return how the run ended.

    Args:
        run: what the folds share.
        names: those that are trained; each left its bundle at `own_bundle`, unless it failed.
        stop: raised where one of them was told to stop, so that the others are too.
        failures: receives the errors by fold.
        endings: how each ended, in any order; those that a stop kept from beginning have none.
    """
    patients, done = run.patients, set[str]()
    ended: Ended = "finished"
    for ending in endings:
        name = ending.name
        if ending.report is None and stop and -ending.code in (signal.SIGINT, signal.SIGTERM):
            continue  # stopped together with this process, and before it could listen
        if ending.report is None or "error" in ending.report:
            failures[name] = _error_of(ending)
            run.options.say(f"fold {name}: failed, {_message(failures[name])}")
            continue
        outcome: Ended = ending.report["ended"]
        bundle = read_bundle(own_bundle(run, name))
        entry, weights = bundle.metrics["folds"][name], bundle.weights(weights_name(name))
        with alone_with_bundle(run.folder):
            join_bundle(run.out, run.plan, name, entry, weights, patients=patients, failed=_kinds(failures))
        shutil.rmtree(bundle.path, ignore_errors=True)
        if outcome in _STOPPED:
            # A job scheduler may tell one process alone; then the others are to end as well.
            stop.reason = stop.reason or outcome
        else:
            done.add(name)
            ended = outcome if outcome != "finished" else ended
    if stop.reason is not None and done | set(failures) != set(names):
        return stop.reason
    return ended


def _close(
    run: Run, names: tuple[str, ...], failures: Mapping[str, Exception], stop: StopFlag, *, stopped: bool
) -> Mapping[str, Any]:
    """Tell of all folds together, in the bundle, in a table and in a report; return the bundle's metrics."""
    with alone_with_bundle(run.folder):
        metrics = note_failures(run.out, run.plan, _kinds(failures), patients=run.patients)
    if len(names) > 1:
        for line in _table(names, metrics, failures):
            run.options.say(line)
    if not stopped:
        ends = None if run.budget is None else run.budget.ends
        with alone_with_bundle(run.folder):
            metrics = choose_for_bundle(run.out, run.folder, run.plan, run.data, stop, ends=ends, say=run.options.say)
    if not stopped and len(metrics.get("folds", {})) > 1 and not is_due(run.plan, metrics):
        write_joint_report(run.folder, run.plan, run.data, metrics, run.options.say)
    return metrics


def _table(names: tuple[str, ...], metrics: Mapping[str, Any], failures: Mapping[str, Exception]) -> list[str]:
    rows, kinds = [("fold", "ended", "steps", "Dice")], _kinds(failures)
    for name in names:
        entry = metrics.get("folds", {}).get(name)
        if name in failures:
            rows.append((name, "failed", "", kinds[name]))
        elif entry is None:
            rows.append((name, "not finished", "", ""))
        else:
            dice = entry.get("scores", {}).get("mean", {}).get("dice", {}).get("mean")
            rows.append((name, entry["ended"], str(entry["steps"]), "not measured" if dice is None else f"{dice:.4f}"))
    together = metrics.get("out_of_fold", {}).get("mean", {}).get("dice", {})
    if together.get("mean") is not None:
        bounds = together["ci95"]
        told = "" if bounds is None else f" (95 % interval {bounds[0]:.4f} to {bounds[1]:.4f})"
        rows.append(("all", f"{together['n']} cases", "", f"{together['mean']:.4f}{told}"))
    return [f"{fold:<5} {ended:<12} {steps:>8}  {last}".rstrip() for fold, ended, steps, last in rows]


def _deadline(share_s: float | None, held_out: tuple[int, ...], validation_s: float | None) -> float | None:
    """Return when training must end, so that the validation still fits."""
    if share_s is None:
        return None
    kept_s = VALIDATION_RESERVE * share_s if validation_s is None else validation_s
    return time.monotonic() + share_s - (kept_s if held_out else 0.0)


def _kept(run: Run, name: str, error: Exception) -> Exception:
    """Tell of an error that ends one fold of several, and return it without what it holds on to, such as a network."""
    if not isinstance(error, SagittalError):
        folder = run.folder / f"fold_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), (folder / OUTPUT_LOG).open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
    run.options.say(f"fold {name}: failed, {_message(error)}")
    error.__context__ = None
    return error.with_traceback(None)


def _error_of(ending: Ending) -> Exception:
    if ending.report is not None:
        error = ending.report["error"]
        return TrainingError(error["message"], code=error["code"])
    how = f"exit code {ending.code}"
    if ending.code < 0:
        how = signal.Signals(-ending.code).name
        if how == "SIGKILL":
            how += ", which is how a system without memory left ends a process"
    return TrainingError(
        f"its process ended by {how}; what it said is in fold_{ending.name}/{OUTPUT_LOG}", code="process_lost"
    )


def _kinds(failures: Mapping[str, Exception]) -> dict[str, str]:
    """Return the kind of each error, which names no case and no path, as a message may."""
    return {
        name: error.code if isinstance(error, SagittalError) else type(error).__name__
        for name, error in failures.items()
    }


def _message(error: Exception) -> str:
    return error.message if isinstance(error, SagittalError) else f"{type(error).__name__}: {error}"


def own_bundle(run: Run, name: str) -> Path:
    """Return where the bundle of a fold lies that was trained elsewhere, until it is joined with the others."""
    return run.folder / f"fold_{name}" / FOLD_BUNDLE


def _nobody(line: str) -> None:
    """Drop a line; a process has its own to tell."""
