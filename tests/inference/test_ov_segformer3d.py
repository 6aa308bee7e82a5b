"""SegFormer3D's OpenVINO graph equals PyTorch's network, for every option and any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sagittal.errors import BundleError
from sagittal.inference.engines.openvino_segformer3d import build, coarse_stride
from sagittal.networks.build import build_network
from sagittal.plan.networks import SegFormer3DConfig

CHANNELS, OUTPUTS = 2, 3
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1), "decoder_dim": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"attention_scale": "paper"},
    "group": {"norm": "group"},
    "ratios": {"sr_ratios": (2, 1, 2, 1), "mlp_ratios": (1, 2, 3, 4)},
    "unreduced": {"sr_ratios": (1, 1, 1, 1), "norm": "group", "attention_scale": "paper"},
    "narrow decoder": {"decoder_dim": 3},
    "slices": {"spatial_dims": 2},
    "group slices": {"spatial_dims": 2, "norm": "group", "attention_scale": "paper", "sr_ratios": (3, 1, 1, 2)},
}

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def core() -> openvino.Core:
    return openvino.Core()


def randomised(network: nn.Module) -> nn.Module:
    """Give every tensor values that none of its neighbours could stand in for: initial biases and shifts are zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel()))
    return network.eval()


def arrays(network: nn.Module) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def network_of(**options: Any) -> tuple[SegFormer3DConfig, nn.Module]:
    config = SegFormer3DConfig(**{**SMALL, **options})
    return config, randomised(build_network(config, CHANNELS, OUTPUTS))


def image_of(*sizes: int, batch: int = 1) -> Array:
    return np.random.default_rng(sum(sizes)).standard_normal((batch, CHANNELS, *sizes)).astype(np.float32)


def assert_equal(compute: Callable[[Array], Any], network: nn.Module, image: Array) -> None:
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).numpy()
    logits = compute(image)[0]
    assert logits.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_pytorch_at_a_fixed_odd_size(options: dict[str, Any], core: openvino.Core) -> None:
    config, network = network_of(**options)
    image = image_of(1 if config.dims == 2 else 33, 17, 38)
    model = build(config, arrays(network), CHANNELS, OUTPUTS)
    model.reshape(list(image.shape))
    assert list(model.outputs[0].get_shape()) == [1, OUTPUTS, *image.shape[2:]]
    assert_equal(core.compile_model(model, "CPU", SETTINGS), network, image)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_pytorch_at_one_size_after_another(options: dict[str, Any], core: openvino.Core) -> None:
    config, network = network_of(**options)
    model = build(config, arrays(network), CHANNELS, OUTPUTS)
    compiled = core.compile_model(model, "CPU", SETTINGS)
    # A single key of attention first: OpenVINO's fused attention is wrong for larger grids after it.
    for sizes in [(16, 16, 16), (33, 17, 40), (1, 5, 1)]:
        assert_equal(compiled, network, image_of(*((1, *sizes[1:]) if config.dims == 2 else sizes)))


@pytest.fixture(scope="module")
def small(core: openvino.Core) -> tuple[Callable[[Array], Any], nn.Module]:
    config, network = network_of()
    return core.compile_model(build(config, arrays(network), CHANNELS, OUTPUTS), "CPU", SETTINGS), network


@settings(max_examples=5, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, 40),) * 3), batch=st.integers(1, 2))
def test_any_size_comes_back(
    small: tuple[Callable[[Array], Any], nn.Module], sizes: tuple[int, int, int], batch: int
) -> None:
    assert_equal(*small, image_of(*sizes, batch=batch))


def test_a_projection_that_lacks_ranks(core: openvino.Core) -> None:
    config, network = network_of()
    weights = arrays(network)
    weights["segformer_decoder.linear_c1.proj.weight"][...] = 0
    weights["segformer_decoder.linear_c1.proj.bias"][...] = 0
    compiled = core.compile_model(build(config, weights, CHANNELS, OUTPUTS), "CPU", SETTINGS)
    assert_equal(compiled, network, image_of(20, 16, 24))


def test_the_published_size_has_the_widths_of_the_plan() -> None:
    config = SegFormer3DConfig()
    model = build(config, arrays(build_network(config, 4, 3)), 4, 3)
    model.reshape([1, 4, 64, 32, 48])
    assert list(model.outputs[0].get_shape()) == [1, 3, 64, 32, 48]
    assert model.inputs[0].get_names() == {"image"}
    assert model.outputs[0].get_names() == {"logits"}


def test_weights_that_do_not_fit() -> None:
    config, network = network_of()
    weights = arrays(network)
    with pytest.raises(BundleError, match="shape"):
        build(config, weights, CHANNELS + 1, OUTPUTS)
    with pytest.raises(BundleError, match="hold another"):
        build(config, {**weights, "another": np.zeros(1, np.float32)}, CHANNELS, OUTPUTS)
    del weights["segformer_encoder.norm2.weight"]
    with pytest.raises(BundleError, match=r"lack 'segformer_encoder\.norm2\.weight'"):
        build(config, weights, CHANNELS, OUTPUTS)


def test_ends_before_the_interpolation(core: openvino.Core) -> None:
    config, network = network_of()
    model = build(config, arrays(network), CHANNELS, OUTPUTS, with_head=False)
    image = image_of(16, 20, 32)
    coarse = core.compile_model(model, "CPU", SETTINGS)(image)[0]
    assert coarse.shape == (1, OUTPUTS, 4, 5, 8)
    fine = nn.functional.interpolate(torch.from_numpy(coarse), scale_factor=4, mode="trilinear", align_corners=False)
    with torch.inference_mode():
        np.testing.assert_allclose(fine.numpy(), network(torch.from_numpy(image)).numpy(), atol=2e-5)


def test_windows_with_coarse_logits() -> None:
    config = SegFormer3DConfig()
    assert coarse_stride(config, (16, 20, 32)) == 4
    assert coarse_stride(config, (16, 18, 32)) == 1
    assert coarse_stride(config, (12, 20, 32)) == 1
    assert coarse_stride(SegFormer3DConfig(spatial_dims=2), (1, 20, 32)) == 1
