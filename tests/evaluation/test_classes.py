from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation import ClassSet
from sagittal.evaluation.classes import present_values
from sagittal.plan.dataset import DatasetSpec, Label


def test_labels_of_a_dataset_json_become_classes_regions_and_ignore() -> None:
    classes = ClassSet.of_mapping({"background": 0, "whole": [2, 1], "core": (2,), "ignore": 3})
    assert classes.labels == (Label(name="whole", values=(1, 2)), Label(name="core", values=(2,)))
    assert classes.ignore_value == 3
    assert classes.names == ("whole", "core")
    assert classes.declared_values == {0, 1, 2, 3}


def test_spec_of_a_data_set_gives_the_same_classes() -> None:
    spec = DatasetSpec(
        name="x",
        channel_names=("CT",),
        labels=(Label(name="a", values=(1,)), Label(name="b", values=(2,))),
        ignore_value=3,
        file_ending=".nii.gz",
    )
    assert ClassSet.of_spec(spec) == ClassSet.of_mapping({"a": 1, "b": 2, "ignore": 3})


def test_values_become_their_own_names() -> None:
    assert ClassSet.of_values([3, 0, 1]) == ClassSet.of_mapping({"1": 1, "3": 3})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": "1"}, "'a' has the value '1'; expected an integer"),
        ({"a": 1.0}, "expected an integer"),
        ({"a": True}, "expected an integer"),
        ({"a": []}, "expected an integer"),
        ({"a": 0}, "between 1 and 65535"),
        ({"background": 0, "ignore": 2}, "no foreground label"),
        ({"a": 1, "ignore": 1}, "ignore value 1 is also"),
    ],
)
def test_labels_that_make_no_sense_are_refused(labels: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ClassSet.of_mapping(labels, source="dataset.json")
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_present_values(dtype: type) -> None:
    labels = np.zeros((2, 3, 4), dtype)
    labels[0, 0, 0], labels[1, 2, 3] = 7, 200
    assert present_values(labels) == (0, 7, 200)


def test_values_out_of_range_are_counted_by_others_and_the_map_is_kept() -> None:
    classes = ClassSet.of_mapping({"background": 0, "a": 100000, "b": [1, -3], "ignore": -1})
    assert [label.values for label in classes.labels] == [(65533,), (1, 65535)]
    assert classes.ignore_value == 65534
    labels = np.array([[[0, 1, -3, -1, 100000, 5]]], np.int32)
    assert classes.in_own_values(labels).tolist() == [[[0, 1, 65535, 65534, 65533, 5]]]


def test_a_label_map_applies_where_a_map_holds_the_original_values_and_only_there() -> None:
    classes = ClassSet.of_mapping({"a": 1, "b": 2}, label_map={"2": -7})
    stored = np.array([[[0, 1, 2]]], np.uint8)
    assert classes.in_own_values(stored) is stored
    assert classes.in_own_values(np.array([[[0, 1, -7]]], np.int8)).tolist() == stored.tolist()
    assert ClassSet.from_json(classes.to_json()) == classes
