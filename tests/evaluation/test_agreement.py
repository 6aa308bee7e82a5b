from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.evaluation import OverlapCounts
from sagittal.evaluation.agreement import kappa

counts = st.tuples(*[st.integers(0, 30)] * 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts)
def test_kappa_equals_its_formula(given: tuple[int, int, int, int]) -> None:
    both, alarm, missed, neither = given
    voxels = sum(given)
    found = kappa(OverlapCounts(both, alarm, missed), voxels)
    if not both + alarm + missed:
        assert found is None
        return
    agree = (both + neither) / voxels
    reference, prediction = (both + missed) / voxels, (both + alarm) / voxels
    chance = reference * prediction + (1 - reference) * (1 - prediction)
    assert found == pytest.approx(1.0 if chance == 1 else (agree - chance) / (1 - chance), abs=1e-9)


def test_an_example_by_hand() -> None:
    # Cohen's own arithmetic: 20 both, 5 and 10 alone, 15 neither; 0.7 agree, 0.5 by chance.
    assert kappa(OverlapCounts(20, 5, 10), 50) == pytest.approx(0.4)


def test_small_structures_in_large_images_keep_their_digits() -> None:
    # In shares the agreement by chance is 1 - 2e-8, of which half of the digits are gone.
    assert kappa(OverlapCounts(4, 1, 1), 512 * 512 * 512) == pytest.approx(0.8, abs=1e-8)


@pytest.mark.parametrize(
    ("given", "expected"), [((0, 0, 5), 0.0), ((0, 5, 0), 0.0), ((0, 0, 0), None), ((9, 0, 0), 1.0)]
)
def test_rules_for_empty_and_full_masks(given: tuple[int, int, int], expected: float | None) -> None:
    assert kappa(OverlapCounts(*given), 9) == expected
