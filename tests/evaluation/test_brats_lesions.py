from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import DataError
from sagittal.evaluation import dice
from sagittal.evaluation.brats_lesions import BRATS2023, BratsRule, BratsScore, brats2023_lesionwise
from sagittal.evaluation.surfels import surfel_distances_mm

SPACING = (5.0, 0.8, 0.5)
ORACLE = json.loads((Path(__file__).parent / "brats2023_lesions.json").read_text())
"""What the organisers' definitions give on the masks that `masks` makes, turned into (x, y, z) as they read files:
computed with cc3d 4.1.1 and surface-distance 0.1, and equal to eval.py itself (counts exactly, the rest to 3e-11)."""


def masks(seed: int, shape: list[int], blobs: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of unequal size; the prediction has them moved, some left out, some added."""
    random = np.random.default_rng(seed)
    grid = np.indices(shape)
    reference, prediction = np.zeros(shape, bool), np.zeros(shape, bool)
    for _ in range(blobs):
        centre = [random.integers(length) for length in shape]
        radii = random.uniform(0.6, 4.0, 3)
        moved = [c + random.integers(-2, 3) for c in centre]
        kind = random.random()
        for mask, place, there in ((reference, centre, kind < 0.85), (prediction, moved, kind > 0.15)):
            if there:
                offsets = [(grid[axis] - place[axis]) / radii[axis] for axis in range(3)]
                mask |= offsets[0] ** 2 + offsets[1] ** 2 + offsets[2] ** 2 <= 1
    return reference, prediction


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: f"seed_{case['seed']}")
def test_scores_equal_the_organisers_definitions(case: dict[str, Any]) -> None:
    rule = BratsRule(dilation_vox=case["dilation_vox"], minimum_mm3=case["minimum_mm3"])
    score = brats2023_lesionwise(*masks(case["seed"], case["shape"], case["blobs"]), case["spacing_mm"], rule)
    for name in ("true_positives", "false_positives", "false_negatives"):
        assert getattr(score, name) == case[name]
    assert score.dice == pytest.approx(case["dice"], abs=1e-12)
    assert score.hd95_mm == pytest.approx(case["hd95_mm"], abs=1e-9)
    assert BratsScore.from_json(score.to_json()) == score


def test_the_oracle_has_found_missed_and_false_lesions() -> None:
    for name in ("true_positives", "false_positives", "false_negatives"):
        assert sum(case[name] for case in ORACLE) > 1


def cube(*corners: tuple[int, int, int], size: int = 4) -> np.ndarray:
    mask = np.zeros((30, 34, 38), bool)
    for d, h, w in corners:
        mask[d : d + size, h : h + size, w : w + size] = True
    return mask


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        (cube(), cube(), (1.0, 0.0, 0, 0, 0)),
        (cube((2, 2, 2)), cube(), (0.0, 374.0, 0, 0, 1)),
        (cube(), cube((2, 2, 2)), (0.0, 374.0, 0, 1, 0)),
        (cube((2, 2, 2)), cube((20, 20, 20)), (0.0, 374.0, 0, 1, 1)),
        (cube((2, 2, 2)), cube((2, 2, 2)), (1.0, 0.0, 1, 0, 0)),
        (cube((2, 2, 2)), cube((2, 2, 2), (20, 20, 20)), (0.5, 187.0, 1, 1, 0)),
    ],
    ids=["both_empty", "empty_prediction", "empty_reference", "apart", "same", "one_more"],
)
def test_misses_and_false_alarms_count_as_the_worst(
    reference: np.ndarray, prediction: np.ndarray, expected: tuple[float, ...]
) -> None:
    score = brats2023_lesionwise(reference, prediction, (1.0, 1.0, 1.0))
    counts = (score.true_positives, score.false_positives, score.false_negatives)
    assert (score.dice, score.hd95_mm, *counts) == expected


def test_a_small_lesion_does_not_count_and_excuses_what_finds_it() -> None:
    reference, prediction = cube((2, 2, 2), size=3), cube((3, 3, 3), (20, 20, 20), size=3)
    score = brats2023_lesionwise(reference, prediction, (1.0, 1.0, 1.0))
    assert (score.lesions, score.false_positives) == ((), 1)
    assert len(brats2023_lesionwise(reference, prediction, (1.0, 1.0, 1.0), BRATS2023["MET"]).lesions) == 1
    assert brats2023_lesionwise(cube((2, 2, 2), size=3), cube((3, 3, 3), size=3), (1.0, 1.0, 1.0)).dice == 1.0


def test_parts_that_grow_together_are_one_lesion_and_one_component_may_find_several() -> None:
    near, far = cube((2, 2, 2), (2, 2, 10)), cube((2, 2, 2), (2, 2, 20))
    assert len(brats2023_lesionwise(near, near, (1.0, 1.0, 1.0)).lesions) == 1
    assert len(brats2023_lesionwise(far, far, (1.0, 1.0, 1.0)).lesions) == 2
    bridge = far.copy()
    bridge[3, 3, 2:24] = True
    both = brats2023_lesionwise(far, bridge, (1.0, 1.0, 1.0))
    assert [lesion.found_by for lesion in both.lesions] == [1, 1]
    assert both.false_positives == 0


def test_a_component_beside_a_lesion_finds_it_within_the_dilation() -> None:
    score = brats2023_lesionwise(cube((2, 2, 2)), cube((2, 2, 8)), (1.0, 1.0, 1.0))
    assert (score.true_positives, score.false_positives, score.dice) == (1, 0, 0.0)
    assert 0 < score.hd95_mm < 10
    assert brats2023_lesionwise(cube((2, 2, 2)), cube((2, 2, 9)), (1.0, 1.0, 1.0)).false_positives == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_a_single_lesion_and_component_have_the_scores_of_the_whole_masks(seed: int) -> None:
    random = np.random.default_rng(seed)
    reference, prediction = np.zeros((9, 11, 13), bool), np.zeros((9, 11, 13), bool)
    for mask in (reference, prediction):
        starts = random.integers(0, 5, 3)
        mask[tuple(slice(int(a), int(a) + int(random.integers(2, 7))) for a in starts)] = True
    score = brats2023_lesionwise(reference, prediction, SPACING, BratsRule(dilation_vox=3, minimum_mm3=1.0))
    if score.true_positives:
        distances = surfel_distances_mm(reference, prediction, SPACING)
        assert distances is not None
        assert score.dice == pytest.approx(dice(reference, prediction))
        assert score.hd95_mm == pytest.approx(distances.hd95_mm)


def test_label_maps_are_refused() -> None:
    with pytest.raises(DataError, match="boolean mask"):
        brats2023_lesionwise(cube().astype(np.uint8), cube(), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="spacing_mm"):
        brats2023_lesionwise(cube(), cube(), (1.0, 1.0))
