"""SegFormer3D: the contract, its parts against their definition, sizes, initialisation, bad configurations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks import SegFormer3D, create_segformer3d
from sagittal.networks.segformer3d import Attention, Decoder, MixFFN, TransformerBlock

SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1), "decoder_dim": 16}


class TestSegFormer3D(NetworkContract):
    def build(self) -> nn.Module:
        return SegFormer3D(IN_CHANNELS, NUM_CLASSES, **SMALL)


class TestSegFormer3DPaperScale(NetworkContract):
    def build(self) -> nn.Module:
        return SegFormer3D(
            IN_CHANNELS,
            NUM_CLASSES,
            **{**SMALL, "sr_ratios": (2, 1, 2, 1)},
            attention_scale="paper",
            mlp_ratios=(1, 2, 3, 4),
        )


@pytest.fixture(scope="module")
def small() -> SegFormer3D:
    torch.manual_seed(0)
    return SegFormer3D(1, 2, **SMALL).eval()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, 40),) * 3))
def test_any_size_comes_back(small: SegFormer3D, sizes: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert small(torch.zeros(1, 1, *sizes)).shape == (1, 2, *sizes)


@pytest.mark.parametrize("sizes", [(14, 160, 160), (64, 128, 128), (64, 128, 256), (90, 90, 90), (33, 47, 21)])
def test_published_sizes_come_back(sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = create_segformer3d(in_channels=4, num_classes=3)
        assert network(torch.empty(1, 4, *sizes)).shape == (1, 3, *sizes)


@pytest.mark.parametrize("sr_ratios", [(4, 2, 1, 1), (8, 1, 1, 1), (1, 1, 4, 2), (3, 3, 1, 1)])
def test_smallest_unpadded_size_leaves_keys_for_every_stage(sr_ratios: tuple[int, int, int, int]) -> None:
    network = SegFormer3D(1, 2, **SMALL, sr_ratios=sr_ratios).eval()
    for size in (network.min_size - 1, network.min_size):
        with torch.inference_mode():
            assert network(torch.zeros(1, 1, size, 20, 33)).shape == (1, 2, size, 20, 33)


def test_only_short_axes_are_padded(small: SegFormer3D) -> None:
    assert small.min_size == 13
    image = torch.randn(1, 1, 12, 13, 18)
    padded = nn.functional.pad(image, (0, 0, 0, 0, 0, 4), mode="replicate")
    zeros = nn.functional.pad(image, (0, 2, 0, 3, 0, 0))
    with torch.inference_mode():
        assert torch.equal(small(image), small(padded)[:, :, :12])
        # 13 and 18 voxels go through unpadded: the strided patch embedding sees them as if zeros followed.
        torch.testing.assert_close(small(image), small(zeros)[:, :, :, :13, :18], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("attention_scale", "divisor"), [("head_dim", 5.0), ("paper", 3.0)])
@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_attention_follows_its_definition(attention_scale: str, divisor: float, sr_ratio: int) -> None:
    torch.manual_seed(0)
    attention = Attention(15, 3, sr_ratio, attention_scale).double()
    grid = torch.randn(2, 3, 4, 5, 15, dtype=torch.float64)
    reduced = grid
    if sr_ratio > 1:
        volume = attention.sr(grid.permute(0, 4, 1, 2, 3).contiguous())
        reduced = attention.sr_norm(volume.permute(0, 2, 3, 4, 1))
    query = attention.query(grid).reshape(2, 60, 15)
    both = attention.key_value(reduced).reshape(2, -1, 30)
    heads = []
    for head in range(3):
        part = slice(5 * head, 5 * head + 5)
        key, value = both[..., :15][..., part], both[..., 15:][..., part]
        weights = (query[..., part] @ key.transpose(1, 2) / math.sqrt(divisor)).softmax(-1)
        heads.append(weights @ value)
    expected = attention.proj(torch.cat(heads, -1)).reshape(grid.shape)
    torch.testing.assert_close(attention(grid), expected, rtol=1e-9, atol=1e-10)


def test_mix_ffn_follows_its_definition() -> None:
    torch.manual_seed(0)
    ffn = MixFFN(4, 8).double().train()
    grid = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64)
    volume = ffn.dwconv.dwconv(ffn.fc1(grid).permute(0, 4, 1, 2, 3).contiguous())
    axes = (0, 2, 3, 4)
    volume = (volume - volume.mean(axes, keepdim=True)) / (volume.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = ffn.fc2(nn.functional.gelu(volume.permute(0, 2, 3, 4, 1)))
    torch.testing.assert_close(ffn(grid), expected, rtol=1e-9, atol=1e-10)


def published_fuse(decoder: Decoder, grids: list[Tensor]) -> Tensor:
    """The decoder as the paper writes it: upsample, concatenate stages 4 to 1, fuse."""
    finest = grids[0].shape[1:4]
    maps = []
    for stage in (4, 3, 2, 1):
        volume = decoder.get_submodule(f"linear_c{stage}")(grids[stage - 1]).permute(0, 4, 1, 2, 3)
        maps.append(nn.functional.interpolate(volume, size=finest, mode="trilinear", align_corners=False))
    return decoder.linear_pred(torch.relu(decoder.linear_fuse(torch.cat(maps, 1))))


def test_coarse_fuse_equals_the_published_one() -> None:
    torch.manual_seed(0)
    decoder = Decoder((8, 16, 24, 32), 3, 32).eval()
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape))
    sizes = [(9, 8, 12), (5, 4, 6), (3, 2, 3), (2, 1, 2)]
    grids = [torch.randn(2, *size, width) for size, width in zip(sizes, (8, 16, 24, 32), strict=True)]
    with torch.inference_mode():
        expected = published_fuse(decoder, grids)
        assert (decoder(grids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_block_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(4, heads=2, sr_ratio=2, mlp_ratio=2, attention_scale="head_dim").double().eval()
    parameters = dict(block.named_parameters())
    grid = torch.randn(1, 2, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(tokens: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(run, (grid, *parameters.values()), fast_mode=True)


def test_one_voxel_in_training_takes_the_running_statistics() -> None:
    torch.manual_seed(0)
    ffn = MixFFN(4, 8)
    grid = torch.randn(1, 1, 1, 1, 4)
    trained = ffn.train()(grid)
    assert ffn.dwconv.bn.num_batches_tracked == 0
    assert torch.equal(trained, ffn.eval()(grid))


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    network = create_segformer3d(in_channels=4, num_classes=3)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
    ffn = network.segformer_encoder.tf_block4[0].mlp
    # A normal of std 0.02 cut at +-2 (not at two deviations) keeps its deviation.
    assert ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert ffn.dwconv.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.02)
    embedding = network.segformer_encoder.embed_2.patch_embeddings
    assert embedding.weight.std().item() == pytest.approx(math.sqrt(2 / (27 * 64)), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dims": (8, 16, 24)}, "embed_dims"),
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"sr_ratios": (0, 1, 1, 1)}, "sr_ratios"),
        ({"num_heads": (1, 3, 3, 4)}, "width 16 can't be split into 3 heads"),
        ({"decoder_dim": 0}, "decoder_dim=0"),
        ({"attention_scale": "sqrt"}, "attention_scale='sqrt'"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SegFormer3D(1, 2, **{**SMALL, **options})
    with pytest.raises(PlanError, match="num_classes=0"):
        create_segformer3d(in_channels=1, num_classes=0)
