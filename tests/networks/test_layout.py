"""Padding and cropping, at sizes that are known and at sizes that an export leaves open."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.networks.layout import crop_end, divide_up, pad_end, pad_to_multiples, round_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pad_end_repeats_the_last_plane(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5, 1).to(dtype)
    padded = pad_end(x, (6, 5, 4))
    assert torch.equal(padded.float(), nn.functional.pad(x.float(), (0, 3, 0, 0, 0, 2), mode="replicate"))
    assert pad_end(x, (4, 2, 1)) is x
    assert torch.equal(crop_end(padded, (4, 5, 1)), x)


@pytest.mark.parametrize(("size", "by", "expected"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (32, 2, 16), (5, 1, 5)])
def test_divide_up_is_a_ceiling(size: int, by: int, expected: int) -> None:
    assert divide_up(size, by) == expected == -(-size // by)
    assert round_up(size, by) == expected * by


def test_sizes_left_open_in_an_export_are_padded_and_cropped_alike() -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            padded = pad_to_multiples(x, (4, 2, 4))
            return padded, crop_end(padded + 1, tuple(x.shape[2:]))

    sizes = dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Network(), (torch.randn(1, 2, 5, 6, 7),), dynamic_shapes=(sizes,)).module()
    for other in ((8, 3, 2), (4, 8, 12)):
        image = torch.randn(1, 2, *other)
        for ours, eager in zip(program(image), Network()(image), strict=True):
            assert torch.equal(ours, eager)
            assert ours.is_contiguous()
