"""SegFormer3D as it computes on a GPU, against float64; `test_network_kernels.py` runs this in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sagittal.kernels import depthwise, gpu_depthwise, native
from sagittal.kernels.choice import interpreted_on_cpu, use_kernels
from sagittal.networks import SegFormer3D, segformer3d_decoder
from sagittal.networks.half_precision import to_half_precision
from sagittal.networks.norms import VolumeNorm


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "eager", lambda *_: False)
    with interpreted_on_cpu(), use_kernels("on"):
        yield


def network_of(norm: VolumeNorm) -> SegFormer3D:
    torch.manual_seed(0)
    network = SegFormer3D(
        1, 2, embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1,) * 4, sr_ratios=(2, 1, 1, 1),
        mlp_ratios=(2,) * 4, decoder_dim=16, norm=norm,
    )  # fmt: skip
    for name, part in (*network.named_parameters(), *network.named_buffers()):
        if part.is_floating_point():
            nn.init.uniform_(part, 0.5, 1.5) if "var" in name else nn.init.normal_(part, std=0.3)
    return network


def step(network: nn.Module, image: Tensor) -> list[Tensor]:
    given = image.detach().requires_grad_()
    logits = network(given)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    wanted = [given, *(part for name, part in network.named_parameters() if not name.endswith("dwconv.dwconv.bias"))]
    return [logits.detach(), *torch.autograd.grad(logits, wanted, grad)]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_step_has_the_numbers_of_float64_and_no_atomic_sums(norm: VolumeNorm) -> None:
    network, image = network_of(norm).train(), torch.randn(1, 1, 9, 17, 12)
    slow = AssertionError("a plain form ran")
    with (
        mock.patch.object(depthwise, "plain_conv", side_effect=slow),
        mock.patch.object(segformer3d_decoder, "_interpolate", side_effect=slow),
    ):
        ours = step(network, image)
    exact = step(network.double(), image.double())
    assert float((ours[0].double() - exact[0]).norm() / exact[0].norm()) < 1e-5
    scale = max(float(part.norm()) for part in exact[1:])
    assert max(float((a.double() - b).norm()) for a, b in zip(ours[1:], exact[1:], strict=True)) < 2e-5 * scale


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_folds_its_norms_within_rounding(norm: VolumeNorm, dtype: torch.dtype) -> None:
    network, image = network_of(norm).eval(), torch.randn(1, 1, 8, 12, 5)
    with torch.inference_mode():
        exact = network.double()(image.double())
        network = network.float().to(dtype)
        with mock.patch.object(nn.BatchNorm3d, "forward", side_effect=AssertionError("a norm of its own")):
            ours = network(image.to(dtype))
        with use_kernels("off"):
            plain = network(image.to(dtype))
    assert ours.dtype == dtype
    found, usual = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, plain))
    assert found < (1e-5 if dtype == torch.float32 else 1.25 * usual)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_half_precision_rounds_no_worse_than_the_plain_form(norm: VolumeNorm) -> None:
    network, image = network_of(norm).eval(), torch.randn(2, 1, 8, 12, 5)
    half = to_half_precision(copy.deepcopy(network), torch.bfloat16)
    with torch.inference_mode():
        exact = network.double()(image.double())
        ours = half(image.bfloat16())
        with use_kernels("off"):
            plain = half(image.bfloat16())
    assert ours.dtype == plain.dtype == torch.float32
    found, usual = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, plain))
    assert found < 1.25 * usual


def test_the_convolution_takes_token_grids_as_they_lie() -> None:
    network, image = network_of("group"), torch.randn(1, 1, 8, 12, 5)
    convolve, copies = gpu_depthwise.convolve, 0

    def watching(x: Tensor, *given: object, **options: object) -> Tensor:
        nonlocal copies
        copies += x.data_ptr() not in pointers
        return convolve(x, *given, **options)  # type: ignore[arg-type]

    pointers: set[int] = set()

    for module in network.modules():
        if hasattr(module, "fc1"):
            module.fc1.register_forward_hook(lambda _linear, _given, grid: pointers.add(grid.data_ptr()))
    with torch.no_grad(), mock.patch.object(gpu_depthwise, "convolve", watching):
        network(image)
    assert len(pointers) > 0
    assert copies == 0


def test_a_compiled_graph_interpolates_by_products_too() -> None:
    network, image = network_of("group").train(), torch.randn(1, 1, 9, 17, 12)
    eager = step(network, image)
    slow = AssertionError("a plain form ran")
    network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    with (
        mock.patch.object(depthwise, "plain_conv", side_effect=slow),
        mock.patch.object(segformer3d_decoder, "_interpolate", side_effect=slow),
    ):
        ours = step(network, image)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)


def test_a_graph_for_any_size_makes_its_interpolation_for_each() -> None:
    compiled = torch.compile(
        lambda logits, d, h, w: segformer3d_decoder.upsample_logits(logits, 4, (d, h, w)),
        backend="eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    slow = mock.patch.object(segformer3d_decoder, "_interpolate", side_effect=AssertionError("a plain form ran"))
    for size in ((2, 3, 4), (3, 5, 2)):
        logits = torch.randn(1, 2, *size)
        cropped = tuple(4 * n - 1 for n in size)
        with slow:
            found = compiled(logits, *cropped)
        wanted = nn.functional.interpolate(logits, scale_factor=4, mode="trilinear")
        torch.testing.assert_close(found, wanted[..., : cropped[0], : cropped[1], : cropped[2]])
