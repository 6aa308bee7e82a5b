"""A sweep on Ray: who ASHA stops, what a sweep that goes on knows, and that an end from outside is no verdict."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from sagittal.cluster.sweep import Asha, Heard, _quiet, ended
from sagittal.training.stages import RunOptions
from sagittal.training.sweep import Interrupted, Standing, Sweep

FOUR = ("a", "b", "c", "d")


def _standing(**changed: Any) -> Standing:
    return Standing(networks=FOUR, budget_s=1.0, folds=5).replace(**changed)


class _Race:
    """What Ray Tune does with the results of trials: ASHA judges, then who listens is told."""

    def __init__(self, standing: Standing) -> None:
        self.asha, self.kept, self._trials = Asha(standing), list[Standing](), dict[str, Any]()
        sweep = Sweep(Path(), Path(), FOUR, 1.0, options=RunOptions(say=lambda line: None))
        self.heard = Heard(sweep, standing, self.kept.append, self.asha.behind)

    def tell(self, name: str, fold: int, dice: float, failed: str = "") -> bool:
        """Return whether a network goes on after a fold."""
        if name not in self._trials:
            self._trials[name] = SimpleNamespace(trial_id=f"{len(self._trials):05d}", config={"network": name})
            self.asha.on_trial_add(None, self._trials[name])
        result = {"training_iteration": fold, "dice": dice, "network": name, "failed": failed}
        verdict = self.asha.on_trial_result(None, self._trials[name], result)
        self.heard.on_trial_result(fold, [], self._trials[name], result)
        return verdict == TrialScheduler.CONTINUE


def test_who_asha_stops_is_written_down_at_once_and_who_fails_is_not_compared_with() -> None:
    race = _Race(_standing())
    assert race.tell("a", 1, 0.8) and race.tell("b", 5, -1.0, "of something")
    assert not race.tell("c", 1, 0.5)
    assert race.kept[-1].stopped == ("c",) and race.kept[-1].scores == {"a": (0.8,), "c": (0.5,)}
    assert race.kept[-1].failed == {"b": "of something"}


def test_a_sweep_that_goes_on_compares_with_who_was_stopped_before_and_judges_nobody_twice() -> None:
    """Without the score of `c`, `d` would be behind; judged again, `b` would be."""
    before = _standing(scores={"a": (0.8,), "b": (0.7,), "c": (0.1,)}, stopped=("c",))
    race = _Race(before)
    assert race.tell("a", 1, 0.8) and race.tell("b", 1, 0.7)
    assert race.kept == []  # told again, which is no news
    assert race.tell("d", 1, 0.72), "the median of those before is 0.7"
    assert race.tell("a", 2, 0.8) and not race.tell("b", 2, 0.7)
    assert race.kept[-1].stopped == ("c", "b")


def test_an_end_from_outside_stops_nobody_and_concludes_nothing() -> None:
    standing = _standing(scores={"a": (0.8,)})
    with pytest.raises(Interrupted):
        ended(standing, FOUR, ())
    whole = standing.replace(scores={"a": (0.8,) * 5}, stopped=("b",), failed={"c": "of something"})
    with pytest.raises(Interrupted):
        ended(whole, FOUR, ())
    told = ended(whole, FOUR, ("c", "d"))
    assert told.stopped == ("b",) and told.failed["c"] == "of something" and "lost more than" in told.failed["d"]


def test_ray_tune_leaves_ctrl_c_to_the_command() -> None:
    with _quiet():
        assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"
