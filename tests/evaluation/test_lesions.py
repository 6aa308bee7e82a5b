from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import ndimage

from sagittal.errors import DataError
from sagittal.evaluation.components import dilate, islands
from sagittal.evaluation.lesions import LesionRule, LesionScore, match_lesions, pool_lesions

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8))
SPACINGS = st.tuples(*[st.sampled_from([0.4, 0.78, 1.0, 2.5, 5.0])] * 3)
SPACING = (5.0, 0.8, 0.5)
VOXEL_ML = 5.0 * 0.8 * 0.5 / 1000

Voxel = tuple[int, ...]


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.05, 0.15, 0.3]))
    reference = random.random(shape) < share
    prediction = random.random(shape) < share
    if draw(st.booleans()):
        prediction |= reference & (random.random(shape) < 0.7)
    return reference, prediction


@st.composite
def rules(draw: st.DrawFn) -> LesionRule:
    return LesionRule(
        connectivity=draw(st.sampled_from([6, 18, 26])),
        dilation_vox=draw(st.sampled_from([0, 0, 1, 2])),
        matching=draw(st.sampled_from(["one_to_one", "any_overlap"])),
        minimum_iou=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        minimum_ml=draw(st.sampled_from([0.0, 0.002, 0.005])),
    )


def steps(connectivity: int) -> list[Voxel]:
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    return [step for step in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, step)) <= most]


def brute_components(mask: np.ndarray, rule: LesionRule) -> list[set[Voxel]]:
    """Flood fill, voxel by voxel; lesions are cut out of what grew together."""
    own = {tuple(voxel) for voxel in np.argwhere(mask).tolist()}
    directions = steps(rule.connectivity)
    grown = set(own)
    for _ in range(rule.dilation_vox):
        grown |= {
            tuple(a + b for a, b in zip(v, step, strict=True)) for v in grown for step in steps(rule.connectivity)
        }
        grown = {v for v in grown if all(0 <= a < n for a, n in zip(v, mask.shape, strict=True))}
    lesions = []
    while grown:
        todo = [min(grown)]
        grown -= set(todo)
        component = set()
        while todo:
            voxel = todo.pop()
            component.add(voxel)
            near = {tuple(a + b for a, b in zip(voxel, s, strict=True)) for s in directions} & grown
            grown -= near
            todo += near
        lesions.append(component & own)
    return sorted(lesions, key=min)


