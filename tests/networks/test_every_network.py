"""Every name that a user can give: it is built, keeps an image's odd size and trains, on the meta device: no number
is computed. And what the import of the networks costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sagittal.networks.build import build_network
from sagittal.plan.networks import NETWORKS, network_config

MODULES = {
    "mednext": "MedNeXt",
    "segformer3d": "SegFormer3D",
    "plainconvunet": "PlainConvUNet",
    "resencunet": "ResidualEncoderUNet",
    "unetr": "UNETR",
    "swinunetr": "SwinUNETR",
    "3d-uxnet": "UXNet",
    "nnformer": "NNFormer",
    "transbts": "TransBTS",
}
OTHER_KERNELS = ("-k5", "-k7")
"""How the names of networks end that differ from another by the size of their kernels alone."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_name_is_built_as_its_network(name: str) -> None:
    config = network_config(name)
    with torch.device("meta"):
        network = build_network(config, 2, 5)
    assert type(network).__name__ == MODULES[config.kind]
    assert (network.in_channels, network.num_classes) == (2, 5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith(OTHER_KERNELS)])
def test_a_network_keeps_the_size_of_an_image_and_learns(name: str) -> None:
    config = NETWORKS[name]
    with torch.device("meta"):
        network = build_network(config, in_channels=2, num_outputs=3)
        image = torch.empty(2, 2, *(33, 47, 65)[-network.spatial_dims :])
        with torch.no_grad():
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
from sagittal.networks import MedNeXt, SegFormer3D, cost
print(*sorted(set(sys.modules) - before))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    packages = {module.partition(".")[0] for module in loaded} - set(sys.stdlib_module_names)
    packages = {name for name in packages if not name.startswith("_sysconfigdata")}
    # safetensors: light, needs nothing; triton: torch's own counter of operations takes it where it is installed.
    assert packages <= {"sagittal", "torch", "safetensors", "triton"}
    rooms = {module.split(".")[1] for module in loaded if module.startswith("sagittal.")}
    assert rooms == {"errors", "kernels", "networks"}
