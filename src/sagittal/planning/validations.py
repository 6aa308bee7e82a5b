"""How many whole-case validations a budget holds, and on how many cases."""

from __future__ import annotations

SHARE = 0.08
"""Share of the time that the validations before the last may take: below a tenth, for a machine may slow down."""
FEWEST_CASES = 4
"""Fewer cases say too little: then validations are left out instead."""
EVERY_S = 300.0
MOST = 19


def validations_within(left_s: float, *, case_s: float, held_out: int, wanted_cases: int) -> tuple[int, int]:
    """Return the number of validations before the last, and of the cases of each.

    One for every five minutes, at most nineteen. Where they would take more than `SHARE` of the time, they are made on
    fewer cases, but on no less than `FEWEST_CASES`, and then there are fewer of them.

    Args:
        left_s: seconds for training and validation.
        case_s: seconds to predict a case.
        held_out: cases held out.
        wanted_cases: cases that a validation should have.
    """
    cases = min(held_out, wanted_cases)
    rounds = min(int(left_s / EVERY_S), MOST) if cases else 0
    if rounds == 0 or rounds * cases * case_s <= SHARE * left_s:
        return rounds, wanted_cases
    fitting = int(SHARE * left_s / (rounds * case_s))
    cases = max(min(FEWEST_CASES, cases), fitting)
    return min(rounds, int(SHARE * left_s / (cases * case_s))), cases
