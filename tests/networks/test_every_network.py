"""Every name that a user can give: it builds, keeps an image's odd size and trains, on the meta device: no number
is computed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sagittal.networks.build import build_network
from sagittal.plan.networks import NETWORKS, NetworkConfig

LIBRARIES = {
    "plain_conv_unet": "dynamic_network_architectures",
    "resenc_unet": "dynamic_network_architectures",
    "unetr": "monai",
    "swin_unetr": "monai",
}


def build(config: NetworkConfig) -> nn.Module:
    library = LIBRARIES.get(config.kind)
    if library is not None and find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'sagittal[baselines]'")
    return build_network(config, in_channels=2, num_outputs=3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_keeps_the_size_of_an_image_and_learns(name: str) -> None:
    config = NETWORKS[name]
    with torch.device("meta"):
        network = build(config)
        image = torch.empty(2, 2, *(33, 47, 65)[-network.spatial_dims :])
        assert network.eval()(image).shape == (2, 3, *image.shape[2:])
        scales = network.train().multiscale(image)
        assert len(scales) == config.scales
        assert all(logits.shape[:2] == (2, 3) for logits in scales)
        sum(logits.square().mean() for logits in scales).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_importing_the_networks_takes_torch_and_nothing_else_heavy() -> None:
    program = """
import sys, torch
before = set(sys.modules)
from sagittal.networks import MedNeXt, SegFormer3D
print(*sorted(set(sys.modules) - before))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    packages = {module.partition(".")[0] for module in loaded} - set(sys.stdlib_module_names)
    assert packages <= {"sagittal", "torch", "safetensors"}  # safetensors: light, needs nothing
    rooms = {module.split(".")[1] for module in loaded if module.startswith("sagittal.")}
    assert rooms == {"errors", "kernels", "networks"}
