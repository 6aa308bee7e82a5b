from __future__ import annotations

import numpy as np
import pytest

from sagittal.errors import PlanError
from sagittal.inference.subset import chosen_spec, keep_only
from sagittal.plan import DatasetSpec, Label

ORGANS = DatasetSpec(
    name="organs",
    channel_names=("CT",),
    labels=tuple(Label(name=name, values=(value,)) for name, value in (("Spleen", 1), ("liver", 5), ("pancreas", 300))),
    label_map=((5, -7),),
    file_ending=".nii.gz",
)
TUMOUR = DatasetSpec(
    name="tumour",
    channel_names=("T1",),
    labels=(
        Label(name="whole", values=(1, 2, 3)),
        Label(name="core", values=(2, 3)),
        Label(name="active", values=(3,)),
    ),
    regions_class_order=(1, 2, 3),
    file_ending=".nii.gz",
)


def test_classes_stay_in_the_models_order_whatever_their_spelling() -> None:
    chosen = chosen_spec(ORGANS, ["LIVER", "spleen"])
    assert [label.name for label in chosen.labels] == ["Spleen", "liver"] and chosen.label_map == ((5, -7),)
    assert chosen_spec(ORGANS, ["pancreas"]).label_map == ()
    assert chosen_spec(ORGANS, []) == ORGANS


def test_other_classes_become_background() -> None:
    labels = np.array([[[0, 1, -7, 300]], [[300, -7, 1, 0]]], np.int16)
    keep_only(labels, chosen_spec(ORGANS, ["liver"]), ORGANS)
    assert labels.tolist() == [[[0, 0, -7, 0]], [[0, -7, 0, 0]]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["whole"], [0, 1, 2, 3]),
        (["core"], [0, 0, 2, 3]),
        (["active"], [0, 0, 0, 3]),
        (["active", "core"], [0, 0, 2, 3]),
    ],
)
def test_a_voxel_stays_that_lies_in_any_chosen_region(names: list[str], expected: list[int]) -> None:
    labels = np.array([[[0, 1, 2, 3]]], np.uint8)
    chosen = chosen_spec(TUMOUR, names)
    keep_only(labels, chosen, TUMOUR)
    assert labels.reshape(-1).tolist() == expected
    assert chosen.regions_class_order is not None and len(chosen.regions_class_order) == len(chosen.labels)


def test_all_classes_leave_the_labels_alone() -> None:
    labels = np.array([[[9]]], np.uint8)
    keep_only(labels, chosen_spec(ORGANS, ["spleen", "liver", "pancreas"]), ORGANS)
    assert labels.item() == 9


def test_an_unknown_name_is_told_with_the_closest() -> None:
    with pytest.raises(PlanError, match="Did you mean 'pancreas'") as caught:
        chosen_spec(ORGANS, ["liver", "pancras"])
    assert caught.value.code == "unknown_class"


@pytest.mark.parametrize("name", ["SPLEN", "splen", "Splen"])
def test_the_closest_is_told_as_the_model_spells_it(name: str) -> None:
    with pytest.raises(PlanError, match=f"--subset {name}: .* Did you mean 'Spleen'"):
        chosen_spec(ORGANS, [name])


def test_a_name_unlike_any_is_told_with_all() -> None:
    with pytest.raises(PlanError, match="Known: Spleen, liver, pancreas"):
        chosen_spec(ORGANS, ["xyz"])


def test_classes_that_differ_in_case_alone_are_told_apart() -> None:
    veins = tuple(Label(name=name, values=(value,)) for name, value in (("vein", 1), ("Vein", 2)))
    spec = ORGANS.replace(labels=veins, label_map=())
    assert [label.values for label in chosen_spec(spec, ["Vein"]).labels] == [(2,)]
    with pytest.raises(PlanError, match="It has vein and Vein: write one of them"):
        chosen_spec(spec, ["VEIN"])
