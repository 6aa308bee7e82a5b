"""The baselines as OpenVINO graphs, converted from PyTorch's: only where PyTorch is installed.

Networks that `openvino_engine` has no builder for are exported by PyTorch for one shape of window and converted. What
comes out is used only after it gave the same logits as PyTorch on a window of noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from sagittal.errors import BundleError, ResourceError
from sagittal.inference.engines.openvino_layers import Array
from sagittal.networks.build import build_network
from sagittal.plan.base import Triple
from sagittal.plan.networks import NetworkConfig

TOLERANCE = 1e-4
"""How far logits may be from PyTorch's, in units of the largest logit where that is above 1."""


def convert(
    config: NetworkConfig, weights: Mapping[str, Array], in_channels: int, num_outputs: int, window: Triple
) -> openvino.Model:
    """Return a model that maps images (1, in_channels, *window), float32, to logits (1, K, *window).

    Args:
        config: the plan's network.
        weights: arrays of the bundle, by parameter name.
        in_channels: channels of the image.
        num_outputs: K.
        window: D, H, W; no other shape can be computed.

    Raises:
        BundleError: the weights do not fit the network.
        ResourceError: the network can't be converted, or what was converted gives other logits.
    """
    network = build_network(config, in_channels, num_outputs, deep_supervision=False).eval()
    _fill(network, weights)
    image = torch.randn(1, in_channels, *window, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(image)
    model = _converted(network, image, config.kind)
    _require_same(model, image.numpy(), expected.numpy(), config.kind)
    return model


def _fill(network: nn.Module, weights: Mapping[str, Array]) -> None:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    # A bundle of a network with deep supervision holds the heads of the coarser scales too.
    absent = [name for name in network.state_dict() if name not in tensors]
    kept = {name: tensor for name, tensor in tensors.items() if name in network.state_dict()}
    try:
        network.load_state_dict(kept, strict=not absent)
    except RuntimeError as error:
        raise BundleError(
            f"the weights do not fit the plan's network ({str(error).splitlines()[-1].strip()}). Get the bundle from "
            "its maker again.",
            code="weights_do_not_fit",
        ) from None
    if absent:
        raise BundleError(
            f"the weights lack '{absent[0]}': they do not fit the plan's network. Get the bundle from its maker again.",
            code="weights_do_not_fit",
        )


class _Whole(nn.Module):
    """A network with the hooks around it, which an export of the network alone would leave out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(image)
        return logits


def _converted(network: nn.Module, image: Tensor, kind: str) -> openvino.Model:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of the exporter and of the libraries that it reads: nothing that a user could act on.
            warnings.simplefilter("ignore")
            program = torch.export.export(_Whole(network), (image,))
            model = openvino.convert_model(program)
    except Exception as error:  # The converters raise whatever they stumble over.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ResourceError(
            f"OpenVINO can't be given the network '{kind}' ({first}). Use the engine 'torch'.", code="engine"
        ) from error
    model.reshape([1, *image.shape[1:]])
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def _require_same(model: openvino.Model, image: Array, expected: Array, kind: str) -> None:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    logits = compiled(image)[0]
    same_shape = logits.shape == expected.shape
    apart = float(np.abs(logits - expected).max()) if same_shape else float("inf")
    # Written so that logits that are not numbers are refused as well.
    if not apart <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ResourceError(
            f"OpenVINO's form of the network '{kind}' differs from PyTorch's by {apart:.2g} (tolerance {TOLERANCE}). "
            "Use the engine 'torch'.",
            code="engine",
        )
