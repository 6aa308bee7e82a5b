"""The baselines, converted from PyTorch's graphs, give PyTorch's logits or are refused."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as ops

from sagittal.errors import BundleError, ResourceError
from sagittal.inference.engines import openvino_convert
from sagittal.inference.engines.openvino_convert import convert
from sagittal.networks.build import build_network
from sagittal.plan.networks import PlainConvUNetConfig, SegFormer3DConfig

WINDOW = (4, 8, 12)
CONFIG = PlainConvUNetConfig(
    features_per_stage=(2, 4),
    strides=((1, 1, 1), (1, 2, 2)),
    kernel_sizes=((1, 3, 3), (3, 3, 3)),
    n_conv_per_stage=(1, 1),
    n_conv_per_stage_decoder=(1,),
)
SLICES = SegFormer3DConfig(
    embed_dims=(4, 4, 4, 4), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), decoder_dim=4, spatial_dims=2
)

Arrays = dict[str, np.ndarray[Any, Any]]


def weights_of(config: PlainConvUNetConfig | SegFormer3DConfig) -> tuple[torch.nn.Module, Arrays]:
    torch.manual_seed(0)
    network = build_network(config, 1, 3).eval()
    return network, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "window"), [(CONFIG, WINDOW), (SLICES, (1, 17, 20))], ids=["unet", "slices"])
def test_equals_pytorch(config: PlainConvUNetConfig | SegFormer3DConfig, window: tuple[int, int, int]) -> None:
    network, weights = weights_of(config)
    model = convert(config, weights, 1, 3, window)
    assert list(model.inputs[0].get_shape()) == [1, 1, *window]
    assert list(model.outputs[0].get_shape()) == [1, 3, *window]
    image = np.random.default_rng(1).standard_normal((1, 1, *window)).astype(np.float32)
    logits = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"image": image})
    with torch.inference_mode():
        expected = network(torch.from_numpy(image))
    expected = expected[0] if isinstance(expected, list) else expected
    np.testing.assert_allclose(logits["logits"], expected.numpy(), atol=1e-4)


def test_weights_that_do_not_fit() -> None:
    _, weights = weights_of(CONFIG)
    with pytest.raises(BundleError, match="do not fit"):
        convert(CONFIG, weights, 2, 3, WINDOW)
    first = next(iter(weights))
    del weights[first]
    with pytest.raises(BundleError, match=f"lack '{first}'"):
        convert(CONFIG, weights, 1, 3, WINDOW)


def test_what_the_converters_refuse_is_named() -> None:
    _, weights = weights_of(CONFIG)
    with (
        patch.object(torch.export, "export", side_effect=RuntimeError("no such operator\nmore")),
        pytest.raises(ResourceError, match=r"'plainconvunet' \(no such operator\)"),
    ):
        convert(CONFIG, weights, 1, 3, WINDOW)


@pytest.mark.parametrize("offset", [0.01, float("nan")])
def test_other_logits_are_refused(offset: float) -> None:
    image = ops.parameter([1, 1, *WINDOW], np.float32)
    model = openvino.Model([ops.add(image, ops.constant(np.float32(offset)))], [image], "other")
    noise = np.zeros((1, 1, *WINDOW), np.float32)
    with pytest.raises(ResourceError, match="differs from PyTorch's"):
        openvino_convert._require_same(model, noise, noise, "plainconvunet")
