"""A budget holds as many validations as a twelfth of it has time for."""

from __future__ import annotations

import pytest

from sagittal.planning.validations import FEWEST_CASES, MOST, SHARE, validations_within


@pytest.mark.parametrize(
    ("left_s", "case_s", "held_out", "expected"),
    [
        (900.0, 0.1, 50, (3, 20)),
        (1e6, 0.1, 50, (MOST, 20)),
        (900.0, 2.0, 50, (3, 12)),  # fewer cases
        (900.0, 12.0, 50, (1, FEWEST_CASES)),  # fewer validations
        (900.0, 100.0, 50, (0, FEWEST_CASES)),  # none
        (900.0, 100.0, 2, (0, 2)),
        (900.0, 1.0, 0, (0, 20)),
        (100.0, 1.0, 50, (0, 20)),
    ],
)
def test_number_and_cases(left_s: float, case_s: float, held_out: int, expected: tuple[int, int]) -> None:
    assert validations_within(left_s, case_s=case_s, held_out=held_out, wanted_cases=20) == expected
    rounds, cases = expected
    assert rounds * min(cases, held_out) * case_s <= SHARE * left_s
