"""The learning rate as a pure function of the step, and what the clock may do to it."""

from __future__ import annotations

import math

from sagittal.plan.base import Frozen
from sagittal.plan.schedule import Schedule

TOLERANCE = 0.01
"""Share of the steps left by which the clock may be wrong before it speaks."""
LAST_STEPS = 10
"""So near the end every step counts."""


class Shortening(Frozen):
    """The clock's verdict: from step `start` on, the schedule is run through faster and ends at step `end`."""

    start: int
    end: int
    start_position: float
    """Where in the schedule, in its own steps, `start` stands."""
    reason: str


def rate_factor(schedule: Schedule, step: int, shortening: Shortening | None = None) -> float:
    """Return the learning rate of `step` (0-based) as a share of its peak.

    Linear warm-up, then (1 - t)^power, t from 0 after the warm-up to 1 at the last step. The first step has
    `warmup_start_factor` itself; where that is 0, a step that would teach nothing, the warm-up begins a step above it.
    """
    reached = position(schedule, step, shortening)
    if reached < schedule.warmup_steps:
        start = schedule.warmup_start_factor
        if start == 0:
            return (reached + 1) / (schedule.warmup_steps + 1)
        return start + (1 - start) * reached / schedule.warmup_steps
    progress = (reached - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return max(float((1 - min(progress, 1.0)) ** schedule.power), schedule.final_factor)


def position(schedule: Schedule, step: int, shortening: Shortening | None) -> float:
    """Return where in the schedule, in its own steps, a step stands: ahead of its number once the clock has spoken."""
    if shortening is None or step < shortening.start:
        return float(step)
    if step >= shortening.end:
        return float(schedule.steps)
    share = (step - shortening.start) / (shortening.end - shortening.start)
    return shortening.start_position + share * (schedule.steps - shortening.start_position)


def validation_steps(schedule: Schedule) -> frozenset[int]:
    """Return the numbers of finished steps after which whole cases are validated.

    The last step is not among them: the end has a validation of its own, on all cases.
    """
    count = schedule.validations
    return frozenset(round(schedule.steps * part / count) for part in range(1, count)) - {0, schedule.steps}


def shorten(
    schedule: Schedule, step: int, current: Shortening | None, *, left_s: float, step_s: float
) -> Shortening | None:
    """Return how the rest of the schedule fits into the time left: as planned, or run through faster.

    A machine that was busy and is free again gets steps back, but never more than the plan has. Small changes are left
    alone, so that the log stays readable.

    Args:
        schedule: the plan's.
        step: finished steps.
        current: the shortening in force.
        left_s: seconds until training must end.
        step_s: seconds that a step takes at present.
    """
    reached = position(schedule, step, current)
    planned = math.ceil(schedule.steps - reached)
    now = planned if current is None else current.end - step
    fitting = min(max(int(left_s / step_s), 0), planned)
    if now * (1 - TOLERANCE) <= fitting <= now * (1 + 5 * TOLERANCE) and not fitting < now <= LAST_STEPS:
        return current
    return Shortening(
        start=step,
        end=step + fitting,
        start_position=reached,
        reason=f"at step {step}, {left_s:.0f} s left, {step_s:.2f} s a step: {fitting} of {planned} steps fit",
    )