def brute_counts(
    reference: np.ndarray, prediction: np.ndarray, rule: LesionRule, voxel_ml: float
) -> tuple[list[tuple[int, int, float]], list[tuple[int, int]]]:
    """Return (voxels, pairs, Dice) of each counted lesion of the reference, and (voxels, pairs) of each predicted."""
    of_reference, of_prediction = brute_components(reference, rule), brute_components(prediction, rule)
    excused = [len(lesion) * voxel_ml < rule.minimum_ml - 1e-12 for lesion in of_reference]
    pairs = {}
    for (i, r), (j, p) in itertools.product(enumerate(of_reference), enumerate(of_prediction)):
        if r & p and len(r & p) / len(r | p) >= rule.minimum_iou:
            pairs[i, j] = (len(r & p) / len(r | p), len(r & p))
    counted = {key: value for key, value in pairs.items() if not excused[key[0]]}
    if rule.matching == "one_to_one":
        chosen: list[tuple[int, int]] = []
        left = dict(counted)
        while left:
            best = max(left, key=lambda key: (*left[key], -key[0], -key[1]))
            chosen.append(best)
            left = {key: value for key, value in left.items() if key[0] != best[0] and key[1] != best[1]}
    else:
        chosen = list(counted)
    references = []
    for i, lesion in enumerate(of_reference):
        partners = [of_prediction[j] for k, j in chosen if k == i]
        pooled = set().union(*partners)
        dice = 2 * len(lesion & pooled) / (len(lesion) + len(pooled)) if partners else 0.0
        if not excused[i]:
            references.append((len(lesion), len(partners), dice))
    predictions = []
    for j, lesion in enumerate(of_prediction):
        finds = sum(k == j for _, k in chosen)
        small = len(lesion) * voxel_ml < rule.minimum_ml - 1e-12
        if finds or not (small or any(k == j and excused[i] for i, k in pairs)):
            predictions.append((len(lesion), finds))
    return references, predictions


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mask_pairs(), SPACINGS, rules())
@example((np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool)), SPACING, LesionRule())
@example((np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)), SPACING, LesionRule())
@example((np.zeros((2, 3, 4), bool), np.ones((2, 3, 4), bool)), SPACING, LesionRule())
def test_lesions_equal_flood_fill(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], rule: LesionRule
) -> None:
    voxel_ml = math.prod(spacing) / 1000
    references, predictions = brute_counts(*masks, rule, voxel_ml)
    score = match_lesions(*masks, spacing, rule)
    found = [(round(lesion.volume_ml / voxel_ml), lesion.found_by, lesion.dice) for lesion in score.reference]
    assert found == [(size, pairs, pytest.approx(dice, abs=1e-12)) for size, pairs, dice in references]
    assert [(round(lesion.volume_ml / voxel_ml), lesion.finds) for lesion in score.predicted] == predictions
    detected, right = sum(pairs > 0 for _, pairs, _ in references), sum(finds > 0 for _, finds in predictions)
    assert (score.detected, score.false_negatives) == (detected, len(references) - detected)
    assert (score.true_positives, score.false_positives) == (right, len(predictions) - right)
    if rule.matching == "one_to_one":
        assert score.detected == score.true_positives
        assert score.splits == score.merges == 0
        total = len(references) + len(predictions)
        assert score.f1 == (pytest.approx(2 * detected / total) if total else None)
    assert LesionScore.from_json(score.to_json()) == score


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hnp.arrays(np.bool_, SHAPES), st.sampled_from([6, 18, 26]), st.integers(0, 3))
def test_dilation_equals_scipy(mask: np.ndarray, connectivity: int, times: int) -> None:
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    expected = ndimage.binary_dilation(mask, structure, iterations=times) if times else mask
    np.testing.assert_array_equal(dilate(mask, connectivity, times), expected)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 9]))
@example(0, 0)
def test_islands_hold_every_voxel_once_and_stay_apart_however_they_are_dilated(seed: int, dilation_vox: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 70, 3))
    mask = np.zeros(shape, bool)
    for _ in range(random.integers(0, 5)):
        corner = [int(random.integers(length)) for length in shape]
        mask[tuple(slice(a, a + int(random.integers(1, 30))) for a in corner)] = True
    mask &= random.random(shape) < random.choice([0.01, 0.5])
    found = list(islands(mask, dilation_vox))
    times_seen = np.zeros(shape, int)
    for number, island in enumerate(found, start=1):
        times_seen[island.box.slices] += island.cut(mask) * number
    np.testing.assert_array_equal(times_seen > 0, mask)
    everything, _ = ndimage.label(dilate(mask, 26, dilation_vox), np.ones((3, 3, 3)))
    pairs = {(int(a), int(b)) for a, b in zip(everything[mask], times_seen[mask], strict=True)}
    assert len({component for component, _ in pairs}) == len(pairs)


def row(*parts: slice) -> np.ndarray:
    """A mask of 3 x 4 x 20 voxels with parts of its middle row."""
    mask = np.zeros((3, 4, 20), bool)
    for part in parts:
        mask[1, 2, part] = True
    return mask


