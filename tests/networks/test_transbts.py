"""TransBTS: the contract, published costs, parts against their definition, positions, bad configurations."""

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
from sagittal.networks.transbts import Bottleneck, DecoderBlock, EncoderBlock, TransBTS, TransformerLayer, Upsampling
from sagittal.plan.networks import network_config

SMALL = {"base_channels": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 24, "input_size": (24, 24, 24)}


class TestTransBTS(NetworkContract):
    def build(self) -> nn.Module:
        return TransBTS(IN_CHANNELS, NUM_CLASSES, **SMALL)

    @pytest.fixture
    def network(self) -> nn.Module:
        """Change all parameters, convolutions little: what they amplify, BatchNorm does not tame in eval mode."""
        torch.manual_seed(0)
        network = self.build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_((0.02 if parameter.ndim == 5 else 0.1) * torch.randn(parameter.shape))
        return network.eval()


def test_published_costs_are_met() -> None:
    # Four MR sequences at 128^3; three tumour classes and the background.
    with torch.device("meta"):
        network = build_network(network_config("transbts"), 4, 4)
    assert isinstance(network, TransBTS)
    assert parameters(network) == pytest.approx(32.8e6, rel=0.005)
    assert multiply_adds(network, (1, 4, 128, 128, 128)) == pytest.approx(322.7e9, rel=0.01)


def test_a_configuration_arrives_whole() -> None:
    options = {**SMALL, "base_channels": 32, "input_size": (8, 16, 24), "dropout": 0.25}
    network = build_network(network_config("transbts").replace(**options), 1, 2)
    assert str(network) == str(TransBTS(1, 2, **options))
    assert network.bottleneck.positions.shape == (1, 16, 1, 2, 3)
    assert network.bottleneck.layers[0].dropout == 0.25
    assert network.bottleneck.layers[0].heads == 2


@pytest.fixture(scope="module")
def small() -> TransBTS:
    torch.manual_seed(0)
    return TransBTS(1, 2, **SMALL).eval()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, 33),) * 3))
def test_any_size_comes_back(small: TransBTS, sizes: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert small(torch.zeros(1, 1, *sizes)).shape == (1, 2, *sizes)


@pytest.mark.parametrize("sizes", [(14, 160, 160), (64, 128, 128), (90, 90, 90), (33, 47, 21)])
def test_published_sizes_come_back(sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = build_network(network_config("transbts"), 1, 3)
        assert network(torch.empty(1, 1, *sizes)).shape == (1, 3, *sizes)


def test_the_transformer_sees_an_eighth_of_the_size(small: TransBTS) -> None:
    shapes: list[torch.Size] = []
    handle = small.bottleneck.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    with torch.inference_mode():
        small(torch.zeros(1, 1, 16, 33, 24))
    handle.remove()
    assert shapes == [(1, 64, 2, 5, 3)]


def test_positions_are_added_as_they_are_at_the_size_they_are_made_for() -> None:
    torch.manual_seed(0)
    bottleneck = Bottleneck(8, 4, (2, 3, 4), depth=1, heads=1, hidden=4, dropout=0.0).eval()
    nn.init.normal_(bottleneck.positions)
    tokens: list[Tensor] = []
    bottleneck.layers.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0]))
    for sizes in [(2, 3, 4), (4, 3, 4)]:
        x = torch.randn(1, 8, *sizes)
        bottleneck(x)
        embedded = bottleneck.embedding(torch.relu(bottleneck.norm(x)))
        added = tokens[-1].transpose(1, 2).unflatten(2, sizes) - embedded
        if sizes == (2, 3, 4):
            torch.testing.assert_close(added, bottleneck.positions)
    # Twice as many tokens along D: the outer ones take the outer positions, the inner ones a mix of both.
    one, other = bottleneck.positions.unbind(2)
    torch.testing.assert_close(added[:, :, 0], one)
    torch.testing.assert_close(added[:, :, 1], 0.75 * one + 0.25 * other)


def test_transformer_layer_follows_its_definition() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(6, heads=2, hidden=8, dropout=0.0).double()
    tokens = torch.randn(1, 5, 6, dtype=torch.float64)
    query, key, value = layer.query_key_value(layer.norm1(tokens))[0].chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (query[:, part] @ key[:, part].T / 3**0.5).softmax(-1)
        heads.append(weights @ value[:, part])
    mixed = tokens + layer.proj(torch.cat(heads, -1))
    expected = mixed + layer.fc2(nn.functional.gelu(layer.fc1(layer.norm2(mixed))))
    torch.testing.assert_close(layer(tokens), expected)


def test_upsampling_follows_its_definition() -> None:
    torch.manual_seed(0)
    layer = Upsampling(4)
    x, skip = torch.randn(1, 4, 2, 3, 2), torch.randn(1, 2, 3, 6, 4)
    doubled = nn.functional.conv_transpose3d(layer.reduction(x), layer.expansion.weight, layer.expansion.bias, stride=2)
    torch.testing.assert_close(layer(x, skip), layer.fusion(torch.cat([skip, doubled[:, :, :3]], 1)))


def test_block_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    check_gradients(EncoderBlock(16), torch.randn(1, 16, 2, 3, 2))
    check_gradients(DecoderBlock(2, 2, residual=True), torch.randn(2, 2, 2, 3, 2))
    check_gradients(TransformerLayer(4, heads=2, hidden=6, dropout=0.0), torch.randn(1, 5, 4))


def check_gradients(block: nn.Module, x: Tensor) -> None:
    block = block.double().train()
    parameters = dict(block.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x.double().requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_dropout_changes_training_but_not_prediction() -> None:
    torch.manual_seed(0)
    network = TransBTS(1, 2, **SMALL, dropout=0.5)
    plain = TransBTS(1, 2, **SMALL)
    plain.load_state_dict(copy.deepcopy(network.state_dict()))
    image = torch.randn(1, 1, 16, 20, 33)
    assert torch.equal(network.eval()(image), plain.eval()(image))
    assert not torch.equal(network.train()(image), plain.train()(image))


def test_the_encoder_can_be_frozen() -> None:
    network = TransBTS(1, 2, **SMALL).train()
    set_encoder_frozen(network, True)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    learning = {".".join(name.split(".")[: 2 if name.startswith("bottleneck") else 1]) for name in names}
    assert learning == {"bottleneck.reduction", "bottleneck.refinement", "upsamplings", "decoder", "head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 12}, "base_channels=12"),
        ({"depth": 0}, "depth=0"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"num_heads": 3}, "width 16 can't be split into 3 heads"),
        ({"input_size": (0, 8, 8)}, "input_size"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TransBTS(1, 2, **{**SMALL, **options})
