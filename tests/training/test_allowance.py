"""Validations take a tenth of the time at most, by a clock that the tests turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagittal.training.allowance import FREE_S, LIMIT, Allowance


def allowance(path: Path, **changes: Any) -> Allowance:
    given = {"plan_sha256": "a" * 64, "step": 0, "wanted": 20, "rounds": 19, "windows_per_sample": 1.0}
    return Allowance(path, **{**given, **changes})


def simulate(allowed: Allowance, *, case_s: float, step_s: float = 1.0, steps: int = 2000) -> list[tuple[int, float]]:
    """Train and validate by the clock; return the cases of each validation and the share of training time after it."""
    elapsed, outcome = 0.0, []
    for number in range(1, 20):
        elapsed += steps / 20 * step_s
        step = steps // 20 * number
        count = allowed.cases(step, elapsed_s=elapsed, left_s=(steps - step) * step_s, step_s=step_s)
        if count:
            elapsed += count * case_s
            allowed.took(step, count * case_s)
        trained = elapsed - allowed.spent_s
        outcome.append((count, allowed.spent_s / trained))
    return outcome


def test_cheap_validations_are_made_as_planned(tmp_path: Path) -> None:
    assert {count for count, _ in simulate(allowance(tmp_path / "v.json"), case_s=0.1)} == {20}


@pytest.mark.parametrize("case_s", [0.6, 2.0, 10.0])
def test_dear_ones_are_made_on_fewer_cases_or_left_out_and_stay_below_a_tenth(tmp_path: Path, case_s: float) -> None:
    # A window takes half a step, where a third was expected.
    outcome = simulate(allowance(tmp_path / "v.json", windows_per_sample=case_s / 0.5), case_s=case_s)
    made = [count for count, _ in outcome if count]
    assert made and len(set(made)) == 1, "scores on different numbers of cases can't be compared"
    assert all(count < 20 for count in made) or len(made) < 19
    # The first has not been measured; from the second on nothing goes beyond.
    assert outcome[-1][1] <= LIMIT + 1e-9


def test_an_overestimate_of_the_time_left_does_not_break_the_limit(tmp_path: Path) -> None:
    allowed = allowance(tmp_path / "v.json")
    assert allowed.cases(100, elapsed_s=1000.0, left_s=1e6, step_s=10.0) == 20
    allowed.took(100, 90.0)
    assert allowed.cases(200, elapsed_s=1200.0, left_s=1000.0, step_s=1.0) == 0
    assert allowed.cases(300, elapsed_s=2000.0, left_s=1000.0, step_s=1.0) == 20


def test_the_first_seconds_are_free(tmp_path: Path) -> None:
    allowed = allowance(tmp_path / "v.json", wanted=2, rounds=2)
    assert allowed.cases(1, elapsed_s=0.1, left_s=0.1, step_s=0.1) == 2
    allowed.took(1, FREE_S)
    assert allowed.cases(2, elapsed_s=FREE_S + 0.2, left_s=0.0, step_s=0.1) == 0


def test_a_resumed_run_repeats_what_was_decided(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    first = allowance(path)
    decided = first.cases(100, elapsed_s=100.0, left_s=1900.0, step_s=1.0)
    first.took(100, 3.0)
    assert first.cases(200, elapsed_s=103.5, left_s=1800.0, step_s=1.0) == decided
    # Killed before the validation at 200 ended, and resumed from step 150 on a machine that is much slower.
    again = allowance(path, step=150)
    assert again.spent_s == 3.0
    assert again.cases(200, elapsed_s=1e6, left_s=1e7, step_s=1e3) == decided
    # From before the first validation its seconds are yet to be spent.
    assert allowance(path, step=50).spent_s == 0.0


@pytest.mark.parametrize("content", ["", "{}", '{"plan_sha256": "other", "made": {"100": {"cases": 3}}}'])
def test_decisions_that_are_damaged_or_of_another_plan_do_not_count(tmp_path: Path, content: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(content)
    assert allowance(path).cases(100, elapsed_s=1e5, left_s=1e6, step_s=1.0) == 20
