"""Normalisation per channel keeps float32's digits in the layout that networks use on a CPU."""

from __future__ import annotations

import pytest
import torch

from sagittal.kernels import TailWeights, expand_contract, normalise_channels


@pytest.mark.parametrize("sizes", [(96, 80), (40, 32, 24)])
def test_no_digits_are_lost_far_from_zero(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if len(sizes) == 2 else torch.channels_last_3d
    x = (torch.randn(2, 6, *sizes) + 10).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.rand(6) + 0.5, torch.randn(6)
    y = normalise_channels(x, weight, bias, 1e-5)
    along = torch.randn(y.shape)
    (gradient,) = torch.autograd.grad(y, x, along)

    exact = x.detach().double().requires_grad_()
    variance, mean = torch.var_mean(exact, dim=tuple(range(2, x.ndim)), correction=0, keepdim=True)
    column = (-1, *(1,) * len(sizes))
    expected = (exact - mean) / (variance + 1e-5).sqrt() * weight.double().view(column) + bias.double().view(column)
    (expected_gradient,) = torch.autograd.grad(expected, exact, along.double())
    for found, wanted in ((y, expected), (gradient, expected_gradient)):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_widths_that_the_compiled_kernels_do_not_take_are_as_exact() -> None:
    torch.manual_seed(0)
    h = (torch.randn(1, 6, 40, 32, 24) + 10).contiguous(memory_format=torch.channels_last_3d)
    shapes = ((6,), (6,), (12, 6), (12,), (6, 12), (6,))
    weights = [torch.randn(shape) for shape in shapes]
    y = expand_contract(h, TailWeights(*weights))
    exact = expand_contract(h.double(), TailWeights(*(weight.double() for weight in weights)))
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
