from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_network import scan_of, tiny_plan

from sagittal.data.preprocessing import frame_of
from sagittal.inference.engines.engine import LinearHead, NetworkMemory
from sagittal.inference.predictor import Predictor
from sagittal.inference.uncertainty import (
    FIXED_THRESHOLD,
    Disagreement,
    EntropyMap,
    class_entropy,
    quality_flags,
    quality_of,
    region_entropy,
    threshold_of,
    votes_of,
)
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume

REGIONS = DatasetSpec(
    name="r",
    channel_names=("a",),
    labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
    regions_class_order=(1, 2),
    file_ending=".nii",
)


def pairwise_dice(masks: Any, weight: Any) -> float | None:
    shared = sizes = 0.0
    for first, second in combinations(masks, 2):
        shared += 2 * float((weight * (first & second)).sum())
        sizes += float((weight * first).sum() + (weight * second).sum())
    return shared / sizes if sizes else None


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), members=st.integers(2, 5), has_regions=st.booleans(), cut=st.integers(1, 3))
def test_agreement_is_the_dice_over_all_pairs_however_the_windows_are_cut(
    seed: int, members: int, has_regions: bool, cut: int
) -> None:
    rng = np.random.default_rng(seed)
    spec = REGIONS if has_regions else untrained_spec(3)
    logits = rng.normal(size=(members, spec.num_outputs, 4, 3, 5)).astype(np.float32)
    weight = rng.uniform(0.1, 1, (4, 3, 5)).astype(np.float32)
    disagreement = Disagreement(spec)
    disagreement.look(logits[:, :, :cut], weight[:cut])
    disagreement.look(logits[:, :, cut:], weight[cut:])
    choices = logits.argmax(axis=1)
    masks = [logits[:, k] > 0 for k in range(2)] if has_regions else [choices == k for k in (1, 2)]
    expected = {label.name: pairwise_dice(mask, weight) for label, mask in zip(spec.labels, masks, strict=True)}
    found = disagreement.agreement()
    assert found == pytest.approx({name: value for name, value in expected.items() if value is not None})


def test_one_member_tells_nothing_and_equal_ones_agree() -> None:
    spec, weight = untrained_spec(3), np.ones((2, 3, 4), np.float32)
    logits = np.zeros((1, 3, 2, 3, 4), np.float32)
    logits[0, 2, 0] = 1
    alone, together = Disagreement(spec), Disagreement(spec)
    alone.look(logits, weight)
    together.look(np.repeat(logits, 8, axis=0), weight)
    assert alone.agreement() == {} and together.agreement() == {"class_2": 1.0}


def test_a_case_is_flagged_below_the_threshold_and_where_nothing_was_found() -> None:
    disagreement = Disagreement(untrained_spec(3))
    assert [flag.code for flag in quality_flags(quality_of(disagreement, 0.5, "told"))] == ["nothing_found"]
    logits = np.zeros((2, 3, 1, 1, 4), np.float32)
    logits[0, 1, 0, 0, :2] = logits[1, 1, 0, 0, 1:3] = logits[:, 2, 0, 0, 3] = 1
    disagreement.look(logits, np.ones((1, 1, 4), np.float32))
    good, bad = quality_of(disagreement, 0.7, "told"), quality_of(disagreement, 0.8, "told")
    assert good.agreement == 0.75 and quality_flags(good) == ()
    (flag,) = quality_flags(bad)
    assert flag.code == "quality" and "class_1 (0.500)" in flag.message and "told" in flag.message


def test_the_threshold_is_what_one_in_twenty_validated_cases_fell_short_of() -> None:
    cases = {f"{number:02d}": {"a": number / 100, "b": None} for number in range(21)}
    threshold, told = threshold_of({"folds": {"0": {"cases": cases}, "1": {"cases": {}}}})
    assert threshold == pytest.approx(0.01) and "21 validated cases" in told
    few = {"folds": {"0": {"cases": {"x": {"a": 0.3}}}}}
    assert threshold_of({})[0] == threshold_of(few)[0] == FIXED_THRESHOLD


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), classes=st.integers(2, 7), size=st.floats(0.1, 200))
def test_entropy_is_that_of_the_definition(seed: int, classes: int, size: float) -> None:
    logits = (np.random.default_rng(seed).normal(size=(classes, 6)) * size).astype(np.float32)
    exact = logits.astype(np.float64)
    shares = np.exp(exact - exact.max(axis=0))
    shares /= shares.sum(axis=0)
    logs = np.log(np.where(shares > 0, shares, 1))
    np.testing.assert_allclose(class_entropy(logits), -(shares * logs).sum(axis=0) / np.log(classes), atol=1e-5)
    p = 1 / (1 + np.exp(-np.clip(exact, -700, 700)))
    bits = -(p * np.log2(np.where(p > 0, p, 1)) + (1 - p) * np.log2(np.where(p < 1, 1 - p, 1)))
    np.testing.assert_allclose(region_entropy(logits), bits.max(axis=0), atol=1e-5)


