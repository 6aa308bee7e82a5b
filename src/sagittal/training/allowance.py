"""What validations may cost: a tenth of the training time, held by the clock.

The plan says how many validations it wishes for and on how many cases. How many cases fit is decided once, at the
first validation; a validation for which no time is left is left out. Decisions are written down before they are acted
on, and a resumed run repeats them: they come from a clock, and which step is the best one hangs on them.
"""

from __future__ import annotations

from pathlib import Path

from sagittal.errors import PlanError
from sagittal.plan.base import Frozen
from sagittal.planning.validations import FEWEST_CASES, SHARE

LIMIT = 0.1
"""Share of the training time that validations may have taken at any moment."""
FREE_S = 10.0
"""Seconds that they may take in any case: a run that is over in two minutes wants to be seen, too."""
FORWARD_SHARE = 0.35
"""Of a training step, what a prediction of as many voxels takes, forward without backward; used until a validation
has been measured."""


class Decision(Frozen):
    """What was decided about one validation."""

    cases: int
    """0 where it is left out."""
    seconds: float | None = None
    """What it took."""


class _Decisions(Frozen):
    plan_sha256: str
    made: dict[int, Decision]
    """By the finished steps at which it is due."""


class Allowance:
    """Decides on how many cases a validation is made.

    Args:
        path: file of the decisions.
        plan_sha256: hash of the plan; decisions of another one do not count.
        step: finished steps from which the run goes on.
        wanted: cases that each validation should have.
        rounds: how many validations the plan has.
        windows_per_sample: windows that a case has, over the samples of a batch.
    """

    def __init__(
        self, path: Path, *, plan_sha256: str, step: int, wanted: int, rounds: int, windows_per_sample: float
    ) -> None:
        self._path, self._plan_sha256 = path, plan_sha256
        self._wanted, self._rounds, self._windows_per_sample = wanted, max(rounds, 1), windows_per_sample
        self._made = _read(path, plan_sha256)
        done = [decision.seconds or 0.0 for due, decision in self._made.items() if due <= step]
        self.spent_s = sum(done)

    def cases(self, step: int, *, elapsed_s: float, left_s: float, step_s: float) -> int:
        """Return on how many cases the validation at `step` is made, 0 to leave it out.

        Args:
            step: finished steps.
            elapsed_s: time so far, validations included.
            left_s: what the steps to come will take.
            step_s: what one takes.
        """
        if step not in self._made:
            trained_s, case_s = elapsed_s - self.spent_s, self._case_s(step_s)
            count = self._count(trained_s + left_s, case_s)
            fits = self.spent_s + count * case_s <= max(FREE_S, LIMIT * trained_s)
            self._made[step] = Decision(cases=count if fits else 0)
            self._write()
        return self._made[step].cases

    def took(self, step: int, seconds: float) -> None:
        """Take in what a validation took."""
        self.spent_s += seconds
        self._made[step] = self._made[step].replace(seconds=round(seconds, 3))
        self._write()

    @property
    def usual(self) -> int:
        """Cases of a validation, as decided at the first one; those wanted before."""
        return next((decision.cases for _, decision in sorted(self._made.items()) if decision.cases), self._wanted)

    def _count(self, whole_s: float, case_s: float) -> int:
        if any(decision.cases for decision in self._made.values()):
            return self.usual
        fitting = int(max(FREE_S, SHARE * whole_s) / (self._rounds * case_s))
        return min(self._wanted, max(fitting, FEWEST_CASES))

    def _case_s(self, step_s: float) -> float:
        measured = [made for made in self._made.values() if made.seconds is not None and made.cases]
        if not measured:
            return max(FORWARD_SHARE * self._windows_per_sample * step_s, 1e-6)
        return max(sum(made.seconds or 0.0 for made in measured) / sum(made.cases for made in measured), 1e-6)

    def _write(self) -> None:
        _Decisions(plan_sha256=self._plan_sha256, made=self._made).write(self._path)


def _read(path: Path, plan_sha256: str) -> dict[int, Decision]:
    if not path.is_file():
        return {}
    try:
        found = _Decisions.read(path)
    except PlanError:
        # Decisions are a matter of cost: a file that someone damaged is made anew.
        return {}
    return dict(found.made) if found.plan_sha256 == plan_sha256 else {}
