from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.volumes.stored import Stored, smallest_label_type


def stored(values: list[float], dtype=np.float32, slope: float = 1.0, intercept: float = 0.0) -> Stored:
    voxels = np.array(values, dtype=dtype).reshape(1, 1, -1)
    return Stored(Path("case.nii"), voxels, np.eye(4), slope, intercept)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 1, 255], np.uint8),
        ([0, 256], np.uint16),
        ([-1, 3], np.int16),
        ([-1, 70000], np.int32),
        ([0, 5e9], np.int64),
    ],
)
def test_whole_floats_become_the_smallest_label_type(values, dtype):
    labels = stored(values, np.float64).labels()
    assert labels.dtype == dtype
    assert labels.ravel().tolist() == values


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, -np.inf, 1e30])
def test_values_that_are_no_labels_are_counted_and_listed(value):
    with pytest.raises(DataError, match=r"case.nii: 2 voxels are not whole numbers \(for example") as caught:
        stored([0, value, 1, value]).labels()
    assert caught.value.code == "non_integer_label"


def test_a_scale_that_keeps_whole_numbers_is_a_label_map_still():
    labels = stored([0, 1, 2], np.int16, slope=2.0, intercept=1.0).labels()
    assert labels.dtype == np.uint8
    assert labels.ravel().tolist() == [1, 3, 5]


def test_integers_keep_their_type_and_images_are_float32():
    assert stored([0, 1], np.int32).labels().dtype == np.int32
    assert stored([0, 1], np.float64).image().dtype == np.float32
    assert np.isinf(stored([1e300], np.float64).image()).all()


def test_the_smallest_type_exists_for_every_exact_float():
    assert smallest_label_type(-(2.0**53), 2.0**53) is np.int64
    with pytest.raises(AssertionError, match="no integer type"):
        smallest_label_type(0, 1e300)
