"""nnU-Net's U-Nets: the contract, the package's own networks as oracle, nnU-Net's state dicts, uneven strides."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures import unet
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import nn

from sagittal.errors import ResourceError
from sagittal.networks.build import build_network
from sagittal.networks.cost import parameters
from sagittal.networks.unets import PlainConvUNet, ResidualEncoderUNet
from sagittal.plan.networks import PlainConvUNetConfig, ResEncUNetConfig, network_config

ONE, TWO, THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)
COMMON: dict[str, Any] = {
    "features_per_stage": (4, 6, 8),
    "strides": (ONE, TWO, TWO),
    "kernel_sizes": (THREE,) * 3,
}
PLAIN: dict[str, Any] = {**COMMON, "n_conv_per_stage": (2, 1, 2), "n_conv_per_stage_decoder": (2, 1)}
RESIDUAL: dict[str, Any] = {**COMMON, "n_blocks_per_stage": (1, 2, 1), "n_conv_per_stage_decoder": (1, 1)}
FLAT: dict[str, Any] = {
    **PLAIN,
    "strides": (ONE, (1, 2, 2), TWO),
    "kernel_sizes": ((1, 3, 3), THREE, THREE),
    "deep_supervision": True,
}
AS_NNUNET: dict[str, Any] = {
    "n_stages": 3,
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}


class TestPlainConvUNet(NetworkContract):
    def build(self) -> nn.Module:
        return PlainConvUNet(IN_CHANNELS, NUM_CLASSES, **PLAIN, deep_supervision=True)


class TestResidualEncoderUNet(NetworkContract):
    def build(self) -> nn.Module:
        return ResidualEncoderUNet(IN_CHANNELS, NUM_CLASSES, **RESIDUAL, deep_supervision=True)


def official(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "plain":
        return unet.PlainConvUNet(IN_CHANNELS, num_classes=NUM_CLASSES, **PLAIN, **AS_NNUNET, deep_supervision=True)
    return unet.ResidualEncoderUNet(
        IN_CHANNELS, num_classes=NUM_CLASSES, **RESIDUAL, **AS_NNUNET, deep_supervision=True
    )


def ours(kind: str, **more: Any) -> nn.Module:
    if kind == "plain":
        return PlainConvUNet(IN_CHANNELS, NUM_CLASSES, **PLAIN, **more)
    return ResidualEncoderUNet(IN_CHANNELS, NUM_CLASSES, **RESIDUAL, **more)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_nnunets_state_dict_is_read_and_gives_nnunets_outputs(kind: str) -> None:
    oracle = official(kind).eval()
    image = torch.randn(2, IN_CHANNELS, 8, 12, 16)
    state = oracle.state_dict()
    deep = ours(kind, deep_supervision=True).eval()
    deep.load_state_dict(state)
    single = ours(kind).eval()
    single.load_state_dict(copy.deepcopy(state))
    with torch.inference_mode():
        expected = oracle(image)
        assert all(torch.equal(a, b) for a, b in zip(deep.multiscale(image), expected, strict=True))
        assert torch.equal(single(image), expected[0])
    assert len(state) == len(oracle.state_dict()), "the caller's state dict was changed"


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_each_tensor_has_one_name_which_is_nnunets(kind: str) -> None:
    network = ours(kind, deep_supervision=True)
    names = network.state_dict().keys()
    assert names < official(kind).state_dict().keys()
    assert len(names) == len(list(network.parameters()))
    assert parameters(network) == parameters(official(kind))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_weights_begin_as_nnunets(kind: str) -> None:
    torch.manual_seed(0)
    network = ours(kind, deep_supervision=True)
    oracle = official(kind)
    oracle.apply(type(oracle).initialize)
    expected = oracle.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_without_deep_supervision_no_head_is_idle(kind: str) -> None:
    network = ours(kind)
    network(torch.randn(1, IN_CHANNELS, 4, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert {name for name in network.state_dict() if "seg_layers" in name} == {
        "decoder.seg_layers.1.weight",
        "decoder.seg_layers.1.bias",
    }


@pytest.mark.parametrize(("name", "millions"), [("plainconvunet", 31.2), ("resencunet", 102.4)])
def test_parameters_are_those_of_nnunets_default_plans(name: str, millions: float) -> None:
    """A patch of 128 voxels cubed: six stages; one channel, 14 classes."""
    with torch.device("meta"):
        network = build_network(network_config(name), 1, 14)
    assert parameters(network) / 1e6 == pytest.approx(millions, rel=0.005)


def test_a_tensor_that_is_missing_is_told() -> None:
    state = official("plain").state_dict()
    network = ours("plain", deep_supervision=True)
    del state["encoder.stages.1.0.convs.0.all_modules.0.weight"], state["decoder.seg_layers.0.bias"]
    with pytest.raises(RuntimeError, match=r"seg_layers\.0\.bias"):
        network.load_state_dict(state)


def test_scales_follow_uneven_strides() -> None:
    network = PlainConvUNet(IN_CHANNELS, NUM_CLASSES, **FLAT)
    shapes = [tuple(logits.shape[2:]) for logits in network(torch.randn(1, IN_CHANNELS, 5, 18, 33))]
    assert shapes == [(5, 18, 33), (5, 9, 17)]


def test_every_field_of_a_configuration_arrives() -> None:
    plain = build_network(PlainConvUNetConfig(**FLAT), 2, 3)
    assert isinstance(plain, PlainConvUNet)
    assert str(plain) == str(PlainConvUNet(2, 3, **FLAT))
    residual = build_network(ResEncUNetConfig(**RESIDUAL), 2, 3)
    assert isinstance(residual, ResidualEncoderUNet)
    assert str(residual) == str(ResidualEncoderUNet(2, 3, **RESIDUAL, deep_supervision=True))
    assert not build_network(PlainConvUNetConfig(**FLAT), 2, 3, deep_supervision=False).deep_supervision


@pytest.mark.parametrize(
    ("name", "library", "ours"),
    [
        ("plainconvunet", "dynamic_network_architectures", "sagittal.networks.unets"),
        ("swinunetr", "monai", "sagittal.networks.monai_networks"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_remedy(
    name: str, library: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, ours, raising=False)
    # None stands for a module that can't be imported.
    for module in {library, *(loaded for loaded in sys.modules if loaded.startswith(f"{library}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResourceError, match=r"pip install 'sagittal\[baselines\]'") as caught:
        build_network(network_config(name), 1, 2)
    assert caught.value.code == "missing_extra"
    assert name in caught.value.message
    assert library in caught.value.message


def test_no_library_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys; import sagittal.networks.build, sagittal.networks.cost; "
        "print([name for name in ('monai', 'dynamic_network_architectures', 'einops') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
