from __future__ import annotations

import copy

import pytest
import torch

from sagittal.errors import DataError
from sagittal.networks.build import build_network
from sagittal.networks.cost import step_memory_bytes
from sagittal.networks.mednext import MedNeXt
from sagittal.networks.slices import as_slices
from sagittal.plan.networks import MedNeXtConfig, SegFormer3DConfig

FLAT = MedNeXtConfig(channels=2, block_counts=(1,) * 9, spatial_dims=2)
SEGFORMER = SegFormer3DConfig(
    embed_dims=(4, 4, 8, 8), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), decoder_dim=8, spatial_dims=2
)


@pytest.mark.parametrize("config", [FLAT, SEGFORMER])
def test_a_volume_of_one_slice_is_what_the_network_sees_of_the_slice(config):
    network = build_network(config, 2, 3).eval()
    image = torch.randn(2, 2, 1, 18, 35)
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (2, 3, 1, 18, 35)
        assert torch.equal(logits[:, :, 0], network.forward(image[:, :, 0]))


def test_every_scale_becomes_a_volume():
    scales = build_network(FLAT, 1, 2).train()(torch.randn(1, 1, 1, 32, 48))
    assert [tuple(logits.shape[2:]) for logits in scales] == [(1, 32 >> level, 48 >> level) for level in range(5)]


def test_it_stays_the_module_that_it_was():
    plain = MedNeXt(1, 2, channels=2, block_counts=(1,) * 9, spatial_dims=2)
    names = list(plain.state_dict())
    assert as_slices(plain) is plain
    assert list(plain.state_dict()) == names
    assert copy.deepcopy(plain)(torch.zeros(1, 1, 1, 16, 16)).shape == (1, 2, 1, 16, 16)
    assert step_memory_bytes(plain, (2, 1, 1, 16, 32), training=True) > 0


@pytest.mark.parametrize("shape", [(1, 1, 2, 16, 16), (1, 1, 16, 16)])
def test_more_than_a_slice_or_no_volume_is_refused(shape):
    with pytest.raises(DataError, match="one slice at a time") as caught:
        build_network(FLAT, 1, 2)(torch.zeros(shape))
    assert caught.value.code == "input_axes"


def test_networks_of_three_axes_are_left_as_they_are():
    network = build_network(FLAT.replace(spatial_dims=3), 1, 2).eval()
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
