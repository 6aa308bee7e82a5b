from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_dilation, generate_binary_structure
from scipy.spatial.distance import cdist

from sagittal.evaluation import ALL_METRICS, EvaluationSettings, MaskPair, Metric, metrics_of
from sagittal.evaluation.surface import surface

EVERY = metrics_of(EvaluationSettings(metrics=ALL_METRICS, class_tolerances_mm=(("a", 1.0),)))
FULL = np.zeros((5, 9, 9), bool)
FULL[1:4, 2:6, :6] = True
EMPTY = np.zeros_like(FULL)
SPACING = (2.0, 0.5, 1.0)

DISTANCES = ("hd_mm", "hd95_mm", "assd_mm")
EMPTY_REFERENCE = {"volume_error_ml": 0.072, "volume_error_percent": None}
EMPTY_PREDICTION = {"volume_error_ml": -0.072, "volume_error_percent": -100.0}


def value(key: str, reference: np.ndarray, prediction: np.ndarray) -> float | None:
    return EVERY[key].compute(
        MaskPair(reference=reference, prediction=prediction, spacing_mm=SPACING, image_shape=(9, 9, 9), name="a")
    )


@pytest.fixture(autouse=True)
def needs_its_package(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("key") == "cldice":
        pytest.importorskip("skimage", reason="clDice needs the extra [metrics]")
    yield


@pytest.mark.parametrize("metric", EVERY.values(), ids=EVERY.keys())
def test_every_metric_is_defined_in_words(metric: Metric) -> None:
    for text in (metric.definition, metric.empty_reference, metric.empty_prediction, metric.both_empty, metric.source):
        assert text.endswith(".")


@pytest.mark.parametrize("key", EVERY)
class TestContract:
    """What every metric must keep, whatever it measures."""

    def test_a_miss_has_its_worst_value(self, key: str) -> None:
        worst = np.hypot(np.hypot(18.0, 9.0), 4.5) if key in DISTANCES else 0.0
        assert value(key, FULL, EMPTY) == pytest.approx(EMPTY_PREDICTION.get(key, worst))

    def test_a_false_alarm_has_its_worst_value_unless_it_has_none(self, key: str) -> None:
        worst = np.hypot(np.hypot(18.0, 9.0), 4.5) if key in DISTANCES else 0.0
        expected = EMPTY_REFERENCE.get(key, worst)
        assert value(key, EMPTY, FULL) == (None if expected is None else pytest.approx(expected))
        assert (expected is None) == EVERY[key].empty_reference.startswith("Undefined")

    def test_absent_class_is_undefined(self, key: str) -> None:
        assert value(key, EMPTY, EMPTY) is None

    def test_perfect_beats_partial_beats_missed(self, key: str) -> None:
        partial = np.roll(FULL, 3, axis=2)
        partial[1] = False
        scores = [value(key, FULL, prediction) for prediction in (FULL, partial, EMPTY)]
        perfect, middle, missed = (abs(score) for score in scores if score is not None)
        if key == "cldice":
            # Two slabs beside each other: neither's middle lies in the other.
            assert (perfect, missed) == (1.0, 0.0)
        elif EVERY[key].higher_is_better:
            assert perfect == pytest.approx(1.0)
            assert perfect > middle > missed
        else:
            assert perfect == 0
            assert perfect < middle < missed

    def test_value_is_a_plain_number(self, key: str) -> None:
        assert type(value(key, FULL, FULL)) is float


def test_distances_of_a_miss_are_those_of_the_image_not_of_the_box() -> None:
    assert value("hd95_mm", FULL, EMPTY) == pytest.approx(np.hypot(np.hypot(18.0, 9.0), 4.5))


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
SPACINGS = st.tuples(*[st.sampled_from([0.4, 0.78, 1.0, 2.5, 5.0])] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    return draw(hnp.arrays(np.bool_, shape)), draw(hnp.arrays(np.bool_, shape))


def brute_force(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float | None]:
    """Every metric of two masks that both hold something, from all pairs of voxels and from counts as they are told."""
    both, either = (reference & prediction).sum(), (reference | prediction).sum()
    size = reference.size
    agree = (reference == prediction).sum() / size
    chance = (reference.sum() * prediction.sum() + (~reference).sum() * (~prediction).sum()) / size**2
    cube = generate_binary_structure(3, 1)
    # A surface voxel is one that the dilated outside reaches.
    outlines = [
        mask & binary_dilation(np.pad(~mask, 1, constant_values=True), cube)[1:-1, 1:-1, 1:-1]
        for mask in (reference, prediction)
    ]
    points = [np.argwhere(outline) * np.array(spacing) for outline in outlines]
    between = cdist(points[0], points[1])
    there, back = between.min(1), between.min(0)
    pooled = np.concatenate([there, back])
    return {
        "dice": 2 * both / (reference.sum() + prediction.sum()),
        "iou": both / either,
        "precision": both / prediction.sum(),
        "recall": both / reference.sum(),
        "volume_error_ml": (prediction.sum() - reference.sum()) * np.prod(spacing) / 1000,
        "volume_error_percent": 100 * (prediction.sum() / reference.sum() - 1),
        "kappa": 1.0 if chance == 1 else (agree - chance) / (1 - chance),
        "hd_mm": pooled.max(),
        "hd95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd_mm": pooled.mean(),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask_pairs(), SPACINGS)
@example((np.ones((3, 4, 5), bool), np.ones((3, 4, 5), bool)), (5.0, 0.78, 0.4))
def test_metrics_equal_brute_force(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    reference, prediction = masks
    if not reference.any() or not prediction.any():
        return
    pair = MaskPair(reference=reference, prediction=prediction, spacing_mm=spacing, image_shape=reference.shape)
    for key, expected in brute_force(reference, prediction, spacing).items():
        assert EVERY[key].compute(pair) == pytest.approx(expected, rel=1e-9, abs=1e-9), key


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mask_pairs(), SPACINGS, st.sampled_from([0.45, 0.9, 1.7, 3.3]))
def test_nsd_equals_brute_force(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float], tolerance: float
) -> None:
    if not masks[0].any() or not masks[1].any():
        return
    pair = MaskPair(reference=masks[0], prediction=masks[1], spacing_mm=spacing, image_shape=masks[0].shape)
    (metric,) = metrics_of(EvaluationSettings(metrics=("nsd",), tolerances_mm=(tolerance,))).values()
    points = [np.argwhere(surface(mask)) * np.array(spacing) for mask in masks]
    between = cdist(*points)
    within = (between.min(1) <= tolerance).sum() + (between.min(0) <= tolerance).sum()
    assert metric.compute(pair) == pytest.approx(within / sum(between.shape), abs=1e-12)


def test_ignored_voxels_are_no_agreement() -> None:
    # Where 1 of 12 voxels of 4 x 3 is wrong, kappa is lower the fewer voxels count.
    reference, prediction = np.zeros((1, 4, 3), bool), np.zeros((1, 4, 3), bool)
    reference[0, 0], prediction[0, 0, :2] = True, True
    scores = []
    for ignored in (0, 6):
        pair = MaskPair(reference, prediction, SPACING, image_shape=(1, 4, 3), ignored_vox=ignored)
        scores.append(EVERY["kappa"].compute(pair))
    # 12 voxels: 11 agree; by chance (3 * 2 + 9 * 10) / 144. 6 voxels: 5 agree; by chance (3 * 2 + 3 * 4) / 36.
    assert scores == pytest.approx([(11 / 12 - 96 / 144) / (1 - 96 / 144), (5 / 6 - 0.5) / 0.5])


def test_what_metrics_share_is_computed_once() -> None:
    pair = MaskPair(FULL, FULL, SPACING, image_shape=FULL.shape)
    made: list[MaskPair] = []

    def count(given: MaskPair) -> int:
        made.append(given)
        return len(made)

    assert [pair.once(count), pair.once(count)] == [1, 1]
    assert pair.distances is pair.distances
    assert pair.surfels is pair.surfels
