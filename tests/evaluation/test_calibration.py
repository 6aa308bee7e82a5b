from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sagittal.errors import DataError
from sagittal.evaluation.calibration import CalibrationCounts, CalibrationScore, ReliabilityBins, calibrate
from sagittal.evaluation.classes import ClassSet

SPACINGS = st.tuples(*[st.sampled_from([0.4, 0.78, 1.0, 2.5, 5.0])] * 3)
SPACING = (5.0, 0.8, 0.5)
CLASSES = ClassSet.of_mapping({"liver": 2, "tumour": 1})
WITH_IGNORE = ClassSet.of_mapping({"liver": 2, "tumour": 1, "ignore": 7})
REGIONS = ClassSet.of_mapping({"whole": [1, 2], "core": [2], "ignore": 3})

Case = tuple[np.ndarray, np.ndarray, ClassSet]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)))
    classes = draw(st.sampled_from([CLASSES, WITH_IGNORE, REGIONS]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reference = random.choice([0, 1, 2, 3, 7], shape, p=[0.7, 0.1, 0.1, 0.05, 0.05]).astype(np.uint8)
    if classes is REGIONS:
        probabilities = random.random((2, *shape))
    else:
        logits = random.normal(size=(3, *shape)) * draw(st.sampled_from([0.0, 1.0, 10.0]))
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=0)
    return reference, probabilities.astype(draw(st.sampled_from([np.float16, np.float32, np.float64]))), classes


def brute_bins(values: list[tuple[float, bool]], bins: int) -> list[list[float]]:
    found = [[0, 0.0, 0] for _ in range(bins)]
    for probability, true in values:
        entry = found[min(int(probability * bins), bins - 1)]
        entry[0] += 1
        entry[1] += probability
        entry[2] += true
    return found


def brute_errors(bins: list[list[float]]) -> tuple[float, float]:
    total = sum(count for count, _, _ in bins)
    gaps = [(count, abs(probability / count - true / count)) for count, probability, true in bins if count]
    return sum(count * gap for count, gap in gaps) / total, max(gap for _, gap in gaps)


def brute(
    case: Case, spacing: tuple[float, ...], margin_mm: float, bins: int, near_only: bool
) -> dict[str, float | int | None]:
    """Everything voxel by voxel, in plain Python."""
    reference, probabilities, classes = case
    values = [label.values for label in classes.labels]
    if len(probabilities) > len(values):
        values = [tuple({*range(10)} - {v for label in values for v in label}), *values]
    foreground = [v for v in np.ndindex(reference.shape) if reference[v] in classes.foreground_values]
    voxels = []
    for voxel in np.ndindex(reference.shape):
        near = any(
            all(abs(a - b) * s <= margin_mm + 1e-6 for a, b, s in zip(voxel, other, spacing, strict=True))
            for other in foreground
        )
        if reference[voxel] != classes.ignore_value and (near or not near_only):
            voxels.append(voxel)
    if not voxels:
        return {"voxels": 0, "brier": None, "class_ece": None, "ece": None, "mce": None}
    rows = [[float(p[v]) for p in probabilities] for v in voxels]
    truth = [[reference[v] in own for own in values] for v in voxels]
    brier = sum((p - t) ** 2 for row, true in zip(rows, truth, strict=True) for p, t in zip(row, true, strict=True))
    each = []
    for k in range(len(values)):
        pairs = [(row[k], true[k]) for row, true in zip(rows, truth, strict=True)]
        each.append(brute_errors(brute_bins(pairs, bins)))
    class_ece, mce = sum(ece for ece, _ in each) / len(each), max(worst for _, worst in each)
    ece = class_ece
    if len(values) > len(classes.labels):
        top = [(max(row), true[row.index(max(row))]) for row, true in zip(rows, truth, strict=True)]
        ece, mce = brute_errors(brute_bins(top, bins))
    return {"voxels": len(voxels), "brier": brier / len(voxels), "class_ece": class_ece, "ece": ece, "mce": mce}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), SPACINGS, st.sampled_from([0.0, 1.0, 2.5, 10.0]), st.sampled_from([1, 4, 15]))
