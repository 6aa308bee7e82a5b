"""The stages before training: check, plan, preprocess, fit to the budget. Each says what it did."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from sagittal.data.cache import Cache, build_cache
from sagittal.data.case_weights import WEIGHTS_NAME, CaseWeights, read_case_weights
from sagittal.data.dataset import Dataset, Digest
from sagittal.data.doctor import diagnose
from sagittal.data.doctor.findings import counted
from sagittal.data.known import known_fingerprint
from sagittal.errors import DataError, PlanError
from sagittal.kernels.choice import Mode
from sagittal.plan.base import canonical_json
from sagittal.plan.overrides import override
from sagittal.plan.plan import Plan
from sagittal.planning.budget import Timing, final_validation_s, fit_schedule, shrink_batch, shrink_patch
from sagittal.planning.explain import warnings_of
from sagittal.planning.short_runs import DEAREST_STEP, short_run
from sagittal.planning.wishes import SET_BY_USER
from sagittal.training.choice import PlanChoice, refuse_other_plan
from sagittal.training.distributed import ALONE, World
from sagittal.training.initialization import frozen_steps, with_frozen_steps, without_freezing
from sagittal.training.peers import enough_samples
from sagittal.training.postprocessing_choice import unchosen
from sagittal.training.precision import faster_precision
from sagittal.training.split import SplitSources
from sagittal.training.step import measure_step_s
from sagittal.training.validation import measure_case_s

if TYPE_CHECKING:
    from sagittal.training.cross_validation import Run
    from sagittal.training.side_by_side import Ending
    from sagittal.training.signals import StopFlag

    Carrier = Callable[[Run, list[str], StopFlag], Iterable[Ending]]
    """Takes what folds share, those to train and the word to stop, and yields how each ended."""


@dataclass(frozen=True)
class RunOptions:
    """What can't change a weight or a voxel, given the plan.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        cache: folder for preprocessed cases, which runs may share; by default `cache` in the run folder.
        workers: threads that read and preprocess.
        splits: file of own splits, where the plan or the user asks for them and they do not lie beside the data.
        known: folder that keeps what was measured of data sets, so that it is not measured twice; None keeps nothing.
        resume: go on from the last checkpoint.
        memory_gib: memory that a plan made here may use in a training step.
        checkpoint_every_s: seconds between two checkpoints.
        keep_checkpoints: how many of them are kept, the last ones.
        loader_workers: threads that make training batches; None for what the device needs.
        compile: whether the network is compiled; `auto` where that pays.
        known_kernels: file that keeps which GPU kernels are faster on this machine; None keeps nothing.
        kernels: whether Sagittal's kernels compute; `auto` where they run and are faster (docs/kernels.md).
        trackers: what else receives the log: `tensorboard`, `mlflow`.
        world: the processes that train together, of which this is one; `python -m torch.distributed.run` starts them.
        devices: where folds are trained side by side, one at a time on each; empty for one after the other on `device`.
        carrier: trains folds on other machines and yields how each ended (see `cluster`); None trains them here.
        at_once: how many folds it trains at a time, by which a budget is shared out.
        validate_all: whether all held-out cases are scored at a fold's end, also where that takes longer than a budget.
        passed_s: seconds of a budget that had passed before training was called, to import torch for example.
        live: whether a terminal shows how far training is in a table in place.
        say: receives lines for a person to read.
    """

    device: str = "auto"
    cache: Path | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    splits: Path | None = None
    known: Path | None = None
    resume: bool = False
    memory_gib: float = 8.0
    checkpoint_every_s: float = 60.0
    keep_checkpoints: int = 2
    loader_workers: int | None = None
    compile: Literal["auto", "on", "off"] = "auto"
    kernels: Mode = "auto"
    known_kernels: Path | None = None
    trackers: tuple[str, ...] = ()
    world: World = ALONE
    devices: tuple[str, ...] = ()
    carrier: Carrier | None = None
    at_once: int = 1
    validate_all: bool = False
    passed_s: float = 0.0
    live: bool = False
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Budget:
    """The time that the user stated, and when it ends on the clock of `time.monotonic`."""

    total_s: float
    ends: float

    def share_s(self, folds: int) -> float:
        """Return the seconds that are left for each of `folds`, training and validation."""
        return (self.ends - time.monotonic()) / folds


def check(dataset: Dataset, options: RunOptions) -> None:
    """Diagnose the data set and say what was found.

    Raises:
        DataError: at least one error; the first ones are in the message.
    """
    diagnosis = diagnose(dataset, workers=options.workers)
    errors = [finding for finding in diagnosis.findings if finding.level == "error"]
    warnings = [finding for finding in diagnosis.findings if finding.level == "warning"]
    if errors:
        shown = "\n".join(f"  {finding.message} {finding.fix}".rstrip() for finding in errors[:5])
        more = f"\n  and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise DataError(
            f"{dataset.folder}: {counted(len(errors), 'error')}, so nothing was done; 'sagittal doctor' lists all.\n"
            f"{shown}{more}",
            code=errors[0].code,
        )
    options.say(f"check: {len(dataset.cases)} cases, no errors, {counted(len(warnings), 'warning')}")
    for finding in warnings[:5]:
        options.say(f"  warning: {finding.message}")
    if len(warnings) > 5:
        options.say(f"  and {len(warnings) - 5} more warnings; 'sagittal doctor' lists them")


def find_plan(dataset: Dataset, stored: Path | None, choice: PlanChoice, options: RunOptions) -> tuple[Plan, bool]:
    """Return the plan to train by, and whether it is new (then a budget may still fit its schedule).

    A plan that the run folder holds beside checkpoints or a bundle is the run's plan.

    Raises:
        PlanError: the given plan is for another data set, or the choice contradicts the run's plan.
    """
    sources = SplitSources(dataset, options.splits, options.workers, options.say)
    if stored is not None and stored.exists():
        plan = unchosen(Plan.read(stored))
        refuse_other_plan(plan, stored, choice)
        options.say(f"plan: the run's own, {stored.name}")
        is_new = False
    elif (given := choice.given_plan()) is not None:
        plan = choice.applied_to(given, sources)
        options.say(f"plan: as given, {describe(plan)}")
        if plan.training.case_weights_sha256 is None and read_weights(dataset) is not None:
            options.say(f"  the plan says nothing of weights of cases, so {WEIGHTS_NAME} is not used")
        is_new = True
    else:
        began = time.monotonic()
        fingerprint, known = known_fingerprint(
            dataset, options.known, workers=options.workers, orientation=choice.orientation()
        )
        plan = choice.applied_to(choice.make(fingerprint, dataset.spec, memory_gib=options.memory_gib), sources)
        plan = _with_weights(plan, dataset, choice, options)
        measured = "from the fingerprint of before, for no file changed" if known else "every case measured"
        options.say(f"plan: made in {time.monotonic() - began:.0f} s, {measured}; {describe(plan)}")
        for warning in warnings_of(plan):
            options.say(f"  {warning}")
        is_new = True
    if plan.dataset.replace(name=dataset.spec.name) != dataset.spec:
        raise PlanError(
            f"the plan is for channels {list(plan.dataset.channel_names)} and labels "
            f"{[label.name for label in plan.dataset.labels]}; {dataset.folder} declares "
            f"{list(dataset.spec.channel_names)} and {[label.name for label in dataset.spec.labels]}. "
            "Make a plan for this data set with 'sagittal plan'.",
            code="plan_mismatch",
        )
    return plan, is_new


def read_weights(dataset: Dataset) -> CaseWeights | None:
    """Return the weights of cases that lie beside a data set, None where there are none.

    Raises:
        DataError: the file makes no sense for these cases.
    """
    return read_case_weights(dataset.folder, [case.id for case in dataset.cases])


def _with_weights(plan: Plan, dataset: Dataset, choice: PlanChoice, options: RunOptions) -> Plan:
    """Write into a plan made here that it takes up the weights of cases, where there are some."""
    name, weights = "training.case_weights_sha256", read_weights(dataset)
    if weights is None or name in choice.settings:
        return plan
    reason = f"{WEIGHTS_NAME} in the data set's folder: some cases are drawn more often"
    options.say(f"weights: {reason}")
    training = plan.training.replace(case_weights_sha256=weights.sha256)
    return plan.replace(training=training, reasons={**plan.reasons, name: reason})


def describe(plan: Plan) -> str:
    """Return the numbers of a plan that people ask for first, in one line."""
    patch = "x".join(map(str, plan.patch.size))
    spacing = "x".join(f"{value:.3g}" for value in plan.preprocessing.spacing_mm)
    named = plan.network_name if plan.configuration == "3d" else f"{plan.network_name} {plan.configuration}"
    return f"{named}, patch {patch}, batch {plan.training.batch_size}, spacing {spacing} mm (D, H, W)"


def plan_sha256(plan: Plan) -> str:
    """Return the hash of everything in the plan that can change a weight: its reasons and what it tells can't."""
    return hashlib.sha256(canonical_json(plan.replace(reasons={}, label_volumes=())).encode()).hexdigest()


