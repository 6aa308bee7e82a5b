"""Rules on label maps against slow, obvious implementations, in any order of axes."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sagittal.inference.postprocessing import apply, postprocess, target_of
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume

CLASSES = untrained_spec(4)
REGIONS = DatasetSpec(
    name="tumours",
    channel_names=("T1",),
    labels=(
        Label(name="whole", values=(1, 2, 3)),
        Label(name="core", values=(2, 3)),
        Label(name="enhancing", values=(3,)),
    ),
    regions_class_order=(1, 2, 3),
    file_ending=".nii.gz",
)
MM = (2.0, 1.5, 0.5)
VOXEL_ML = 0.0015


def _random_map(seed: int, values: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (9, 13, 11)), 0.8)
    edges = np.quantile(noise, np.linspace(0.45, 1, values)[:-1])
    return np.digitize(noise, edges).astype(np.uint8)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    ids, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return [ids == number for number in range(1, count + 1)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_classes_are_treated_as_a_slow_way_does(seed: int) -> None:
    labels = _random_map(seed)
    kept = labels.copy()
    parts = _components(labels == 2)
    for part in parts:
        if part.sum() < max(other.sum() for other in parts):
            kept[part] = 0
    found = apply(labels, (LargestComponent(labels=("class_2",)),), MM, CLASSES)
    np.testing.assert_array_equal(found, kept)

    small = labels.copy()
    for part in _components(labels == 1):
        if part.sum() < 5:
            small[part] = 0
    found = apply(labels, (MinimumVolume(label="class_1", volume_ml=5 * VOXEL_ML),), MM, CLASSES)
    np.testing.assert_array_equal(found, small)

    filled = labels.copy()
    filled[ndimage.binary_fill_holes(labels == 1) & (labels == 0)] = 1
    np.testing.assert_array_equal(apply(labels, (FillHoles(label="class_1"),), MM, CLASSES), filled)

    alone = labels.copy()
    parts = _components(labels > 0)
    for part in parts:
        if part.sum() < max(other.sum() for other in parts):
            alone[part] = 0
    np.testing.assert_array_equal(apply(labels, (LargestComponent(),), MM, CLASSES), alone)


RULES = (
    LargestComponent(),
    LargestComponent(labels=("class_2",)),
    MinimumVolume(label="class_1", volume_ml=4 * VOXEL_ML),
    FillHoles(label="class_3"),
)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_order_of_axes_gives_the_same(order: tuple[int, ...]) -> None:
    labels = _random_map(3)
    wanted = apply(labels, RULES, MM, CLASSES)
    assert (wanted != labels).any()
    turned_mm = tuple(MM[axis] for axis in order)
    for signs in product((1, -1), repeat=3):
        turned = labels.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
        found = apply(turned, RULES, turned_mm, CLASSES)
        back = found[tuple(slice(None, None, sign) for sign in signs)].transpose(np.argsort(order))
        np.testing.assert_array_equal(back, wanted)


def test_equally_large_components_all_stay() -> None:
    labels = np.zeros((3, 4, 9), np.uint8)
    labels[1, 1, [0, 1, 4, 5, 8]] = 1
    found = apply(labels, (LargestComponent(labels=("class_1",)),), MM, CLASSES)
    assert found[1, 1].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0]


def test_a_hole_at_the_border_is_none_and_others_keep_theirs() -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[:, 1:6, 1:6] = 1
    labels[2, 2:5, 2:5] = 0
    labels[2, 3, 3] = 2
    labels[0, 2, 2] = 0
    found = apply(labels, (FillHoles(label="class_1"),), MM, CLASSES)
    assert found[2, 3, 3] == 2 and found[0, 2, 2] == 0
    assert (found == 1).sum() == (labels == 1).sum() + 8


def test_values_from_before_a_repair_are_kept() -> None:
    spec = CLASSES.replace(label_map=((2, -1000),))
    labels = _random_map(5).astype(np.int32)
    wanted = apply(labels, RULES, MM, CLASSES)
    labels[labels == 2], wanted[wanted == 2] = -1000, -1000
    found = apply(labels, RULES, MM, spec)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


def test_a_region_without_a_part_is_what_its_parent_is() -> None:
    labels = np.ones((5, 6, 12), np.uint8)
    labels[0] = 0
    labels[2, 2:4, 2:4], labels[2, 2:4, 8] = 3, 3
    labels[3, 2:4, 2:4], labels[3, 2, 8] = 2, 2
    core = apply(labels, (LargestComponent(labels=("core",)),), MM, REGIONS)
    assert (core[:, :, 8] == labels[:, :, 7]).all() and (core[:, :, :6] == labels[:, :, :6]).all()
    enhancing = apply(labels, (MinimumVolume(label="enhancing", volume_ml=3 * VOXEL_ML),), MM, REGIONS)
    assert enhancing[2, 2:4, 8].tolist() == [2, 2] and (enhancing[2, 2:4, 2:4] == 3).all()


def test_holes_of_a_region_take_what_only_its_parents_cover() -> None:
    labels = np.ones((7, 8, 9), np.uint8)
    labels[1:6, 1:7, 1:8] = 2
    labels[3, 3:5, 3:6] = 1
    labels[3, 3, 3] = 3
    found = apply(labels, (FillHoles(label="core"),), MM, REGIONS)
    assert found[3, 3, 3] == 3 and (found[3, 3:5, 3:6] == 2).sum() == 5
    assert (found[0] == 1).all()


def test_regions_that_cross_keep_what_the_other_has() -> None:
    crossing = REGIONS.replace(
        labels=(Label(name="a", values=(1, 2)), Label(name="b", values=(2, 3))), regions_class_order=(1, 3)
    )
    target = target_of(crossing, ("a",))
    assert target.removed == {1: 0, 2: 3} and target.fillable == (0,)


def test_nothing_is_done_without_rules_and_nothing_to_an_empty_map() -> None:
    labels = _random_map(1)
    assert apply(labels, (), MM, CLASSES) is labels
    before = labels.copy()
    apply(labels, RULES, MM, CLASSES)
    np.testing.assert_array_equal(labels, before)
    empty = np.zeros((2, 3, 4), np.uint16)
    assert not apply(empty, RULES, MM, CLASSES).any()


def test_a_volume_keeps_its_place_and_its_type() -> None:
    plan = untrained_plan("mednext-s", CLASSES).replace(postprocessing=RULES)
    volume = Volume(_random_map(2)[None], np.diag([0.5, 1.5, 2.0, 1.0])[[2, 1, 0, 3]].astype(float))
    found = postprocess(volume, plan)
    assert found.array.dtype == np.uint8 and np.array_equal(found.affine, volume.affine)
    np.testing.assert_array_equal(found.array[0], apply(volume.array[0], RULES, volume.spacing_mm, CLASSES))
    assert postprocess(volume, plan.replace(postprocessing=())) is volume