@example((np.zeros((2, 3, 4), np.uint8), np.full((2, 2, 3, 4), 0.25), REGIONS), SPACING, 10.0, 15)
@example((np.full((2, 3, 4), 7, np.uint8), np.full((3, 2, 3, 4), 1 / 3), WITH_IGNORE), SPACING, 10.0, 15)
def test_calibration_equals_plain_python(
    case: Case, spacing: tuple[float, float, float], margin_mm: float, bins: int
) -> None:
    reference, probabilities, classes = case
    score = calibrate(reference, probabilities, spacing, classes, bins=bins, margin_mm=margin_mm)
    assert score.kind == ("sigmoid" if classes is REGIONS else "softmax")
    for area, near_only in ((score.whole, False), (score.near_foreground, True)):
        expected = brute(case, spacing, margin_mm, bins, near_only)
        for name, value in expected.items():
            assert getattr(area, name) == (None if value is None else pytest.approx(value, abs=1e-9)), name
    assert CalibrationScore.from_json(score.to_json()) == score


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_scores_of_halves_add_up_to_the_score_of_the_whole(case: Case) -> None:
    reference, probabilities, classes = case
    tiles = (np.tile(reference, (2, 1, 1)), np.tile(probabilities, (1, 2, 1, 1)))
    # With no margin a half knows of no foreground in the other.
    whole = calibrate(*tiles, SPACING, classes, margin_mm=0.0)
    half = calibrate(reference, probabilities, SPACING, classes, margin_mm=0.0)
    both = half + half
    for ours, theirs in ((both.whole, whole.whole), (both.near_foreground, whole.near_foreground)):
        assert ours.voxels == theirs.voxels
        for name in ("ece", "mce", "class_ece", "brier"):
            expected = getattr(theirs, name)
            assert getattr(ours, name) == (None if expected is None else pytest.approx(expected, abs=1e-9))
    assert both.near_foreground.ece == (
        None if half.near_foreground.ece is None else pytest.approx(half.near_foreground.ece)
    )


def test_a_model_that_is_right_as_often_as_it_says_has_no_error() -> None:
    reference = np.zeros((4, 5, 10), np.uint8)
    reference[..., :7] = 1
    tumour = np.full(reference.shape, 0.7)
    score = calibrate(reference, np.stack([1 - tumour, tumour]), SPACING, ClassSet.of_mapping({"tumour": 1}))
    assert score.whole.ece == pytest.approx(0, abs=1e-12)
    assert score.whole.mce == pytest.approx(0, abs=1e-12)
    assert score.whole.class_brier("tumour") == pytest.approx(0.7 * 0.09 + 0.3 * 0.49)
    assert score.whole.brier == pytest.approx(2 * (0.7 * 0.09 + 0.3 * 0.49))
    assert score.whole.top is not None
    assert score.whole.top.curve == ((pytest.approx(0.7), pytest.approx(0.7), 200),)


