from __future__ import annotations

import numpy as np
import pytest
import torch

from sagittal.data.device_resampling import multiply_axes_on, products_on
from sagittal.data.resampling import as_float32, multiply_axes, resample_channel


@pytest.mark.parametrize("shape", [(7, 20, 9), (22, 28, 5), (150, 9, 18)])
@pytest.mark.parametrize("apart", [None, 0, 2])
def test_torch_resamples_as_numpy_does(shape, apart):
    channel = np.random.default_rng(0).normal(size=(11, 140, 9)).astype(np.float32)
    with_numpy, with_torch = np.empty(shape, np.float32), np.empty(shape, np.float32)
    resample_channel(channel, with_numpy, as_float32, apart=apart)
    used = []

    def products(values, matrices):
        used.extend(axis for axis, _ in matrices)
        return multiply_axes_on(torch.device("cpu"), values, matrices)

    resample_channel(channel, with_torch, as_float32, apart=apart, products=products)
    np.testing.assert_allclose(with_torch, with_numpy, atol=5e-6)
    assert {0, 1, 2} - {apart} - set(used) <= {axis for axis in range(3) if channel.shape[axis] == shape[axis]}


def test_the_cpu_takes_numpy_and_other_devices_torch():
    assert products_on("cpu") is multiply_axes
    assert products_on(torch.device("cpu")) is multiply_axes
    assert products_on("meta") is not multiply_axes
