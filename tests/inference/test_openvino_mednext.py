"""MedNeXt as an OpenVINO graph against the PyTorch network, for every option of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sagittal.errors import BundleError
from sagittal.inference.engines import openvino_mednext_rows, openvino_rows
from sagittal.inference.engines.openvino_layers import normalise_space, pointwise, sum_by_planes
from sagittal.inference.engines.openvino_mednext import build, head
from sagittal.inference.engines.openvino_rows import rows_at_once
from sagittal.networks.build import build_network
from sagittal.plan.mednext import MedNeXtConfig

openvino = pytest.importorskip("openvino")
ops = openvino.opset13

Arrays = dict[str, np.ndarray[Any, Any]]
TINY: dict[str, Any] = {"channels": 4, "block_counts": (1,) * 9, "deep_supervision": False}
SIZE = (18, 33, 20)

OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {"block_counts": (2, 1, 1, 1, 1, 1, 1, 1, 2), "expansion_ratio": (2, 3, 4, 4, 4, 4, 4, 3, 2)},
    "deep supervision": {"deep_supervision": True},
    "kernel 5": {"kernel_size": 5},
    "kernel 7": {"kernel_size": 7},
    "two kernels": {"kernel_size": 3, "decoder_kernel_size": 5},
    "norm over channels": {"norm": "layer"},
    "GRN of v1": {"grn": True},
    "GRN of v2": {"grn": "v2"},
    "GRN and norm over channels": {"grn": "v2", "norm": "layer"},
    "no residual in blocks": {"block_residual": False},
    "no residual in resampling": {"resampling_residual": False},
    "anisotropic": {"strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 1, 1)), "flat_levels": (2, 0, 0)},
    "slices": {"spatial_dims": 2},
    "anisotropic slices": {"spatial_dims": 2, "strides": ((1, 2), (2, 2), (2, 1), (2, 2)), "flat_levels": (1, 0)},
}


def network_and_weights(config: MedNeXtConfig, channels: int = 2) -> tuple[torch.nn.Module, Arrays]:
    """Return a network whose every parameter is random, biases and GRN's too, and its arrays."""
    generator = torch.Generator().manual_seed(0)
    network = build_network(config, channels, 3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return network, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def run(model: openvino.Model, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    result: np.ndarray[Any, Any] = openvino.Core().compile_model(model, "CPU", settings)(image)[0]
    return result


def image_of(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(2, 1, shape).astype(np.float32)


def logits_of(network: torch.nn.Module, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = network(torch.from_numpy(image)).numpy()
    return logits


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_the_graph_equals_the_network(changes: Mapping[str, Any]) -> None:
    config = MedNeXtConfig(**{**TINY, **changes})
    network, weights = network_and_weights(config)
    # Without residuals each block magnifies what OpenVINO's norms are off by, on some processors, where the voxels do
    # not fill their vectors: the coarsest level has 8 then.
    size = SIZE if config.block_residual else (32, 32, 32)
    image = image_of(1, 2, *((1, *size[1:]) if config.dims == 2 else size))
    model = build(config, weights, 2, 3, with_head=True)
    model.reshape(image.shape)
    assert difference(run(model, image), logits_of(network, image)) < 1e-4


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_rows_at_a_time_equal_the_network(changes: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the small volumes of a test take several pieces, on coarse levels too.
    monkeypatch.setattr(openvino_rows, "_CACHE_BYTES", 20_000)
    monkeypatch.setattr(openvino_rows, "_FEWEST_VOXELS", 100)
    config = MedNeXtConfig(**{**TINY, **changes})
    network, weights = network_and_weights(config)
    image = image_of(1, 2, *((1, *SIZE[1:]) if config.dims == 2 else SIZE))
    model = openvino_mednext_rows.build(config, weights, 2, 3, with_head=True, window=image.shape[2:])
    loops = [operator for operator in model.get_ops() if operator.get_type_name() == "TensorIterator"]
    # GRN, and norms over channels, take all voxels at once. GRN of v1 is not in the first block that goes down.
    needs_all = changes.get("norm") == "layer" or changes.get("grn") == "v2"
    assert len(loops) == 0 if needs_all else len(loops) == 1 if changes.get("grn") else len(loops) >= 6
    assert difference(run(model, image), logits_of(network, image)) < 1e-4


def test_few_rows_fit_a_cache() -> None:
    # 16 rows of 128 voxels, of 4 (64 + 2 * 32 + 2 * 32) bytes each, are 1.5 MiB; 8 of them are less than 1 MiB.
    assert rows_at_once((128, 128, 128), 32, 64, 32) in (8, 16)
    assert rows_at_once((16, 16, 16), 32, 64, 32) is None
    # 127 * 127 rows are divided by 1 and 127 alone, which are far from 8.
    assert rows_at_once((127, 127, 127), 32, 64, 32) is None


@pytest.mark.parametrize("shape", [(16, 32, 16), (1, 1, 1), (5, 17, 40)])
def test_sizes_may_stay_open(shape: tuple[int, int, int]) -> None:
    config = MedNeXtConfig(**TINY)
    network, weights = network_and_weights(config)
    image = image_of(2, 2, *shape)
    assert difference(run(build(config, weights, 2, 3, with_head=True), image), logits_of(network, image)) < 1e-4


def test_the_head_on_features_gives_the_logits() -> None:
    config = MedNeXtConfig(**TINY)
    network, weights = network_and_weights(config)
    image = image_of(1, 2, *SIZE)
    features = run(build(config, weights, 2, 3, with_head=False), image)
    weight, bias = head(config, weights, 3)
    logits = np.einsum("kf,nfdhw->nkdhw", weight, features) + bias[:, None, None, None]
    assert features.shape == (1, config.channels, *SIZE)
    assert difference(logits, logits_of(network, image)) < 1e-4


@pytest.mark.parametrize("shape", [(1, 16, 64, 96, 80), (1, 16, 700, 702)])
def test_norms_over_large_volumes_are_exact(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(3, 1, shape).astype(np.float32)
    dims, same = len(shape) - 2, np.eye(16, dtype=np.float32)
    given = ops.parameter(shape, np.float32)
    # Between convolutions the channels lie side by side, as in the network; only so are OpenVINO's own sums inexact.
    graph = pointwise(normalise_space(pointwise(given, same, None, dims=dims), 1e-5, dims), same, None, dims=dims)
    model = openvino.Model([ops.result(graph)], [given])
    axes = tuple(range(2, len(shape)))
    exact = (image - image.mean(axes, np.float64, keepdims=True)) / np.sqrt(
        image.var(axes, np.float64, keepdims=True) + 1e-5
    )
    sum_by_planes(model)
    assert np.abs(run(model, image) - exact).max() < 5e-5


def test_half_precision_weights_are_taken() -> None:
    config = MedNeXtConfig(**TINY)
    network, weights = network_and_weights(config)
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    network.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in halves.items()})
    image = image_of(1, 2, 16, 16, 16)
    model = build(config, halves, 2, 3, with_head=True)
    assert difference(run(model, image), logits_of(network, image)) < 1e-4


def test_weights_that_do_not_fit_are_refused() -> None:
    config = MedNeXtConfig(**TINY)
    _, weights = network_and_weights(config)
    lacking = {name: array for name, array in weights.items() if name != "down_1.conv2.weight"}
    with pytest.raises(BundleError, match=r"lack 'down_1.conv2.weight', expected of shape \(16, 8, 1, 1, 1\)"):
        build(config, lacking, 2, 3, with_head=True)
    with pytest.raises(BundleError, match=r"'stem.weight' has shape \(4, 2, 1, 1, 1\), expected \(4, 1, 1, 1, 1\)"):
        build(config, weights, 1, 3, with_head=True)
    with pytest.raises(BundleError, match=r"hold enc_block_0\.7\.conv1\.weight"):
        build(config, {**weights, "enc_block_0.7.conv1.weight": weights["stem.bias"]}, 2, 3, with_head=True)
