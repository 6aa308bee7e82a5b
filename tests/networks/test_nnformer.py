"""nnFormer: the contract, published costs, blocks against their definition, any size, bad configurations."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks.build import build_network
from sagittal.networks.cost import multiply_adds, parameters
from sagittal.networks.encoder import set_encoder_frozen
from sagittal.networks.nnformer import (
    Downsampling,
    NNFormer,
    PatchEmbedding,
    SkipAttentionBlock,
    Stage,
    TransformerBlock,
    drop_path,
    drop_path_rates,
)
from sagittal.plan.networks import network_config

SMALL = {
    "embed_dim": 8,
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "patch_size": (4, 4, 4),
    "windows": ((2, 2, 2), (3, 3, 3), (2, 2, 2), (2, 2, 2)),
    "mlp_ratio": 2,
}
FLAT = {
    **SMALL,
    "patch_size": (1, 2, 4),
    "depths": (1, 2, 3, 1),
    "windows": ((2, 3, 4), (3, 2, 2), (5, 4, 3), (2, 2, 2)),
    "strides": ((1, 2, 2), (2, 2, 2), (2, 2, 1)),
}


class TestNNFormer(NetworkContract):
    def build(self) -> nn.Module:
        return NNFormer(IN_CHANNELS, NUM_CLASSES, **SMALL)


def turned(values: tuple[object, ...]) -> tuple[object, ...]:
    """Reverse the axes of a triple, or of each triple."""
    return tuple(turned(value) for value in values) if isinstance(values[0], tuple) else values[::-1]


def test_axes_are_exchanged_where_patches_windows_and_strides_differ() -> None:
    torch.manual_seed(0)
    network = NNFormer(1, 2, **FLAT).double().eval()
    geometry = {name: turned(FLAT[name]) for name in ("patch_size", "windows", "strides")}
    other = NNFormer(1, 2, **{**FLAT, **geometry}).double().eval()
    other.load_state_dict(
        {name: tensor.transpose(2, 4) if tensor.ndim == 5 else tensor for name, tensor in network.state_dict().items()}
    )
    image = torch.randn(1, 1, 14, 20, 33, dtype=torch.float64)
    with torch.inference_mode():
        logits = network(image)
        torch.testing.assert_close(other(image.transpose(2, 4)).transpose(2, 4), logits, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(logits, logits.flip(2))


@pytest.mark.parametrize(
    ("name", "channels", "classes", "size", "published_m", "published_gmac"),
    [
        # Synapse: CT, 13 organs and the background.
        ("nnformer-synapse", 1, 14, (64, 128, 128), 149.5, 211.8),
        # Tumour: four MR sequences, three tumour classes and the background.
        ("nnformer-tumour", 4, 4, (128, 128, 128), 37.6, 63.9),
        # ACDC: cine MR, three structures and the background; its multiply-adds are not published.
        ("nnformer-acdc", 1, 4, (14, 160, 160), 37.2, None),
    ],
)
def test_published_costs_are_met(
    name: str,
    channels: int,
    classes: int,
    size: tuple[int, int, int],
    published_m: float,
    published_gmac: float | None,
) -> None:
    with torch.device("meta"):
        network = build_network(network_config(name), channels, classes)
    assert isinstance(network, NNFormer)
    assert parameters(network) == pytest.approx(published_m * 1e6, rel=0.003)
    measured = multiply_adds(network, (1, channels, *size))
    if published_gmac is not None:
        assert measured == pytest.approx(published_gmac * 1e9, rel=0.001)


def test_a_configuration_arrives_whole() -> None:
    config = network_config("nnformer-acdc").replace(**FLAT, drop_path=0.25)
    network = build_network(config, 1, 2)
    assert str(network) == str(NNFormer(1, 2, **FLAT, drop_path=0.25))
    assert network.encoder[3].blocks[0].drop_path == 0.25


@pytest.fixture(scope="module")
def small() -> NNFormer:
    torch.manual_seed(0)
    return NNFormer(1, 2, **SMALL).eval()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, 40),) * 3))
def test_any_size_comes_back(small: NNFormer, sizes: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert small(torch.zeros(1, 1, *sizes)).shape == (1, 2, *sizes)


@pytest.mark.parametrize("sizes", [(14, 160, 160), (64, 128, 128), (90, 90, 90), (33, 47, 21)])
@pytest.mark.parametrize("name", ["nnformer-synapse", "nnformer-tumour", "nnformer-acdc"])
def test_published_sizes_come_back(name: str, sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = build_network(network_config(name), 1, 3)
        assert network(torch.empty(1, 1, *sizes)).shape == (1, 3, *sizes)


def test_the_published_grids_are_the_papers() -> None:
    network = NNFormer(1, 2, embed_dim=2, num_heads=(1, 1, 1, 1))
    shapes: list[tuple[int, ...]] = []
    for stage in network.encoder:
        stage.register_forward_hook(lambda _module, _inputs, outputs: shapes.append(tuple(outputs[1].shape)))
    network(torch.zeros(1, 1, 64, 128, 128))
    assert shapes == [(1, 32 // 2**stage, 32 // 2**stage, 32 // 2**stage, 2 * 2**stage) for stage in range(4)]


def test_embedding_follows_its_definition() -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(2, 4, (1, 2, 4)).double()
    x = torch.randn(1, 2, 3, 5, 9, dtype=torch.float64)
    strides = [(1, 2, 2), (1, 1, 1), (1, 1, 2), (1, 1, 1)]
    expected = x
    for index, (conv, norm, stride) in enumerate(zip(embedding.convs, embedding.norms, strides, strict=True)):
        assert conv.stride == stride
        expected = nn.functional.conv3d(expected, conv.weight, conv.bias, stride=stride, padding=1)
        expected = expected if index == 3 else nn.functional.gelu(expected)
        expected = norm(expected.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    assert embedding(x).shape == (1, 3, 3, 3, 4)
    torch.testing.assert_close(embedding(x), expected.permute(0, 2, 3, 4, 1))


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one head over all tokens, without positions."""
    weights = (query @ key.T / query.shape[-1] ** 0.5).softmax(-1)
    return weights @ value


