"""Convolution with a kernel of one voxel: in either layout, in 2D and 3D, eagerly and in an exported graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.kernels import pointwise


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 4)])
def test_pointwise_is_a_convolution(sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *sizes)
    weight, bias = torch.randn(4, 3, *(1,) * len(sizes)), torch.randn(4)
    convolution = nn.functional.conv3d if len(sizes) == 3 else nn.functional.conv2d
    last = torch.channels_last_3d if len(sizes) == 3 else torch.channels_last
    for layout in (x, x.contiguous(memory_format=last)):
        torch.testing.assert_close(pointwise(layout, weight, bias), convolution(x, weight, bias))
        torch.testing.assert_close(pointwise(layout, weight.flatten(1), bias), convolution(x, weight, bias))
        torch.testing.assert_close(pointwise(layout, weight, None), convolution(x, weight))


def test_pointwise_keeps_channels_last_without_a_copy() -> None:
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    y = pointwise(x, torch.randn(8, 3, 1, 1, 1), None)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 4)])
def test_an_exported_graph_holds_a_convolution(sizes: tuple[int, ...]) -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return pointwise(x, weight, None)

    x, weight = torch.randn(2, 3, *sizes), torch.randn(4, 3)
    program = torch.export.export(Network(), (x, weight))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv" in name for name in names) and not any("linear" in name for name in names)
    torch.testing.assert_close(program.module()(x, weight), pointwise(x, weight, None))
