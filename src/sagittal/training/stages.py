"""The stages before training: check, plan, preprocess, fit to the budget. Each says what it did."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sagittal.data.cache import Cache, build_cache
from sagittal.data.dataset import Dataset, Digest
from sagittal.data.doctor import diagnose
from sagittal.data.fingerprint import Orientation
from sagittal.data.known import known_fingerprint
from sagittal.errors import DataError, PlanError
from sagittal.plan.base import TripleMm, canonical_json
from sagittal.plan.overrides import override
from sagittal.plan.plan import Plan
from sagittal.planning import make_plan
from sagittal.planning.budget import Timing, final_validation_s, fit_schedule, shrink_batch, shrink_patch
from sagittal.training.initialization import (
    StartFrom,
    frozen_steps,
    refuse_other_start,
    with_frozen_steps,
    with_initialization,
    without_freezing,
)
from sagittal.training.split import SplitSources, as_settled, settle_split
from sagittal.training.step import measure_step_s
from sagittal.training.validation import measure_case_s

SET_BY_USER = "set by the user with --set"
_START = "training.initialization."


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
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class PlanChoice:
    """What the user asked for: a plan, or a network to plan for, overrides of either by dotted name, and a start."""

    network: str | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: StartFrom | None = None

    @property
    def early_settings(self) -> Mapping[str, Any]:
        """The overrides but those of the start, which a plan may not have yet."""
        return {name: value for name, value in self.settings.items() if not name.startswith(_START)}

    @property
    def network_name(self) -> str:
        """The network to plan for where no plan is given: by default that of the weights to start from."""
        return self.network or ("mednext-s" if self.start is None else self.start.bundle.plan.network_name)

    def grid(self) -> tuple[Orientation, TripleMm | None]:
        """Return the overrides that the rest of a plan follows from: axis order and target spacing.

        Raises:
            PlanError: the axis order is no known one, or the spacing is not three lengths.
        """
        orientation = self.settings.get("preprocessing.orientation", "RAS")
        if orientation not in ("RAS", "stored"):
            raise PlanError(f"--set preprocessing.orientation={orientation}: expected RAS or stored.")
        given = self.settings.get("preprocessing.spacing_mm")
        if given is None:
            return orientation, None
        try:
            d, h, w = (float(length) for length in given)
        except (TypeError, ValueError):
            raise PlanError(
                f"--set preprocessing.spacing_mm={given}: expected mm along D, H, W, for example 1.0,0.8,0.8."
            ) from None
        if min(d, h, w) <= 0:
            raise PlanError(f"--set preprocessing.spacing_mm={given}: expected lengths above 0.")
        return orientation, (d, h, w)

    def applied_to(self, plan: Plan, sources: SplitSources) -> Plan:
        """Return the plan with the overrides, the split and the start written into it, with their reasons.

        Raises:
            PlanError: an override or a start that makes no sense for this plan.
            DataError: the files that tell the split do not fit the cases.
        """
        plan = override(plan, self.early_settings, origin=SET_BY_USER)
        plan = settle_split(plan, sources, self.settings, is_made=self.plan is None)
        if self.start is not None:
            plan = with_initialization(plan, self.start)
        late = {name: value for name, value in self.settings.items() if name not in self.early_settings}
        return override(plan, late, origin=SET_BY_USER)


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
            f"{dataset.folder}: {len(errors)} errors, so nothing was trained; 'sagittal doctor' lists them.\n"
            f"{shown}{more}",
            code=errors[0].code,
        )
    options.say(f"check: {len(dataset.cases)} cases, no errors, {len(warnings)} warnings")
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
        plan = Plan.read(stored)
        _refuse_other_plan(plan, stored, choice)
        options.say(f"plan: the run's own, {stored.name}")
        is_new = False
    elif choice.plan is not None:
        plan = choice.applied_to(choice.plan if isinstance(choice.plan, Plan) else Plan.read(choice.plan), sources)
        options.say(f"plan: as given, {describe(plan)}")
        is_new = True
    else:
        began = time.monotonic()
        orientation, spacing_mm = choice.grid()
        fingerprint, known = known_fingerprint(dataset, options.known, workers=options.workers, orientation=orientation)
        plan = make_plan(
            fingerprint, dataset.spec, choice.network_name, memory_gib=options.memory_gib, spacing_mm=spacing_mm
        )
        plan = choice.applied_to(plan, sources)
        measured = "from the fingerprint of before, for no file changed" if known else "every case measured"
        options.say(f"plan: made in {time.monotonic() - began:.0f} s, {measured}; {describe(plan)}")
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


def describe(plan: Plan) -> str:
    """Return the numbers of a plan that people ask for first, in one line."""
    patch = "x".join(map(str, plan.patch.size))
    spacing = "x".join(f"{value:.3g}" for value in plan.preprocessing.spacing_mm)
    return f"{plan.network_name}, patch {patch}, batch {plan.training.batch_size}, spacing {spacing} mm (D, H, W)"


def plan_sha256(plan: Plan) -> str:
    """Return the hash of everything in the plan but its reasons."""
    return hashlib.sha256(canonical_json(plan.replace(reasons={})).encode()).hexdigest()


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
    say: Callable[[str], None],
) -> tuple[Plan, float]:
    """Measure a step and a whole-case prediction, and return the plan whose schedule fits the time left.

    Args:
        plan: the plan as it is without a budget.
        cache: preprocessed cases.
        job: cases to train on and cases held out, of one fold.
        device: where training will run.
        choice: what the user asked for. Fields that the user set keep their values; batch and patch may become smaller,
            so that enough steps fit, where the user set neither them nor a plan.
        budget: the time that the user stated.
        folds: number of folds that share it.
        say: receives the outcome.

    Returns:
        The plan, and the seconds to keep for the validation at the end.
    """
    train_cases, held_out = job

    def measure(plan: Plan) -> float:
        return measure_step_s(plan, cache, train_cases, device, limit_s=0.02 * budget.total_s)

    frozen = frozen_steps(plan)
    plan = without_freezing(plan)
    fitted, step_s = plan, measure(plan)
    if choice.plan is None and not {"patch.size", "training.batch_size"} & set(choice.settings):
        for rule in (shrink_batch, shrink_patch):
            shrunk = rule(fitted, step_s=step_s, left_s=budget.share_s(folds), budget_s=budget.total_s)
            if shrunk != fitted:
                fitted, step_s = shrunk, measure(shrunk)
    case_s = measure_case_s(fitted, cache, held_out[0], device) if held_out else 0.0
    timing = Timing(left_s=budget.share_s(folds), step_s=step_s, case_s=case_s, validation_cases=len(held_out))
    fitted = override(fit_schedule(fitted, timing, budget_s=budget.total_s), choice.early_settings, origin=SET_BY_USER)
    fitted = with_frozen_steps(fitted, frozen, budget_s=budget.total_s)
    batch = fitted.training.batch_size
    say(f"budget: {fitted.reasons['schedule.steps']}; {fitted.schedule.steps} steps of batch {batch}")
    if frozen_steps(fitted) != frozen:
        say(f"budget: the encoder is frozen for {frozen_steps(fitted)} steps, not {frozen}: a quarter of all at most")
    return fitted, final_validation_s(timing)


def _refuse_other_plan(plan: Plan, stored: Path, choice: PlanChoice) -> None:
    advice = f"Leave these options out to go on with it, or choose another --out, or remove {stored.parent}."
    if choice.start is not None:
        refuse_other_start(plan, choice.start, stored)
    if choice.plan is not None:
        given = choice.plan if isinstance(choice.plan, Plan) else Plan.read(choice.plan)
        other_start = given.training.initialization not in (None, plan.training.initialization)
        given = override(_without_start(given), choice.early_settings, origin=SET_BY_USER)
        # What a budget fitted may differ, and the start is compared above; everything else must be the same.
        fitted = {
            name: getattr(plan.schedule, name)
            for name in type(plan.schedule).model_fields
            if plan.reasons.get(f"schedule.{name}", "").startswith("--budget")
        }
        training = as_settled(given.training, plan.training, choice.settings)
        given = given.replace(schedule=given.schedule.replace(**fitted), training=training, reasons={})
        if other_start or given != _without_start(plan).replace(reasons={}):
            raise PlanError(
                f"the plan given differs from {stored}, by which this run began. {advice}", code="plan_mismatch"
            )
    if choice.network is not None and choice.network.lower() != plan.network_name:
        raise PlanError(f"{choice.network}: {stored} is for {plan.network_name}. {advice}", code="plan_mismatch")
    if choice.settings and override(plan, choice.settings, origin="").replace(reasons={}) != plan.replace(reasons={}):
        raise PlanError(
            f"--set {', '.join(choice.settings)}: {stored} has other values. {advice}", code="plan_mismatch"
        )


def _without_start(plan: Plan) -> Plan:
    return plan.replace(training=plan.training.replace(initialization=None))