def test_ends_of_the_scale() -> None:
    assert class_entropy(np.zeros((5, 2), np.float32)) == pytest.approx(1)
    assert region_entropy(np.array([[0.0], [50.0]], np.float32)) == pytest.approx(1)
    assert class_entropy(np.array([[90.0], [0.0]], np.float32)) == pytest.approx(0, abs=1e-6)
    assert class_entropy(np.zeros((1, 2), np.float32)).tolist() == [0, 0]


@pytest.mark.parametrize("spec", [untrained_spec(3), REGIONS], ids=["classes", "regions"])
def test_the_map_lies_on_the_scans_grid_whatever_its_axes(spec: DatasetSpec) -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((1, 6, 7, 8), np.float32)
    array[0, 1:5, 2:6, 3:7] = 1
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    scan = Volume(array, affine)
    plan = tiny_plan(spec, **{"preprocessing.crop_to_nonzero": True})
    frame = frame_of(scan, plan.preprocessing)
    stored = rng.normal(size=(spec.num_outputs, 6, 7, 8)).astype(np.float32)
    logits = np.stack([frame.crop(one) for one in stored])
    entropy = EntropyMap(spec, frame)
    for start in range(0, logits.shape[1], 3):
        entropy(slice(start, min(start + 3, logits.shape[1])), logits[:, start : start + 3])
    expected = np.where(array[0] > 0, (region_entropy if spec.has_regions else class_entropy)(stored), 0)
    np.testing.assert_allclose(entropy.on_grid(), expected, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("rows", [None, (2, 0, 1)])
def test_a_head_and_labels_that_change_places_are_followed(has_regions: bool, rows: tuple[int, ...] | None) -> None:
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=3).astype(np.float32))
    features = rng.normal(size=(4, 13, 14, 15)).astype(np.float32)
    logits = np.einsum("kf,fdhw->kdhw", head.weight, features) + head.bias[:, None, None, None]
    logits = logits[list(rows or range(3))]
    found = votes_of(features, head, rows, has_regions=has_regions)
    np.testing.assert_array_equal(found, logits > 0 if has_regions else logits.argmax(axis=0))
    np.testing.assert_array_equal(votes_of(logits, None, None, has_regions=has_regions), found)


class Leaning:
    """An engine whose logits lean to one side, so that mirrored copies disagree along that axis."""

    name, device, precision, num_outputs, head = "torch", "cpu", "fp32", 3, None

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def logits(self, windows: Any) -> Any:
        first = windows[:, :1] + self._strength * np.linspace(-1, 1, windows.shape[-1], dtype=np.float32)
        return np.concatenate([0.5 - first, first - 0.5, 2 * first - 2], axis=1).astype(np.float32)

    def features(self, windows: Any) -> Any:
        raise AssertionError("there is no head")

    def memory(self, window: Any) -> NetworkMemory:
        return NetworkMemory(0, 0)


def test_the_predictor_shows_what_mirrored_copies_decide() -> None:
    agreements = []
    scan = scan_of((20, 22, 24))
    for strength in (0.0, 0.3, 0.9):
        predictor = Predictor(tiny_plan(), Leaning(strength))
        disagreement = Disagreement(predictor.plan.dataset)
        labels = predictor.predict(scan, disagreement=disagreement)
        np.testing.assert_array_equal(labels.array, predictor.predict(scan).array)
        agreements.append(quality_of(disagreement, 0.5, "told").agreement)
    assert agreements[0] == 1.0 > agreements[1] > agreements[2] > 0
    unmirrored = Disagreement(predictor.plan.dataset)
    predictor.predict(scan, mirror=False, disagreement=unmirrored)
    assert not unmirrored.looked
