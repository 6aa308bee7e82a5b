"""SegFormer3D's blocks against their definition; BatchNorm in the weights at inference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sagittal.kernels import native
from sagittal.networks.norms import folds
from sagittal.networks.segformer3d_blocks import (
    Attention,
    DepthwiseConvolution,
    MixFFN,
    PatchEmbedding,
    TransformerBlock,
)

SIZES = {3: (3, 4, 5), 2: (4, 5)}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("attention_scale", "divisor"), [("head_dim", 5.0), ("paper", 3.0)])
@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_attention_follows_its_definition(
    attention_scale: str, divisor: float, sr_ratio: int, spatial_dims: int
) -> None:
    torch.manual_seed(0)
    attention = Attention(15, 3, sr_ratio, attention_scale, spatial_dims).double()
    grid = torch.randn(2, *SIZES[spatial_dims], 15, dtype=torch.float64)
    reduced = grid
    if sr_ratio > 1:
        reduced = attention.sr_norm(attention.sr(grid.movedim(-1, 1).contiguous()).movedim(1, -1))
    query = attention.query(grid).reshape(2, -1, 15)
    both = attention.key_value(reduced).reshape(2, -1, 30)
    heads = []
    for head in range(3):
        part = slice(5 * head, 5 * head + 5)
        key, value = both[..., :15][..., part], both[..., 15:][..., part]
        weights = (query[..., part] @ key.transpose(1, 2) / math.sqrt(divisor)).softmax(-1)
        heads.append(weights @ value)
    expected = attention.proj(torch.cat(heads, -1)).reshape(grid.shape)
    torch.testing.assert_close(attention(grid), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_mix_ffn_follows_its_definition(norm: str, spatial_dims: int) -> None:
    torch.manual_seed(0)
    ffn = MixFFN(4, 8, norm=norm, spatial_dims=spatial_dims).double().train()
    grid = torch.randn(2, *SIZES[spatial_dims], 4, dtype=torch.float64)
    volume = ffn.dwconv.dwconv(ffn.fc1(grid).movedim(-1, 1).contiguous())
    # GroupNorm: each half of the eight channels of each case; BatchNorm: each channel of the batch.
    grouped = volume.unflatten(1, (2, 4)) if norm == "group" else volume
    axes = tuple(range(2, grouped.ndim)) if norm == "group" else (0, *range(2, grouped.ndim))
    deviation = (grouped.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = ((grouped - grouped.mean(axes, keepdim=True)) / deviation).reshape(volume.shape)
    expected = ffn.fc2(nn.functional.gelu(normed.movedim(1, -1)))
    torch.testing.assert_close(ffn(grid), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_block_gradients_match_finite_differences(norm: str, spatial_dims: int) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(
        4, heads=2, sr_ratio=2, mlp_ratio=2, attention_scale="head_dim", norm=norm, spatial_dims=spatial_dims
    )
    block = block.double().eval()
    parameters = dict(block.named_parameters())
    grid = torch.randn(1, *(2, 4, 3)[-spatial_dims:], 4, dtype=torch.float64, requires_grad=True)

    def run(tokens: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(run, (grid, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("sizes", [(2, 3, 4), (17, 16, 18)])
def test_patch_embedding_is_the_same_in_any_layout(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(8, 16, kernel_size=3, stride=2)
    assert 8 * math.prod((2, 3, 4)) < 16 * 8 * 27  # the kernel is larger than the small volume
    assert 8 * math.prod((17, 16, 18)) > 16 * 8 * 27
    volume = torch.randn(1, 8, *sizes)
    lasting = volume.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        convolution = embedding.patch_embeddings
        expected = nn.functional.conv3d(
            volume.double(), convolution.weight.double(), convolution.bias.double(), stride=2, padding=1
        )
        expected = nn.functional.layer_norm(expected.movedim(1, -1), (16,))
        for x in (volume, lasting):
            torch.testing.assert_close(embedding(x).double(), expected, rtol=1e-4, atol=1e-5)


def depthwise(channels: int = 16, norm: str = "batch") -> DepthwiseConvolution:
    torch.manual_seed(0)
    module = DepthwiseConvolution(channels, norm=norm).eval()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape))
    return module


@pytest.mark.parametrize("channels", [16, 6])  # the compiled kernel takes multiples of 16
def test_folded_norm_is_the_norm(channels: int) -> None:
    module = depthwise(channels)
    grid = torch.randn(2, 5, 4, 6, channels)
    assert not folds(module.bn, grid)
    with_gradients = module(grid).detach()
    exact = module.double()(grid.double()).detach()
    module.float()
    with torch.no_grad():
        assert folds(module.bn, grid)
        folded = module(grid)
    assert not torch.equal(folded, with_gradients)
    assert (folded - exact).abs().max() < 2e-6 * exact.abs().max()


def test_norm_folds_only_at_inference_on_plain_tensors() -> None:
    batch, grid = depthwise().bn, torch.randn(1, 16, 2, 3, 4)
    with torch.no_grad():
        assert folds(batch, grid)
        assert not folds(batch, grid.double())
        assert not folds(depthwise(norm="group").bn, grid)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not folds(batch, grid)
        assert not folds(batch.train(), grid)


def test_running_statistics_learnt_later_reach_the_folded_weights() -> None:
    module = depthwise()
    grid = torch.randn(2, 5, 4, 6, 16)
    with torch.no_grad():
        before = module(grid)
        module.train()(grid)
        after = module.eval()(grid)
        expected = module.double()(grid.double())
    assert not torch.allclose(before, after, atol=1e-3)
    assert (after - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_voxel_passes_in_training(norm: str) -> None:
    torch.manual_seed(0)
    ffn = MixFFN(4, 8, norm=norm)
    grid = torch.randn(1, 1, 1, 1, 4)
    trained = ffn.train()(grid)
    assert torch.equal(trained, ffn.eval()(grid))
    if norm == "batch":
        assert ffn.dwconv.bn.num_batches_tracked == 0


def test_kernels_and_operators_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ffn = MixFFN(8, 32).train()
    grid = torch.randn(2, 5, 4, 6, 8)

    def gradients() -> list[Tensor]:
        ffn.zero_grad()
        ffn(grid).square().mean().backward()
        return [parameter.grad for parameter in ffn.parameters()]

    ours = gradients()
    monkeypatch.setattr(native, "eager", lambda *_tensors: False)
    largest = max(gradient.abs().max() for gradient in ours)
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).abs().max() < 1e-5 * largest