def preprocess(
    dataset: Dataset,
    digests: Mapping[Path, Digest],
    plan: Plan,
    folder: Path,
    device: torch.device,
    options: RunOptions,
) -> Cache:
    """Fill the cache where it isn't complete, and return it; `digests` are of the data set's files."""
    began, done = time.monotonic(), 0

    def on_case(case: str) -> None:
        nonlocal done
        done += 1

    where = device if device.type == "cuda" else "cpu"
    cache = build_cache(dataset, plan, folder, workers=options.workers, on_case=on_case, digests=digests, device=where)
    took = f"{done} cases in {time.monotonic() - began:.0f} s" if done else "nothing to do, all cases are cached"
    options.say(f"preprocess: {took}")
    return cache


def fit_budget(
    plan: Plan,
    cache: Cache,
    job: tuple[tuple[int, ...], tuple[int, ...]],
    device: torch.device,
    choice: PlanChoice,
    budget: Budget,
    *,
    folds: int,
    options: RunOptions,
) -> tuple[Plan, float]:
    """Measure a step and a whole-case prediction, and return the plan whose schedule fits the time left.

    Args:
        plan: the plan as it is without a budget.
        cache: preprocessed cases.
        job: cases to train on and cases held out, of one fold.
        device: where training will run.
        choice: what the user asked for. Fields that the user set, and all of a plan that was given, keep their values.
            Else batch and patch may become smaller, so that enough steps fit; a CPU may compute in bf16; and a short
            schedule gets an optimiser that learns faster.
        budget: the time that the user stated.
        folds: number of folds that share it.
        options: who takes part in the measurement, and who is told the outcome.

    Returns:
        The plan, and the seconds to keep for the validation at the end.
    """
    train_cases, held_out = job
    world = options.world
    compiled = options.compile if world.size == 1 else "off"

    def measure(plan: Plan) -> float:
        limit_s = 0.02 * budget.total_s
        return measure_step_s(plan, cache, train_cases, device, limit_s=limit_s, compile=compiled, world=world)

    def left_s() -> float:
        return world.broadcast_object(budget.share_s(folds))

    frozen, plan = frozen_steps(plan), without_freezing(plan)
    if choice.plan is None:
        fitted, step_s = _made_quick(plan, device, choice, budget, world, measure=measure, left_s=left_s)
    else:
        fitted, step_s = plan, measure(plan)
    case_s = measure_case_s(fitted, cache, held_out[0], device) if held_out else 0.0
    # Processes predict their cases side by side.
    case_s = world.broadcast_object(case_s) * math.ceil(len(held_out) / world.size) / max(len(held_out), 1)
    timing = Timing(left_s=left_s(), step_s=step_s, case_s=case_s, validation_cases=len(held_out))
    asked = {name: value for name, value in choice.settings.items() if name.startswith("schedule.")}
    fitted = override(fit_schedule(fitted, timing, budget_s=budget.total_s), asked, origin=SET_BY_USER)
    fitted = with_frozen_steps(fitted, frozen, budget_s=budget.total_s)
    _say_fitted(fitted, frozen, options.say)
    return fitted, final_validation_s(timing)