def test_background_hides_a_bad_model_over_the_whole_and_not_near_the_foreground() -> None:
    reference = np.zeros((40, 50, 45), np.uint8)
    reference[18:22, 20:25, 20:24] = 1
    tumour = np.where(np.indices(reference.shape)[0] // 2 % 2, 0.0, 0.0)
    tumour[17:23, 19:26, 19:25] = 0.95
    score = calibrate(
        reference, np.stack([1 - tumour, tumour]), (1.0, 1.0, 1.0), ClassSet.of_mapping({"tumour": 1}), margin_mm=2.0
    )
    assert score.whole.ece is not None
    assert score.near_foreground.ece is not None
    assert score.whole.ece < 0.002
    assert score.near_foreground.ece > 0.2
    assert score.near_foreground.voxels == 8 * 9 * 8


def test_the_border_between_bins_belongs_to_the_upper_one_and_one_to_the_last() -> None:
    probability = np.array([0.0, 0.25, 0.5, 0.75, 1.0]).reshape(1, 1, 1, 5)
    score = calibrate(np.ones((1, 1, 5), int), probability, SPACING, ClassSet.of_mapping({"tumour": 1}), bins=4)
    assert score.whole.classes["tumour"].voxels == (1, 1, 1, 2)


def test_equal_probabilities_are_decided_for_the_first_class() -> None:
    reference = np.array([[[0, 1, 2]]])
    score = calibrate(reference, np.full((3, 1, 1, 3), 1 / 3, np.float32), SPACING, CLASSES)
    assert score.whole.top is not None
    assert sum(score.whole.top.true) == 1


def one(reference: np.ndarray, probabilities: np.ndarray, classes: ClassSet = CLASSES, **options: float) -> None:
    calibrate(reference, probabilities, SPACING, classes, **options)  # type: ignore[arg-type]


LABELS = np.zeros((2, 3, 4), np.uint8)
SHARES = np.full((3, 2, 3, 4), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LABELS, SHARES[:1]), {}, "1 outputs for 2 classes"),
        ((LABELS, SHARES, REGIONS), {}, "share a label value"),
        ((LABELS, SHARES[..., :3]), {}, "the reference's shape"),
        ((LABELS, SHARES.astype(int)), {}, "expected floats"),
        ((LABELS, SHARES * 6), {}, "not logits"),
        ((LABELS, SHARES - 1), {}, "not logits"),
        ((LABELS, SHARES * np.nan), {}, "not logits"),
        ((LABELS.astype(float), SHARES), {}, "label map of integers"),
        ((LABELS.astype(int) - 1, SHARES), {}, "label values lie between"),
        ((LABELS, SHARES), {"bins": 0}, "at least 1 bin"),
        ((LABELS, SHARES), {"margin_mm": -1.0}, "margin of 0 or more"),
        ((LABELS, SHARES), {"margin_mm": float("nan")}, "margin of 0 or more"),
    ],
)
def test_what_is_no_calibration_is_refused(
    arguments: tuple[np.ndarray, np.ndarray], options: dict[str, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        one(*arguments, **options)


def test_scores_of_other_settings_are_not_added_up() -> None:
    score = calibrate(LABELS, SHARES, SPACING, CLASSES)
    for other in (
        calibrate(LABELS, SHARES, SPACING, CLASSES, bins=5),
        calibrate(LABELS, SHARES, SPACING, CLASSES, margin_mm=3.0),
        calibrate(LABELS, SHARES[:2], SPACING, CLASSES),
        calibrate(LABELS, SHARES, SPACING, ClassSet.of_mapping({"a": 2, "b": 1})),
    ):
        with pytest.raises(DataError, match="can't be added up"):
            score + other


def test_bins_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValidationError, match="one value per bin"):
        ReliabilityBins(voxels=(1, 2), probability_sums=(0.5,), true=(1, 1))


def test_without_voxels_nothing_is_defined() -> None:
    empty = calibrate(LABELS, SHARES, SPACING, CLASSES).near_foreground
    assert isinstance(empty, CalibrationCounts)
    assert empty.voxels == 0
    for name in ("ece", "mce", "class_ece", "brier"):
        assert getattr(empty, name) is None
    assert empty.class_brier("liver") is None


def test_the_order_of_axes_changes_nothing() -> None:
    random = np.random.default_rng(3)
    reference = (random.random((6, 7, 5)) < 0.03).astype(np.uint8)
    tumour = random.random(reference.shape).astype(np.float16)
    classes = ClassSet.of_mapping({"tumour": 1})
    found = [
        calibrate(reference.transpose(order), tumour[None].transpose(0, *(a + 1 for a in order)), spacing, classes)
        for order in itertools.permutations(range(3))
        for spacing in [tuple(SPACING[axis] for axis in order)]
    ]
    for score in found[1:]:
        assert score.near_foreground.voxels == found[0].near_foreground.voxels
        assert score.near_foreground.ece == pytest.approx(found[0].near_foreground.ece, abs=1e-12)
