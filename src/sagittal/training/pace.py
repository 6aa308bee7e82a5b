"""Which held-out cases a validation is made on: as many as the allowance has time for, the same in all processes."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np

from sagittal.data.cache import Cache
from sagittal.inference.windows import tile
from sagittal.plan.plan import Plan
from sagittal.training.allowance import LIMIT, Allowance
from sagittal.training.distributed import World
from sagittal.training.monitor import Monitor
from sagittal.training.schedules import validation_steps


class Pace:
    """Chooses the cases of each validation of a fold.

    Args:
        allowance: decides how many; None in all processes but the main one.
        held_out: indices of cases in the cache.
        world: the processes that train together.
    """

    def __init__(self, allowance: Allowance | None, held_out: tuple[int, ...], world: World) -> None:
        self._allowance, self._held_out, self._world = allowance, held_out, world

    def due(self, step: int, end: int, elapsed_s: float, monitor: Monitor | None) -> tuple[int, ...]:
        """Return the cases of the validation at `step`, none where it is left out; the last step will be `end`."""
        count = 0
        if monitor is not None and self._allowance is not None:
            allowance, step_s = self._allowance, monitor.step_s()
            count = allowance.cases(step, elapsed_s=elapsed_s, left_s=(end - step) * step_s, step_s=step_s)
            if count == 0:
                text = (
                    f"step {step}: validation left out, as those so far took {allowance.spent_s:.0f} s of "
                    f"{elapsed_s:.0f} s, and more than {LIMIT:.0%} is too much"
                )
                monitor.add_event("validation_skipped", step, text)
        return spread(self._held_out, self._world.broadcast_object(count))

    def last(self) -> tuple[int, ...]:
        """Return the cases of a validation that is made in any case, at the end; as many as those before it had."""
        return spread(
            self._held_out, self._world.broadcast_object(0 if self._allowance is None else self._allowance.usual)
        )

    def took(self, step: int, seconds: float) -> None:
        """Take in what a validation at `step` took."""
        if self._allowance is not None:
            self._allowance.took(step, seconds)


def new_pace(
    plan: Plan, cache: Cache, held_out: tuple[int, ...], world: World, *, path: Path, plan_sha256: str, step: int
) -> Pace:
    """Return the pace of a fold that goes on after `step`; `path` is the file of its decisions."""
    if not world.main or not held_out:
        return Pace(None, held_out, world)
    wanted = min(plan.schedule.validation_cases, len(held_out))
    shapes = [cache.labels(case).shape for case in spread(held_out, wanted)]
    windows = mean(tile(shape, plan.patch.size, plan.inference.overlap).num_windows for shape in shapes)
    allowance = Allowance(
        path,
        plan_sha256=plan_sha256,
        step=step,
        wanted=wanted,
        rounds=len(validation_steps(plan.schedule)),
        windows_per_sample=windows / plan.training.batch_size,
    )
    return Pace(allowance, held_out, world)


def spread(cases: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return `count` of the cases, evenly spread and always the same."""
    if len(cases) <= count:
        return cases
    return tuple(cases[int(position)] for position in np.linspace(0, len(cases) - 1, count))
