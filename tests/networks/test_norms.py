"""Norms of volumes: one voxel passes in training, a library's modules are replaced, and how many groups there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.networks.norms import InstanceNorm, normalise, replace_instance_norms, volume_norm


@pytest.mark.parametrize(
    ("channels", "groups"), [(1024, 32), (640, 32), (256, 32), (128, 32), (64, 16), (32, 8), (24, 4), (6, 1), (5, 1)]
)
def test_groups_divide_the_channels_and_hold_at_least_four(channels: int, groups: int) -> None:
    norm = volume_norm("group", channels, 3)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_group_of_one_value_gives_the_bias() -> None:
    norm = volume_norm("group", 1, 3)
    with torch.no_grad():
        norm.bias.fill_(0.5)
        assert normalise(norm, torch.randn(1, 1, 1, 1, 1)).item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_batch_norm_of_one_voxel_takes_the_running_statistics_and_keeps_them(spatial_dims: int) -> None:
    torch.manual_seed(0)
    norm = volume_norm("batch", 4, spatial_dims)
    normalise(norm, torch.randn(3, 4, *(2, 3, 4)[-spatial_dims:]))
    before = norm.running_mean.clone()
    x = torch.randn(1, 4, *(1,) * spatial_dims)
    trained = normalise(norm, x)
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 1
    assert torch.equal(trained, norm.eval()(x))


def test_instance_norms_of_a_library_are_replaced_with_their_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Sequential(nn.InstanceNorm3d(4, affine=True, eps=1e-3)))
    nn.init.normal_(network[1][0].weight)
    x = torch.randn(2, 1, 3, 4, 5)
    expected, names = network(x), list(network.state_dict())
    replace_instance_norms(network)
    assert isinstance(network[1][0], InstanceNorm) and list(network.state_dict()) == names
    torch.testing.assert_close(network(x), expected)
    one = network(torch.randn(2, 1, 1, 1, 1))
    torch.testing.assert_close(one, network[1][0].bias.view(1, 4, 1, 1, 1).expand_as(one), rtol=0, atol=1e-5)
