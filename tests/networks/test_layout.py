"""Padding, cropping, 1x1x1 convolution and strided views, in both layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.networks.layout import crop_end, divide_up, pad_end, pointwise, to_preferred_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pad_end_repeats_the_last_plane(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5, 1).to(dtype)
    padded = pad_end(x, (6, 5, 4))
    assert torch.equal(padded.float(), nn.functional.pad(x.float(), (0, 3, 0, 0, 0, 2), mode="replicate"))
    assert pad_end(x, (4, 2, 1)) is x
    assert torch.equal(crop_end(padded, (4, 5, 1)), x)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 4)])
def test_pointwise_is_a_convolution(sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *sizes)
    weight, bias = torch.randn(4, 3, *(1,) * len(sizes)), torch.randn(4)
    convolution = nn.functional.conv3d if len(sizes) == 3 else nn.functional.conv2d
    for layout in (x, to_preferred_layout(x)):
        torch.testing.assert_close(pointwise(layout, weight, bias), convolution(x, weight, bias))
        torch.testing.assert_close(pointwise(layout, weight, None), convolution(x, weight))


def test_pointwise_keeps_channels_last_without_a_copy() -> None:
    x = to_preferred_layout(torch.randn(2, 3, 4, 5, 6))
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    y = pointwise(x, torch.randn(8, 3, 1, 1, 1), None)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("size", "by", "expected"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (32, 2, 16), (5, 1, 5)])
def test_divide_up_is_a_ceiling(size: int, by: int, expected: int) -> None:
    assert divide_up(size, by) == expected == -(-size // by)


def test_sizes_left_open_in_an_export_are_padded_and_cropped_alike() -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            padded = pad_end(x, tuple(4 * divide_up(size, 4) for size in x.shape[2:]))
            return padded, crop_end(padded + 1, tuple(x.shape[2:]))

    sizes = dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Network(), (torch.randn(1, 2, 5, 6, 7),), dynamic_shapes=(sizes,)).module()
    for other in ((8, 3, 2), (4, 8, 12)):
        image = torch.randn(1, 2, *other)
        for ours, eager in zip(program(image), Network()(image), strict=True):
            assert torch.equal(ours, eager)
            assert ours.is_contiguous()