def test_a_split_lesion_counts_its_best_part_alone_or_all_of_them() -> None:
    reference, prediction = row(slice(0, 10)), row(slice(0, 3), slice(4, 9))
    once = match_lesions(reference, prediction, SPACING, LesionRule())
    assert (once.detected, once.true_positives, once.false_positives) == (1, 1, 1)
    assert once.reference[0].dice == pytest.approx(2 * 5 / 15)
    assert once.false_positives_ml == (pytest.approx(3 * VOXEL_ML),)
    every = match_lesions(reference, prediction, SPACING, LesionRule(matching="any_overlap"))
    assert (every.detected, every.true_positives, every.false_positives, every.splits) == (1, 2, 0, 1)
    assert every.reference[0].dice == pytest.approx(2 * 8 / 18)
    assert every.reference[0].iou == pytest.approx(8 / 10)


def test_merged_lesions_are_one_found_and_one_missed_or_both_found() -> None:
    reference, prediction = row(slice(0, 3), slice(4, 9)), row(slice(0, 10))
    once = match_lesions(reference, prediction, SPACING, LesionRule())
    assert (once.detected, once.false_negatives, once.false_positives) == (1, 1, 0)
    assert once.false_negatives_ml == (pytest.approx(3 * VOXEL_ML),)
    every = match_lesions(reference, prediction, SPACING, LesionRule(matching="any_overlap"))
    assert (every.detected, every.false_negatives, every.merges, every.precision) == (2, 0, 1, 1.0)


def test_pairs_are_taken_by_iou_and_not_in_the_order_of_the_array() -> None:
    reference = row(slice(0, 4), slice(5, 13))
    prediction = row(slice(3, 12))
    score = match_lesions(reference, prediction, SPACING, LesionRule())
    assert [lesion.detected for lesion in score.reference] == [False, True]


def test_a_lesion_below_the_minimum_is_neither_missed_nor_a_false_alarm() -> None:
    rule = LesionRule(minimum_ml=3 * VOXEL_ML)
    reference = row(slice(0, 2), slice(5, 8))
    both = match_lesions(reference, row(slice(0, 4), slice(7, 8), slice(15, 17)), SPACING, rule)
    # The first finds the excused lesion, the second is small but right, the third is too small to alarm anyone.
    assert [lesion.detected for lesion in both.reference] == [True]
    assert [lesion.finds for lesion in both.predicted] == [1]
    assert both.f1 == 1.0
    alarm = match_lesions(reference, row(slice(15, 18)), SPACING, rule)
    assert (alarm.false_negatives, alarm.false_positives) == (1, 1)


def test_parts_within_reach_of_the_dilation_are_one_lesion_with_their_own_voxels() -> None:
    mask = row(slice(0, 3), slice(5, 7), slice(12, 14))
    score = match_lesions(mask, mask, SPACING, LesionRule(dilation_vox=1))
    assert [lesion.volume_ml for lesion in score.reference] == [pytest.approx(n * VOXEL_ML) for n in (5, 2)]
    assert score.reference[0].centre_vox == (1, 2, 3)
    assert score.reference[1].centre_vox == (1, 2, 12)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        (row(), row(), (None, None, None, None)),
        (row(slice(0, 2)), row(), (0.0, 0.0, 0.0, 0.0)),
        (row(), row(slice(0, 2)), (None, 0.0, 0.0, 0.0)),
        (row(slice(0, 2)), row(slice(8, 9)), (0.0, 0.0, 0.0, 0.0)),
    ],
    ids=["both_empty", "empty_prediction", "empty_reference", "apart"],
)
def test_empty_masks(reference: np.ndarray, prediction: np.ndarray, expected: tuple[float | None, ...]) -> None:
    score = match_lesions(reference, prediction, SPACING, LesionRule())
    assert (score.sensitivity, score.precision, score.f1, score.mean_dice) == expected


def test_masks_without_a_single_voxel_have_no_lesions() -> None:
    nothing = np.zeros((0, 4, 5), bool)
    score = match_lesions(nothing, nothing, SPACING, LesionRule(dilation_vox=1))
    assert (score.reference, score.predicted) == ((), ())


