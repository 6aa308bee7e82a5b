"""Each part of SegFormer3D in training, alone, against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sagittal.networks.segformer3d_blocks import Attention, DepthwiseConvolution, MixFFN, PatchEmbedding
from sagittal.networks.segformer3d_decoder import Decoder, StageProjection


class DecoderOfGrids(nn.Module):
    """A decoder that takes its grids one by one, as the check of gradients gives them."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.decoder = Decoder((4, 4, 6, 6), 2, 4, norm=norm)

    def forward(self, *grids: Tensor) -> Tensor:
        return self.decoder(grids)


GRID = (2, 2, 3, 4, 4)
GRIDS = [(2, 4, 3, 5, 4), (2, 2, 2, 3, 4), (2, 1, 1, 2, 6), (2, 1, 1, 1, 6)]


@pytest.mark.parametrize(
    ("part", "shapes"),
    [
        (PatchEmbedding(2, 4, kernel_size=3, stride=2), [(1, 2, 3, 4, 5)]),
        (Attention(4, 2, 1, "head_dim"), [GRID]),
        (Attention(4, 2, 2, "paper"), [GRID]),
        (DepthwiseConvolution(4), [GRID]),
        (DepthwiseConvolution(4, norm="group"), [GRID]),
        (MixFFN(4, 8), [GRID]),
        (StageProjection(4, 6), [GRID]),
        (DecoderOfGrids("batch"), GRIDS),
        (DecoderOfGrids("group"), GRIDS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_gradients_match_finite_differences(part: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    part = part.double().train()
    parameters = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors: Tensor) -> Tensor:
        weights = dict(zip(parameters, tensors[len(inputs) :], strict=True))
        y: Tensor = torch.func.functional_call(part, weights, tensors[: len(inputs)])
        return y

    assert torch.autograd.gradcheck(run, (*inputs, *parameters.values()), fast_mode=True)
