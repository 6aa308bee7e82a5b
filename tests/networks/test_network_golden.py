"""All ten reference outputs of the official networks, and three sets of gradient norms (tests/golden/README.md)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sagittal.kernels import native
from sagittal.networks import create_mednext, create_segformer3d, load_official_weights

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def weights_from_name(name: str, shape: list[int]) -> Tensor:
    """Return the tensor that the references were computed with: it depends on its official name and shape only."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(tuple(shape) or (1,)).astype(np.float32)
    if name.endswith("running_var"):
        values = 1 + 0.5 * np.tanh(values)
    elif name.endswith("running_mean"):
        values = 0.1 * values
    elif len(shape) >= 2:
        values = values / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.1 * values
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def build(reference: dict[str, Any]) -> nn.Module:
    if "factory" in reference:
        factory = reference["factory"]
        return create_mednext(
            factory["model_id"],
            in_channels=factory["num_input_channels"],
            num_classes=factory["num_classes"],
            kernel_size=factory["kernel_size"],
            deep_supervision=factory["deep_supervision"],
        )
    scale = "paper" if "num_heads" in reference["attention_scale"] else "head_dim"
    return create_segformer3d(in_channels=reference["input_shape"][1], num_classes=3, attention_scale=scale)


def check_gradients(network: nn.Module, scales: list[Tensor], reference: dict[str, Any]) -> None:
    loss = sum(logits.double().square().mean() for logits in scales)
    assert loss.item() == pytest.approx(reference["loss"], rel=1e-5)
    loss.backward()
    norms = {name: parameter.grad.double().norm().item() for name, parameter in network.named_parameters()}
    expected = {name: norm for name, norm in reference["grad_l2"].items() if name != "dummy_tensor"}
    assert norms.keys() == expected.keys()
    floor = 1e-5 * max(expected.values())
    for name, norm in expected.items():
        if norm > floor:
            assert norms[name] == pytest.approx(norm, rel=1e-3), name
        else:
            # Biases before a norm: their true gradient is zero, what remains is rounding.
            assert norms[name] < floor, name


def test_all_ten_references_are_there() -> None:
    assert len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
def test_network_equals_the_official_one(name: str) -> None:
    reference = json.loads((GOLDEN / f"{name}.json").read_text())
    expected = np.load(GOLDEN / f"{name}.npz")
    network = build(reference)
    official = {key: weights_from_name(key, shape) for key, shape in reference["state_dict"].items()}
    report = load_official_weights(network, official)
    assert report.fresh == ()
    assert list(network.state_dict()) == [key for key in official if key not in report.dropped]
    network.eval()
    image = np.random.RandomState(0).standard_normal(reference["input_shape"]).astype(np.float32)
    with torch.set_grad_enabled("grad_l2" in reference):
        scales = network.multiscale(torch.from_numpy(image))
    assert len(scales) == len(expected.files)
    for scale, logits in enumerate(scales):
        stored = torch.from_numpy(expected[f"out{scale}"])
        ours = logits.detach()
        if ours.shape != stored.shape:
            ours = ours[..., ::2, ::2, ::2]
        assert ours.shape == stored.shape
        assert (ours - stored).abs().max() < 1e-4 * stored.abs().max(), f"scale {scale}"
    if "grad_l2" in reference:
        check_gradients(network, scales, reference)


def test_what_is_computed_twice_has_the_official_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)  # the fused kernels would stand in for the expansion
    reference = json.loads((GOLDEN / "mednext_S_k3.json").read_text())
    styles = ("expansion", "block", "none", "block", "expansion", "expansion", "block", "none", "block")
    network = create_mednext(
        "S",
        in_channels=reference["factory"]["num_input_channels"],
        num_classes=reference["factory"]["num_classes"],
        deep_supervision=reference["factory"]["deep_supervision"],
        checkpointing=styles,
    )
    official = {key: weights_from_name(key, shape) for key, shape in reference["state_dict"].items()}
    load_official_weights(network, official)
    image = np.random.RandomState(0).standard_normal(reference["input_shape"]).astype(np.float32)
    check_gradients(network.train(), network.multiscale(torch.from_numpy(image)), reference)
