"""Networks in bfloat16 and float16 by plain operators, on a CPU: every one predicts what it does in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sagittal.networks import MedNeXt, SegFormer3D
from sagittal.networks.build import build_network
from sagittal.networks.half_precision import to_half_precision
from sagittal.plan.networks import NETWORKS

KINDS = {config.kind: name for name, config in reversed(NETWORKS.items())}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def small_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module
    if name == "segformer3d":
        network = SegFormer3D(1, 5)
    else:
        network = MedNeXt(
            1, 5, channels=8, block_counts=(1,) * 9, norm="layer" if name == "layer" else "group", grn="v2"
        )
    for part_name, part in (*network.named_parameters(), *network.named_buffers()):
        if part.is_floating_point():
            # As after training: norms that scale and shift, statistics that are not those of a fresh network.
            nn.init.uniform_(part, 0.5, 1.5) if "var" in part_name else part.data.add_(0.05 * torch.randn_like(part))
    return network.eval()


@pytest.mark.parametrize("name", ["group", "layer", "segformer3d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_worse_than_that_of_a_network_converted_whole(name: str, dtype: torch.dtype) -> None:
    network, image = small_network(name), torch.randn(4, 1, 17, 16, 13)
    whole = copy.deepcopy(network).to(dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(image.double())
        ours = to_half_precision(copy.deepcopy(network), dtype)(image.to(dtype))
        usual = whole(image.to(dtype))
    assert ours.dtype == torch.float32 and usual.dtype == dtype
    assert error(ours, exact) < 1.25 * error(usual, exact) < 20 * ROUNDING[dtype]


def test_heads_and_running_statistics_stay_as_they_were() -> None:
    for name in ("group", "segformer3d"):
        network = small_network(name)
        before = {key: part.clone() for key, part in network.state_dict().items()}
        assert to_half_precision(network, torch.bfloat16) is network
        kept = {key for key, part in network.state_dict().items() if part.dtype == torch.float32}
        assert all(torch.equal(network.state_dict()[key], before[key]) for key in kept)
        allowed = ("out_0.", "linear_pred.", "dwconv.bn.", "linear_fuse.1.")
        assert all(any(word in key for word in allowed) for key in kept)
        assert ("out_0.conv_out.bias" if name == "group" else "segformer_decoder.linear_pred.weight") in kept
        assert any("running_var" in key for key in kept) == (name == "segformer3d")


@pytest.mark.parametrize("name", [name for kind, name in KINDS.items() if kind not in ("mednext", "segformer3d")])
def test_every_network_computes_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = nn.functional.avg_pool3d
    # A GPU has it in bfloat16, a CPU has not.
    monkeypatch.setattr(nn.functional, "avg_pool3d", lambda x, *how: pool(x.float(), *how).to(x.dtype))
    torch.manual_seed(0)
    network, image = build_network(NETWORKS[name], in_channels=1, num_outputs=3), torch.randn(1, 1, 32, 32, 32)
    network.eval()
    with torch.inference_mode():
        exact = network(image)
        ours = to_half_precision(network, torch.bfloat16)(image.bfloat16())
    assert error(ours, exact) < 0.1