def test_skip_attention_follows_its_definition() -> None:
    torch.manual_seed(0)
    block = SkipAttentionBlock(Stage(4, 1, (2, 2, 2), 2), drop_path=0.0).double()
    nn.init.zeros_(block.attention.position_bias)
    nn.init.normal_(block.norm1.weight)
    grid, skip = torch.randn(2, 1, 2, 2, 2, 4, dtype=torch.float64)
    query = block.norm1(grid).reshape(8, 4)
    key, value = block.key_value(block.norm1(skip)).reshape(8, 8).split(4, dim=1)
    found = block.attention.proj(attended(query, key, value)).reshape(grid.shape)
    mixed = grid + skip + found
    torch.testing.assert_close(block(grid, skip), mixed + block.mlp(block.norm2(mixed)))


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_downsampling_follows_its_definition(stride: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = Downsampling(3, stride).double()
    grid = torch.randn(1, 4, 5, 6, 3, dtype=torch.float64)
    volume = layer.norm(nn.functional.gelu(grid)).permute(0, 4, 1, 2, 3)
    expected = nn.functional.conv3d(volume, layer.conv.weight, layer.conv.bias, stride, (stride[0] // 2, 1, 1))
    assert layer.conv.weight.shape[2:] == (2 * stride[0] - 1, 3, 3)
    assert layer(grid).shape == (1, 4 // stride[0], 3, 3, 6)
    torch.testing.assert_close(layer(grid), expected.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("shifted", [False, True])
def test_block_gradients_match_finite_differences(shifted: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(Stage(4, 2, (2, 2, 2), 2), shifted=shifted, drop_path=0.0).double()
    check_gradients(block, torch.randn(1, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True))


def test_skip_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    block = SkipAttentionBlock(Stage(4, 2, (2, 2, 2), 2), drop_path=0.0).double()
    check_gradients(block, *torch.randn(2, 1, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True))


def check_gradients(block: nn.Module, *grids: Tensor) -> None:
    parameters = dict(block.named_parameters())

    def run(*tensors: Tensor) -> Tensor:
        values = dict(zip(parameters, tensors[len(grids) :], strict=True))
        return torch.func.functional_call(block, values, tensors[: len(grids)])

    assert torch.autograd.gradcheck(run, (*grids, *parameters.values()), fast_mode=True)


def test_every_second_block_is_shifted_beginning_after_the_skip() -> None:
    network = NNFormer(1, 2, **{**SMALL, "depths": (3, 2, 2, 1)})
    assert [block.shifted for block in network.encoder[0].blocks] == [False, True, False]
    assert [block.shifted for block in network.decoder[2].blocks] == [True, False]


def test_branches_are_dropped_case_by_case_in_training_only() -> None:
    torch.manual_seed(0)
    branch = torch.ones(1000, 2, 3)
    assert drop_path(branch, 0.25, training=False) is branch
    dropped = drop_path(branch, 0.25, training=True)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_drop_path_rises_from_the_first_block_to_the_last() -> None:
    assert drop_path_rates((2, 1, 2), 0.2) == [pytest.approx([0, 0.05]), [0.1], pytest.approx([0.15, 0.2])]
    assert drop_path_rates((1,), 0.2) == [[0.0]]
    network = NNFormer(1, 2, **SMALL, drop_path=0.5)
    assert network.encoder[3].blocks[0].drop_path == 0.5
    assert network.decoder[0].skip_attention.drop_path == 0
    assert network.decoder[2].blocks[0].drop_path == 0.5
    assert network.encoder[0].blocks[0].drop_path == 0


def test_dropped_paths_change_training_but_not_prediction() -> None:
    torch.manual_seed(0)
    network = NNFormer(1, 2, **SMALL, drop_path=0.9)
    plain = NNFormer(1, 2, **SMALL)
    plain.load_state_dict(copy.deepcopy(network.state_dict()))
    image = torch.randn(1, 1, 16, 20, 33)
    assert torch.equal(network.eval()(image), plain.eval()(image))
    assert not torch.equal(network.train()(image), plain.train()(image))


def test_the_encoder_can_be_frozen() -> None:
    network = NNFormer(1, 2, **SMALL).train()
    set_encoder_frozen(network, True)
    learning = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {"decoder", "expansion"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 7}, "embed_dim=7"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"num_heads": (1, 1, 1)}, "num_heads"),
        ({"num_heads": (1, 3, 1, 1)}, "width 16 can't be split into 3 heads"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"patch_size": (3, 4, 4)}, "patch_size"),
        ({"windows": ((2, 2, 2),) * 3}, "windows"),
        ({"windows": ((2, 2, 0),) * 4}, "windows"),
        ({"strides": ((2, 2, 3),) * 3}, "strides"),
        ({"strides": ((2, 2, 2),) * 4}, "strides"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        NNFormer(1, 2, **{**SMALL, **options})
