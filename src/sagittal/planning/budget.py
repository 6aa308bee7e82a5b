"""From a stated time to a schedule: how many steps fit once the step has been measured."""

from __future__ import annotations

from sagittal.errors import PlanError
from sagittal.plan.base import Frozen, Triple
from sagittal.plan.plan import Patch, Plan, as_triple
from sagittal.planning.patch import patch_rule
from sagittal.planning.recipe import rotation_degrees
from sagittal.planning.topology import patch_multiples
from sagittal.planning.validations import validations_within

SAFETY = 0.97
"""Share of the time that is planned for; the rest absorbs a machine that slows down. The clock takes care of more."""
ENOUGH_STEPS = 2000
"""Below this many steps a smaller batch is preferred to a larger one."""
FINAL_CASE_FACTOR = 1.5
FEWEST_STEPS = 300
"""Below this many steps a smaller patch is preferred to a larger one."""
SMALLEST_AXIS = 32
"""Voxels below which the budget shrinks no axis of the patch."""
VALIDATION_SHARE = 0.08
"""Share of the time that the validation at the end may take."""


class Timing(Frozen):
    """What was measured before the schedule was fitted."""

    left_s: float
    """Seconds left of the budget for training and validation."""
    step_s: float
    """Seconds per optimiser step at the plan's batch size."""
    case_s: float
    """Seconds to predict one whole case."""
    validation_cases: int
    """Cases held out; 0 when all are trained on."""


def fit_schedule(plan: Plan, timing: Timing, *, budget_s: float) -> Plan:
    """Return a plan whose schedule fills the time left, with the reason of every number that it changes.

    Raises:
        PlanError: not even ten steps fit.
    """
    rounds, cases = validations_within(
        timing.left_s,
        case_s=timing.case_s,
        held_out=timing.validation_cases,
        wanted_cases=plan.schedule.validation_cases,
    )
    rounds_s = rounds * min(timing.validation_cases, cases) * timing.case_s
    validation_s = rounds_s + final_validation_s(timing)
    steps = int((timing.left_s * SAFETY - validation_s) / timing.step_s)
    if steps < 10:
        raise PlanError(
            f"a budget of {budget_s:.0f} s leaves {timing.left_s:.0f} s for training, {max(steps, 0)} steps of "
            f"{timing.step_s:.2f} s; at least 10 are needed. Give more time, or a smaller patch.size or network.",
            code="budget_too_small",
        )
    schedule = plan.schedule.replace(
        steps=steps,
        validations=rounds + 1 if timing.validation_cases else 0,
        validation_cases=cases,
    )
    reason = (
        f"--budget {budget_s:.0f} s: {timing.left_s:.0f} s were left, a step takes {timing.step_s:.3f} s at best "
        f"(measured), validation {validation_s:.0f} s"
    )
    changed = [name for name in type(schedule).model_fields if getattr(schedule, name) != getattr(plan.schedule, name)]
    return plan.replace(schedule=schedule, reasons={**plan.reasons, **{f"schedule.{name}": reason for name in changed}})


def final_validation_s(timing: Timing) -> float:
    """Return the seconds kept for the validation at the end: for all held-out cases, or as many as its share holds.

    A case takes longer there than `case_s`: it is read, brought to its scan's grid, scored and drawn.
    """
    whole = FINAL_CASE_FACTOR * timing.validation_cases * timing.case_s
    return min(whole, max(timing.left_s * VALIDATION_SHARE, FINAL_CASE_FACTOR * timing.case_s))


def shrink_batch(plan: Plan, *, step_s: float, left_s: float, budget_s: float) -> Plan:
    """Return the plan with a smaller batch where the time holds too few steps; never below two.

    Few steps of a large batch learn less than many of a small one: the rate can't be raised with the batch. The
    batch is halved until `ENOUGH_STEPS` fit, taking a step's time as proportional to its batch.
    """
    batch = plan.training.batch_size
    while batch > 2 and left_s / step_s < ENOUGH_STEPS:
        step_s *= max(batch // 2, 2) / batch
        batch = max(batch // 2, 2)
    if batch == plan.training.batch_size:
        return plan
    reason = f"--budget {budget_s:.0f} s: fewer than {ENOUGH_STEPS} steps of batch {plan.training.batch_size} would fit"
    return plan.replace(
        training=plan.training.replace(batch_size=batch), reasons={**plan.reasons, "training.batch_size": reason}
    )


def shrink_patch(plan: Plan, *, step_s: float, left_s: float, budget_s: float) -> Plan:
    """Return the plan with a smaller patch where the time holds too few steps; no axis goes below `SMALLEST_AXIS`.

    The longest axis is halved (to a multiple that suits the network as it is) until `FEWEST_STEPS` fit, taking a
    step's time as proportional to its voxels. A few dozen steps of any patch teach next to nothing.
    """
    multiples = patch_multiples(plan.network)
    smallest = max(SMALLEST_AXIS, patch_rule(plan.network).minimum)
    size = list(plan.patch.size)
    while left_s / step_s < FEWEST_STEPS:
        axis = max(range(3), key=lambda axis: size[axis])
        half = max(size[axis] // 2 // multiples[axis], 1) * multiples[axis]
        if half < smallest:
            break
        step_s *= half / size[axis]
        size[axis] = half
    smaller = as_triple(size)
    if smaller == plan.patch.size:
        return plan
    before = " x ".join(map(str, plan.patch.size))
    reason = f"--budget {budget_s:.0f} s: fewer than {FEWEST_STEPS} steps of patch {before} would fit"
    shrunk = plan.replace(patch=Patch(size=smaller), reasons={**plan.reasons, "patch.size": reason})
    return _turned_to_fit(shrunk, plan.patch.size)


def _turned_to_fit(plan: Plan, planned: Triple) -> Plan:
    """Return the plan with the angle of rotation that its patch has by the rule, where it was the rule's for `planned`.

    A flat patch is turned by any angle, in its plane; one that is flat no more is turned about all axes, and must not.
    """
    name, sees_slices = "training.augmentation.rotation_degrees", plan.configuration == "2d"
    if plan.reasons.get(name) != rotation_degrees(planned, sees_slices=sees_slices)[1]:
        return plan
    degrees, why = rotation_degrees(plan.patch.size, sees_slices=sees_slices)
    augmentation = plan.training.augmentation.replace(rotation_degrees=degrees)
    return plan.replace(training=plan.training.replace(augmentation=augmentation), reasons={**plan.reasons, name: why})
