"""The networks on a GPU agree with themselves on the CPU, and train under mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sagittal.networks import MedNeXt, SegFormer3D

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NETWORKS = {
    "mednext": lambda: MedNeXt(1, 3, channels=8, deep_supervision=True),
    "mednext-grn": lambda: MedNeXt(1, 3, channels=8, grn=True, checkpointing=True),
    "mednext-v2": lambda: MedNeXt(1, 3, channels=8, grn="v2", norm="layer", kernel_size=5),
    "segformer3d": lambda: SegFormer3D(1, 3),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_agree_with_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = build(name)
    image = torch.randn(1, 1, 33, 20, 48)
    with torch.inference_mode():
        expected = network(image)
        logits = copy.deepcopy(network).cuda()(image.cuda()).cpu()
    assert logits.is_contiguous()
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trains_under_mixed_precision(name: str, dtype: torch.dtype) -> None:
    network = build(name).cuda().train()
    with torch.autocast("cuda", dtype=dtype):
        scales = network.multiscale(torch.randn(2, 1, 32, 48, 32, device="cuda"))
        loss = sum(logits.float().square().mean() for logits in scales)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