def test_mean_dice_counts_misses_and_false_alarms_as_nothing() -> None:
    score = match_lesions(row(slice(0, 4), slice(6, 8)), row(slice(0, 4), slice(12, 14)), SPACING, LesionRule())
    assert score.mean_dice == pytest.approx(1 / 3)


def test_pooled_lesions_weigh_the_same_in_whichever_case_they_are() -> None:
    first = match_lesions(row(slice(0, 4), slice(6, 8)), row(slice(0, 4)), SPACING, LesionRule())
    second = match_lesions(row(slice(0, 2)), row(slice(0, 2)), SPACING, LesionRule())
    third = match_lesions(row(), row(slice(0, 2)), SPACING, LesionRule())
    pooled = pool_lesions([first, second, third])
    assert (pooled.sensitivity, pooled.precision) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    with pytest.raises(DataError, match="0 cases by 0 rules"):
        pool_lesions([])
    other = match_lesions(row(), row(), SPACING, LesionRule(matching="any_overlap"))
    with pytest.raises(DataError, match="2 rules"):
        pool_lesions([first, other])


def test_rules_are_told_in_words() -> None:
    assert LesionRule().in_words == (
        "A lesion is what is connected by faces, edges and corners. Lesions of reference and prediction that share a "
        "voxel are paired one to one, the greatest IoU first."
    )
    rule = LesionRule(connectivity=6, dilation_vox=2, matching="any_overlap", minimum_iou=0.25, minimum_ml=0.1)
    assert rule.in_words == (
        "A lesion is what is connected by faces once the mask is dilated 2 times, with its own voxels. A lesion counts "
        "as found, or as right, where it and one of the other mask have an IoU of at least 0.25; one may find or be "
        "found by several. Lesions below 0.1 mL are neither missed nor false alarms."
    )


def test_the_order_of_axes_changes_nothing_but_the_centres() -> None:
    random = np.random.default_rng(0)
    reference, prediction = (random.random((7, 9, 11)) < 0.12 for _ in range(2))
    prediction |= reference & (random.random((7, 9, 11)) < 0.5)
    rule = LesionRule(connectivity=18, matching="any_overlap", minimum_iou=0.2, minimum_ml=2 * VOXEL_ML)
    plain = match_lesions(reference, prediction, SPACING, rule)
    turned = match_lesions(reference.transpose(2, 0, 1), prediction.transpose(2, 0, 1), (0.5, 5.0, 0.8), rule)
    assert plain.reference
    for name in ("dice", "found_by"):
        assert sorted(getattr(lesion, name) for lesion in plain.reference) == sorted(
            getattr(lesion, name) for lesion in turned.reference
        )
    assert (plain.sensitivity, plain.precision) == (turned.sensitivity, turned.precision)


def test_lesions_of_islands_that_enclose_each_other_are_told_in_the_order_of_the_array() -> None:
    frame, inside = np.zeros((3, 90, 100), bool), np.zeros((3, 90, 100), bool)
    frame[1, 2:88, 2:98] = True
    frame[1, 5:85, 5:95] = False
    inside[1, 40:50, 45:55] = True
    score = match_lesions(frame | inside, inside, SPACING, LesionRule())
    assert [lesion.detected for lesion in score.reference] == [False, True]
    assert score.reference[1].dice == 1.0
    assert score.reference[1].centre_vox == (1, 44, 49)
    assert score.reference[0].volume_ml == pytest.approx(int(frame.sum()) * VOXEL_ML)


def test_label_maps_and_wrong_spacings_are_refused() -> None:
    with pytest.raises(DataError, match="boolean mask"):
        match_lesions(row().astype(np.uint8), row(), SPACING, LesionRule())
    with pytest.raises(DataError, match="spacing_mm"):
        match_lesions(row(), row(), (1.0, 1.0), LesionRule())


@pytest.mark.parametrize(
    "wrong", [{"connectivity": 8}, {"minimum_iou": 1.5}, {"minimum_ml": -1.0}, {"dilation_vox": -1}]
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LesionRule(**wrong)  # type: ignore[arg-type]
