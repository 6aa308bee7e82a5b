"""Kernels and strides that differ between the axes, against PyTorch's own convolutions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks.depthwise_axes import _by_plane, depthwise, depthwise_transpose, pad_front, per_axis, strided

CASES = [
    ((3, 3, 3), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2)),
    ((1, 3, 3), (1, 1, 1)),
    ((1, 5, 5), (1, 2, 2)),
    ((1, 3, 1), (1, 2, 1)),
    ((3, 1, 3), (2, 1, 2)),
    ((3, 3, 3), (1, 2, 2)),
    ((1, 1, 3), (1, 1, 2)),
    ((3, 1), (2, 1)),
    ((5, 5), (2, 2)),
    ((3, 3), (1, 2)),
]


@pytest.mark.parametrize(("sizes", "strides"), CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_a_convolution_in_float64(sizes: tuple[int, ...], strides: tuple[int, ...], transposed: bool) -> None:
    # 32 channels in float32 are what the compiled kernels take.
    torch.manual_seed(0)
    module = {
        (2, False): nn.Conv2d,
        (3, False): nn.Conv3d,
        (2, True): nn.ConvTranspose2d,
        (3, True): nn.ConvTranspose3d,
    }[len(sizes), transposed]
    exact = module(32, 32, sizes, stride=strides, padding=tuple(size // 2 for size in sizes), groups=32).double()
    convolve = depthwise_transpose if transposed else depthwise
    image = torch.randn(2, 32, *(4, 7, 6)[-len(sizes) :], dtype=torch.float64, requires_grad=True)
    expected = exact(image)
    slopes = torch.randn_like(expected)
    expected.backward(slopes)
    layouts = [torch.contiguous_format, torch.channels_last_3d if len(sizes) == 3 else torch.channels_last]
    for layout in layouts:
        x = image.detach().float().contiguous(memory_format=layout).requires_grad_()
        weight, bias = (parameter.detach().float().requires_grad_() for parameter in (exact.weight, exact.bias))
        y = convolve(x, weight, bias, strides)
        y.backward(slopes.float())
        for ours, true in (
            (y, expected),
            (x.grad, image.grad),
            (weight.grad, exact.weight.grad),
            (bias.grad, exact.bias.grad),
        ):
            assert ours.shape == true.shape
            assert (ours - true).abs().max() < 1e-5 * true.abs().max()


def test_planes_are_convolved_where_they_lie() -> None:
    x = torch.randn(2, 16, 3, 6, 8).contiguous(memory_format=torch.channels_last_3d)
    seen: list[int] = []

    def note(planes: Tensor) -> Tensor:
        seen.append(planes.data_ptr())
        return planes

    y = _by_plane(x, note)
    assert seen == [x.data_ptr()]
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)


def test_strided_is_a_view_that_starts_late_on_strided_axes_only() -> None:
    x = torch.arange(2 * 3 * 4.0).reshape(1, 1, 2, 3, 4)
    assert torch.equal(strided(x, (1, 1, 1), start=1), x)
    strided(x, (1, 2, 2), start=1).zero_()
    assert x[0, 0, :, 1, 1::2].abs().sum() == 0
    assert x.count_nonzero() == 24 - 1 - 4


def test_one_number_serves_all_axes() -> None:
    assert per_axis(3, 2, "kernel_size") == (3, 3)
    assert per_axis([1, 3, 3], 3, "kernel_size") == (1, 3, 3)
    with pytest.raises(PlanError, match=r"stride=\(1, 2\): expected one number, or 3"):
        per_axis((1, 2), 3, "stride")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "strides"), [((3, 5, 3), (2, 2, 2)), ((3, 5, 3), (1, 2, 2)), ((1, 1), (2, 2))])
def test_a_front_of_zeros_and_odd_voxels(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    half = tuple((n + 1) // 2 if stride == 2 else n for n, stride in zip(size, strides, strict=True))
    y = torch.randn(2, 4, *size, dtype=dtype, requires_grad=True)
    odd = torch.randn(2, 4, *half, dtype=dtype, requires_grad=True)
    result = pad_front(y, strides, odd)
    front = nn.functional.pad(y, [side for stride in reversed(strides) for side in (stride - 1, 0)])
    spread = torch.zeros_like(front)
    strided(spread, strides, start=1).copy_(odd.detach())
    assert torch.equal(result, front + spread)
    grad = torch.randn(result.shape, dtype=dtype)
    grad_y, grad_odd = torch.autograd.grad(result, (y, odd), grad)
    assert torch.equal(grad_y, grad[(..., *(slice(stride - 1, None) for stride in strides))])
    assert torch.equal(grad_odd, strided(grad, strides, start=1))
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(lambda a, b: pad_front(a, strides, b).square(), (y, odd))