def _made_quick(
    plan: Plan,
    device: torch.device,
    choice: PlanChoice,
    budget: Budget,
    world: World,
    *,
    measure: Callable[[Plan], float],
    left_s: Callable[[], float],
) -> tuple[Plan, float]:
    """Return a plan made here with what lets it learn more in the time, and the seconds of its step.

    Args:
        plan, device, choice, budget: as for `fit_budget`.
        world: the processes; each of them measures.
        measure: returns the seconds of a plan's step.
        left_s: returns the seconds left.
    """
    plan = faster_precision(plan, device, decided=choice.decided)
    fitted, step_s = plan, measure(plan)
    quick = short_run(plan, steps=left_s() / step_s, decided=choice.decided, budget_s=budget.total_s)
    if quick != plan and (quick_s := measure(quick)) <= DEAREST_STEP * step_s:
        fitted, step_s = quick, quick_s
    if not {"patch.size", "training.batch_size"} & choice.decided:
        for rule in (shrink_batch, shrink_patch):
            shrunk = rule(fitted, step_s=step_s, left_s=left_s(), budget_s=budget.total_s)
            if shrunk != fitted and enough_samples(shrunk, world):
                fitted, step_s = shrunk, measure(shrunk)
    return fitted, step_s


def _say_fitted(plan: Plan, frozen: int, say: Callable[[str], None]) -> None:
    """Say what schedule a budget gives, and where the encoder is not frozen for the steps that were asked for."""
    say(f"budget: {plan.reasons['schedule.steps']}; {plan.schedule.steps} steps of batch {plan.training.batch_size}")
    steps = frozen_steps(plan)
    if steps != frozen:
        say(f"budget: the encoder is frozen for {steps} steps, not {frozen}: a quarter of all at most")
