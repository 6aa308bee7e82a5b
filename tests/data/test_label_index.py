from __future__ import annotations

import numpy as np
import pytest
from small_scans import spec_of

from sagittal.data.label_index import label_index
from sagittal.errors import DataError
from sagittal.plan import DatasetSpec, Label

BRATS = DatasetSpec(
    name="tumours",
    channel_names=("T1",),
    labels=(
        Label(name="whole", values=(1, 2, 4)),
        Label(name="core", values=(2, 4)),
        Label(name="enhancing", values=(4,)),
    ),
    ignore_value=9,
    regions_class_order=(2, 1, 4),
    file_ending=".nii.gz",
)


def test_values_become_consecutive_indices_and_the_ignore_value_the_last():
    index = label_index(spec_of("a", "b", values=(7, 300), ignore=65535))
    labels = np.array([[[0, 7], [300, 65535]]], np.uint16)
    encoded = index.encode(labels)
    assert encoded.tolist() == [[[0, 1], [2, 3]]]
    assert encoded.dtype == np.uint8
    assert (index.num_indices, index.ignore_index) == (3, 3)
    assert index.membership.tolist() == np.eye(3, dtype=bool).tolist()


def test_without_an_ignore_value_there_is_no_ignore_index():
    assert label_index(spec_of("a")).ignore_index is None


def test_regions_are_unions_of_indices():
    index = label_index(BRATS)
    assert index.values == (0, 1, 2, 4)
    assert index.ignore_index == 4
    assert index.membership.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_classes_are_decoded_by_the_largest_output():
    index = label_index(spec_of("a", "b", values=(7, 300)))
    logits = np.array([[0.0, -1, 2], [1, -2, 0], [0, 3, 1]], np.float32).reshape(3, 1, 1, 3)
    decoded = index.decode(logits)
    assert decoded.ravel().tolist() == [7, 300, 0]
    assert decoded.dtype == np.uint16


def test_regions_are_written_in_order_later_over_earlier():
    index = label_index(BRATS)
    logits = np.array([[-1.0, 1, 1, 1], [1, -1, 1, 1], [-1, -1, -1, 1]], np.float32).reshape(3, 1, 2, 2)
    assert index.decode(logits).ravel().tolist() == [1, 2, 1, 4]
    assert index.values_of_classes().tolist() == [2, 1, 4]


def test_encode_and_decode_are_inverse_for_classes():
    index = label_index(spec_of("a", "b", "c", values=(3, 5, 200)))
    labels = np.random.default_rng(0).choice(np.array([0, 3, 5, 200], np.uint8), (3, 5, 4))
    onehot = np.stack([index.encode(labels) == i for i in range(index.num_indices)]).astype(np.float32)
    np.testing.assert_array_equal(index.decode(onehot), labels)


@pytest.mark.parametrize("count", [253, 254, 300])
def test_many_labels_need_wider_indices(count):
    index = label_index(spec_of(*(f"label {i}" for i in range(count)), ignore=count + 1))
    labels = np.arange(count + 2, dtype=np.int32).reshape(1, 1, -1)
    encoded = index.encode(labels)
    np.testing.assert_array_equal(encoded, labels)
    assert encoded.dtype == (np.uint8 if count < 254 else np.uint16)


@pytest.mark.parametrize("value", [2, 65535, 70000, -1])
def test_an_undeclared_value_is_refused_with_its_place(value):
    labels = np.zeros((2, 3, 4), np.int32)
    labels[1, 2, 3] = value
    with pytest.raises(DataError, match=r"case_1\.nii\.gz: label values .* in 1 voxels; .* \[0, 1\]") as caught:
        label_index(spec_of("a")).encode(labels, source="case_1.nii.gz")
    assert caught.value.code == "undeclared_label"


def test_predictions_hold_the_values_from_before_the_repair_and_training_those_of_the_files():
    spec = spec_of("a", "b", values=(1, 2)).replace(label_map=((2, 70000),))
    index = label_index(spec)
    assert index.values == (0, 1, 2)
    assert index.values_of_classes().tolist() == [0, 1, 70000]
    assert index.values_of_classes().dtype == np.int32
    assert index.encode(np.array([[[0, 1, 2]]], np.uint8)).tolist() == [[[0, 1, 2]]]
