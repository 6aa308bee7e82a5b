"""The blocks against their definition in plain operators, and against finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels import cpu_available
from sagittal.networks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, mednext_blocks

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
    front = [side for stride in reversed(block.conv1.stride) for side in (stride - 1, 0)]
    if kind == "up":
        y = nn.functional.pad(y, front)
    if not block.residual:
        return y
    if kind == "same":
        return y + x
    residual = block.res_conv(x)
    return y + (nn.functional.pad(residual, front) if kind == "up" else residual)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("grn", [False, True, "v2"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_blocks_follow_their_definition(kind: str, norm: str, grn: bool | str, spatial_dims: int) -> None:
    for kernel_size, residual in ((3, True), (5, True), (3, False)):
        block = build(kind, norm=norm, grn=grn, spatial_dims=spatial_dims, kernel_size=kernel_size, residual=residual)
        x = torch.randn(2, 4, *(6, 4, 8)[:spatial_dims], dtype=torch.float64)
        torch.testing.assert_close(block(x), definition(kind, block, x), rtol=1e-9, atol=1e-10)


COARSE = {
    "flat": ({"kernel_size": (1, 3, 3)}, {"stride": (1, 2, 2)}),
    "whole": ({"kernel_size": 3}, {"stride": (1, 2, 2)}),
    "middle": ({"kernel_size": (3, 1, 5)}, {"stride": (2, 1, 2)}),
    "still": ({"kernel_size": (1, 3, 3)}, {"stride": 1}),
    "slices": ({"kernel_size": (3, 1), "spatial_dims": 2}, {"stride": (2, 1)}),
}


def coarse(kind: str, name: str) -> dict[str, object]:
    options, resampling = COARSE[name]
    return {**options, **({} if kind == "same" else resampling)}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize(("norm", "grn"), [("group", False), ("layer", "v2")])
def test_blocks_with_a_coarse_axis_follow_their_definition(kind: str, name: str, norm: str, grn: bool | str) -> None:
    for residual in (True, False):
        block = build(kind, norm=norm, grn=grn, residual=residual, **coarse(kind, name))
        x = torch.randn(2, 4, *(5, 4, 6)[: block.spatial_dims], dtype=torch.float64)
        y = block(x)
        strides = block.conv1.stride
        if kind == "up":
            assert y.shape[2:] == tuple(size * stride for size, stride in zip(x.shape[2:], strides, strict=True))
        else:
            assert y.shape[2:] == tuple(-(-size // stride) for size, stride in zip(x.shape[2:], strides, strict=True))
        torch.testing.assert_close(y, definition(kind, block, x), rtol=1e-9, atol=1e-10)


def check_gradients(block: nn.Module) -> None:
    parameters = dict(block.named_parameters())
    sizes = (2, 4, 3)[-block.spatial_dims :]
    x = torch.randn(1, 4, *sizes, dtype=torch.float64, requires_grad=True)

    def run(image: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (image,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("grn", [False, True, "v2"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_match_finite_differences(
    kind: str, norm: str, grn: bool | str, spatial_dims: int, residual: bool
) -> None:
    check_gradients(build(kind, norm=norm, grn=grn, spatial_dims=spatial_dims, residual=residual))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize(("norm", "grn"), [("group", False), ("layer", "v2")])
def test_gradients_with_a_coarse_axis_match_finite_differences(
    kind: str, name: str, norm: str, grn: bool | str
) -> None:
    check_gradients(build(kind, norm=norm, grn=grn, **coarse(kind, name)))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("checkpointing", ["expansion", "block"])
@pytest.mark.parametrize(("norm", "grn"), [("group", False), ("layer", "v2")])
def test_gradients_of_what_is_computed_twice_match_finite_differences(
    kind: str, checkpointing: str, norm: str, grn: bool | str
) -> None:
    check_gradients(build(kind, norm=norm, grn=grn, checkpointing=checkpointing).train())


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_checkpointing_keeps_what_it_says(kind: str, norm: str) -> None:
    x = torch.randn(1, 4, 8, 8, 12, dtype=torch.float64, requires_grad=True)
    blocks = {style: build(kind, norm=norm, checkpointing=style).train() for style in ("none", "expansion", "block")}
    kept = {style: kept_bytes(block, x) for style, block in blocks.items()}
    image, h = (tensor.numel() * tensor.element_size() for tensor in (x, blocks["none"].conv1(x)))
    assert kept["none"] > image + 4 * h
    # The down block's residual path reads a copy of every eighth voxel.
    assert kept["expansion"] == image + h + (image // 8 if kind == "down" else 0)
    assert kept["block"] == image
    in_eval = {style: kept_bytes(block.eval(), x) for style, block in blocks.items()}
    assert len(set(in_eval.values())) == 1


@pytest.mark.skipif(not cpu_available(), reason="the compiled kernels are not built")
@pytest.mark.parametrize("kind", BLOCKS)
def test_fused_kernels_recompute_the_expansion_without_help(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = mednext_blocks._recomputed

    def counted(*arguments: object) -> Tensor:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(mednext_blocks, "_recomputed", counted)
    block = build(kind, widen=8, checkpointing="expansion").train()
    image = torch.randn(1, 32, 4, 6, 8)
    outputs = [block(image.double())]
    assert len(calls) == 1
    outputs.append(block.float()(image))
    assert len(calls) == 1
    assert (outputs[1] - outputs[0]).abs().max() < 1e-4
    torch.compiler.reset()
    torch.compile(block, fullgraph=True, backend="eager")(image)
    torch.compiler.reset()
    assert len(calls) == 1
    build(kind, widen=8, checkpointing="expansion", grn=True).float().train()(image)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("sizes", [(6, 4, 9), (1, 1, 1), (5, 8)])
@pytest.mark.parametrize("kernel_size", [3, 5, (1, 3, 3)])
def test_single_precision_follows_the_definition_too(
    kind: str, sizes: tuple[int, ...], kernel_size: int | tuple[int, ...]
) -> None:
    # Widths of full vectors in float32 are what the compiled kernels take.
    options: dict[str, object] = {"kernel_size": kernel_size}
    if isinstance(kernel_size, tuple):
        options = {"kernel_size": kernel_size[-len(sizes) :]}
        if kind != "same":
            options["stride"] = (1, 2, 2)[-len(sizes) :]
    exact = build(kind, widen=8, spatial_dims=len(sizes), **options)
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


def test_without_a_residual_there_is_no_weight_for_it() -> None:
    for kind in ("down", "up"):
        names = {residual: list(build(kind, residual=residual).state_dict()) for residual in (True, False)}
        assert names[True] == [*names[False], "res_conv.weight", "res_conv.bias"]


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (MedNeXtDownBlock, {"in_channels": 0}, "at least 1"),
        (MedNeXtUpBlock, {"kernel_size": 2}, "kernel_size=2 .* odd"),
        (MedNeXtUpBlock, {"kernel_size": (1, 3, 4)}, r"kernel_size=\(1, 3, 4\) .* odd"),
        (MedNeXtUpBlock, {"kernel_size": (3, 3)}, "one per spatial axis"),
        (MedNeXtDownBlock, {"stride": 3}, r"stride=\(3, 3, 3\)"),
        (MedNeXtDownBlock, {"stride": (1, 2)}, "one per spatial axis"),
        (MedNeXtDownBlock, {"spatial_dims": 4}, "spatial_dims=4"),
        (MedNeXtDownBlock, {"grn": "v1"}, "grn='v1'"),
        (MedNeXtDownBlock, {"checkpointing": "inside"}, "checkpointing='inside'"),
        (MedNeXtDownBlock, {"norm": "batch"}, "norm='batch'"),
    ],
)
def test_bad_blocks_are_refused(block: type[nn.Module], options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        block(**{"in_channels": 4, "out_channels": 6, **options})


def test_a_block_at_one_resolution_keeps_its_channels_or_has_no_residual() -> None:
    with pytest.raises(PlanError, match="residual"):
        MedNeXtBlock(4, 8)
    assert MedNeXtBlock(4, 8, residual=False)(torch.randn(1, 4, 3, 4, 5)).shape == (1, 8, 3, 4, 5)
    with pytest.raises(TypeError, match="stride"):
        MedNeXtBlock(4, 4, stride=2)
