"""The normalisations of MedNeXt where their blocks' tests do not look: half precision, silence, one voxel, names."""

from __future__ import annotations

import pytest
import torch

from sagittal.errors import PlanError
from sagittal.kernels.response_norm import global_response_norm
from sagittal.networks.mednext_norms import ChannelGroupNorm, ChannelLayerNorm, channel_norm


def test_grn_survives_half_precision_and_silence() -> None:
    x = torch.full((1, 2, 8, 8, 8), 200.0, dtype=torch.float16)
    ones = torch.ones(1, 2, 1, 1, 1, dtype=torch.float16)
    assert torch.isfinite(global_response_norm(x, ones, ones, by_sum=False)).all()
    silent = torch.zeros(1, 2, 3, 4, 5, requires_grad=True)
    global_response_norm(silent, ones.float(), ones.float(), by_sum=True).sum().backward()
    assert torch.isfinite(silent.grad).all()


@pytest.mark.parametrize("by_sum", [False, True])
def test_grn_of_two_known_channels(by_sum: bool) -> None:
    x = torch.tensor([3.0, 4.0, 0.0, 5.0], dtype=torch.float64).reshape(1, 2, 1, 2)
    gamma, beta = torch.full((2, 1, 2, 1, 1), 2.0, dtype=torch.float64)
    # Both channels have a norm of 5: each is half of the sum, and equal to the mean.
    share = 0.5 if by_sum else 1.0
    expected = 2 * x * share + 2 + x
    torch.testing.assert_close(global_response_norm(x, gamma, beta, by_sum=by_sum), expected, rtol=1e-6, atol=0)


def test_one_voxel_gives_the_bias() -> None:
    norm = ChannelGroupNorm(2)
    torch.nn.init.constant_(norm.bias, 0.5)
    torch.testing.assert_close(norm(torch.randn(1, 2, 1, 1, 1)), torch.full((1, 2, 1, 1, 1), 0.5))


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4)])
def test_layer_norm_is_over_the_channels_of_each_voxel(sizes: tuple[int, ...]) -> None:
    y = ChannelLayerNorm(8)(torch.randn(2, 8, *sizes))
    torch.testing.assert_close(y.mean(1), torch.zeros(2, *sizes), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, *sizes), rtol=0, atol=1e-3)


def test_an_unknown_norm_is_refused() -> None:
    assert isinstance(channel_norm("group", 4), ChannelGroupNorm)
    with pytest.raises(PlanError, match="norm='batch'"):
        channel_norm("batch", 4)
