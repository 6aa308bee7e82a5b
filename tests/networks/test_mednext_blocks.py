"""The blocks against their definition in plain operators, and against finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from sagittal.networks.mednext_blocks import global_response_norm

BLOCKS = {"same": MedNeXtBlock, "down": MedNeXtDownBlock, "up": MedNeXtUpBlock}
CHANNELS = {"same": (4, 4), "down": (4, 6), "up": (4, 2)}


def build(kind: str, *, widen: int = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    widths = (widen * channels for channels in CHANNELS[kind])
    block = BLOCKS[kind](*widths, **{"expansion_ratio": 2, **options}).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return block


def definition(kind: str, block: nn.Module, x: Tensor) -> Tensor:
    """The block as the paper's figure and the official weights define it, without a shortcut."""
    dims = x.ndim - 2
    space = tuple(range(2, x.ndim))
    y = block.conv1(x)
    axes = space if isinstance(block.norm, nn.GroupNorm) else (1,)
    centred = y - y.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
    y = y * block.norm.weight.view(-1, *(1,) * dims) + block.norm.bias.view(-1, *(1,) * dims)
    y = block.conv2(y)
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    if block.grn:
        response = y.square().sum(space, keepdim=True).sqrt()
        total = response.sum(1, keepdim=True) if block.grn == "v2" else response.mean(1, keepdim=True)
        y = block.grn_gamma * (y * (response / (total + 1e-6))) + block.grn_beta + y
    y = block.conv3(y)
    if kind == "up":
        y = nn.functional.pad(y, (1, 0) * dims)
    if not block.residual:
        return y
    if kind == "same":
        return y + x
    residual = block.res_conv(x)
    return y + (nn.functional.pad(residual, (1, 0) * dims) if kind == "up" else residual)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("grn", [False, True, "v2"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_blocks_follow_their_definition(kind: str, norm: str, grn: bool | str, spatial_dims: int) -> None:
    for kernel_size, residual in ((3, True), (5, True), (3, False)):
        block = build(kind, norm=norm, grn=grn, spatial_dims=spatial_dims, kernel_size=kernel_size, residual=residual)
        x = torch.randn(2, 4, *(6, 4, 8)[:spatial_dims], dtype=torch.float64)
        torch.testing.assert_close(block(x), definition(kind, block, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("norm", "grn"), [("group", False), ("group", True), ("layer", "v2")])
def test_gradients_match_finite_differences(kind: str, norm: str, grn: bool | str) -> None:
    block = build(kind, norm=norm, grn=grn)
    parameters = dict(block.named_parameters())
    x = torch.randn(1, 4, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(image: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (image,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("sizes", [(6, 4, 9), (1, 1, 1), (5, 8)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_single_precision_follows_the_definition_too(kind: str, sizes: tuple[int, ...], kernel_size: int) -> None:
    # Widths of full vectors in float32 are what the compiled kernels take.
    exact = build(kind, widen=8, kernel_size=kernel_size, spatial_dims=len(sizes))
    single = copy.deepcopy(exact).float()
    images = [torch.randn(2, 32, *sizes, dtype=torch.float64, requires_grad=True)]
    images.append(images[0].detach().float().requires_grad_())
    outputs = [definition(kind, exact, images[0]), single(images[1])]
    slopes = torch.randn(outputs[0].shape, dtype=torch.float64)
    for output in outputs:
        (output * slopes.to(output.dtype)).sum().backward()
    assert (outputs[1] - outputs[0]).abs().max() < 1e-5 * outputs[0].abs().max()
    slow = [images[0].grad, *(parameter.grad for parameter in exact.parameters())]
    fast = [images[1].grad, *(parameter.grad for parameter in single.parameters())]
    # One scale for all: biases before a norm have a true gradient of zero, where only rounding is left.
    scale = max(gradient.abs().max() for gradient in slow)
    assert all((ours - true).abs().max() < 1e-5 * scale for ours, true in zip(fast, slow, strict=True))


@pytest.mark.parametrize("kind", BLOCKS)
def test_memory_format_changes_nothing(kind: str) -> None:
    block = build(kind).float()
    x = torch.randn(2, 4, 6, 4, 8)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last_3d)), block(x))


def test_sizes_halve_upwards_and_double() -> None:
    x = torch.randn(1, 4, 5, 8, 7, dtype=torch.float64)
    assert build("same")(x).shape == (1, 4, 5, 8, 7)
    assert build("down")(x).shape == (1, 6, 3, 4, 4)
    assert build("up")(x).shape == (1, 2, 10, 16, 14)


def test_grn_survives_half_precision_and_silence() -> None:
    x = torch.full((1, 2, 8, 8, 8), 200.0, dtype=torch.float16)
    ones = torch.ones(1, 2, 1, 1, 1, dtype=torch.float16)
    assert torch.isfinite(global_response_norm(x, ones, ones, by_sum=False)).all()
    silent = torch.zeros(1, 2, 3, 4, 5, requires_grad=True)
    global_response_norm(silent, ones.float(), ones.float(), by_sum=True).sum().backward()
    assert torch.isfinite(silent.grad).all()


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="residual"):
        MedNeXtBlock(4, 8)
    assert MedNeXtBlock(4, 8, residual=False)(torch.randn(1, 4, 3, 4, 5)).shape == (1, 8, 3, 4, 5)
    with pytest.raises(PlanError, match="at least 1"):
        MedNeXtDownBlock(0, 8)
    with pytest.raises(PlanError, match="odd"):
        MedNeXtUpBlock(4, 2, kernel_size=2)
