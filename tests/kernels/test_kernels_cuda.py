"""Depthwise convolutions on a GPU in half precision: the CPU's numbers within rounding, in the input's dtype."""

from __future__ import annotations

import pytest
import torch

from sagittal.kernels import depthwise_conv, depthwise_conv_transpose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("convolve", [depthwise_conv, depthwise_conv_transpose])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_precision_gives_the_cpus_numbers(convolve: object, dtype: torch.dtype, autocast: bool) -> None:
    assert callable(convolve)
    x, weight, bias = torch.randn(2, 16, 5, 7, 4), torch.randn(16, 1, 3, 3, 3), torch.randn(16)
    expected = convolve(x, weight, bias)
    parameters = [weight.cuda(), bias.cuda()] if autocast else [weight.cuda().to(dtype), bias.cuda().to(dtype)]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        y = convolve(x.cuda().to(dtype), *parameters)
    assert autocast or y.dtype == dtype
    assert (y.cpu().float() - expected).abs().max() < 0.03 * expected.abs().max()
