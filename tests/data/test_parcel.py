from __future__ import annotations

import numpy as np
import pytest
import torch

from sagittal.data.parcel import Parcel


def test_everything_arrives_in_its_shape_and_in_one_piece() -> None:
    parcel = Parcel()
    row, table, nothing = parcel.put([1.5, -2.0]), parcel.put(np.arange(6).reshape(2, 3)), parcel.put([])
    many = parcel.put([np.array([7.0]), np.array([2.0**24 - 1])])
    parcel.send(torch.device("cpu"))
    assert parcel.numbers(row).tolist() == [1.5, -2.0]
    assert parcel.indices(table).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parcel.numbers(nothing).shape == (0,)
    assert parcel.indices(many).tolist() == [[7], [2**24 - 1]]
    assert (parcel.numbers(row).dtype, parcel.indices(row).dtype) == (torch.float32, torch.int64)
    assert parcel.numbers(row).untyped_storage().data_ptr() == parcel.numbers(table).untyped_storage().data_ptr()


def test_an_empty_parcel_may_be_sent() -> None:
    parcel = Parcel()
    place = parcel.put([])
    parcel.send(torch.device("cpu"))
    assert parcel.indices(place).numel() == 0


def test_nothing_is_put_in_after_sending_or_taken_out_before() -> None:
    parcel = Parcel()
    place = parcel.put([1.0])
    with pytest.raises(AssertionError, match="has not been sent"):
        parcel.numbers(place)
    with pytest.raises(AssertionError, match="has not been sent"):
        parcel.indices(place)
    parcel.send(torch.device("cpu"))
    with pytest.raises(AssertionError, match="has been sent"):
        parcel.put([2.0])
