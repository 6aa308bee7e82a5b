"""UNETR and Swin UNETR: the contract, MONAI's own networks as oracle, their published costs, learned positions."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import swin_unetr, unetr
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import Tensor, nn

from sagittal.networks.build import build_network
from sagittal.networks.cost import multiply_adds, parameters
from sagittal.networks.monai_networks import UNETR, SwinUNETR, shifted_window_mask
from sagittal.plan.networks import network_config

Triple = tuple[int, int, int]

SMALL_UNETR = {"feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2}
SMALL_SWIN = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4)}


class TestUNETR(NetworkContract):
    def build(self) -> nn.Module:
        return UNETR(IN_CHANNELS, NUM_CLASSES, input_size=(32, 48, 16), **SMALL_UNETR)

    def swap(self, network: nn.Module) -> nn.Module:
        """Swap the grid of learned positions too."""
        swapped = super().swap(network)
        swapped.position_grid = network.position_grid[::-1]
        with torch.no_grad():
            table = swapped.vit.patch_embedding.position_embeddings
            table.copy_(table.unflatten(1, network.position_grid).transpose(1, 3).flatten(1, 3))
        return swapped


class TestSwinUNETR(NetworkContract):
    """With windows of two tokens, which no grid cuts short: cut windows are MONAI's and know no axes."""

    def build(self) -> nn.Module:
        # With these weights no channel of the bottleneck is alike in its two voxels, of which InstanceNorm would make
        # large numbers out of rounding errors.
        torch.manual_seed(7)
        return SwinUNETR(IN_CHANNELS, NUM_CLASSES, window_size=2, **SMALL_SWIN)

    def swap(self, network: nn.Module) -> nn.Module:
        """Swap the tables of relative positions, and the order in which patches of 2x2x2 tokens are merged."""
        swapped = super().swap(network)
        with torch.no_grad():
            for name, parameter in swapped.named_parameters():
                if name.endswith("relative_position_bias_table"):
                    parameter.copy_(parameter.unflatten(0, (3, 3, 3)).transpose(0, 2).flatten(0, 2))
                elif ".downsample." in name:
                    # In MONAI's order of corners: 000 100 010 001 110 101 011 111.
                    corners = parameter.unflatten(-1, (8, -1))
                    parameter.copy_(corners[..., [0, 3, 2, 1, 6, 5, 4, 7], :].flatten(-2))
        return swapped


def perturbed(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


def outputs(oracle: nn.Module, network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    network.load_state_dict(oracle.state_dict())
    with torch.inference_mode():
        return oracle(image), network.eval()(image)


def test_unetr_is_monais_at_its_input_size() -> None:
    torch.manual_seed(0)
    oracle = perturbed(unetr.UNETR(IN_CHANNELS, NUM_CLASSES, (32, 48, 16), **SMALL_UNETR))
    network = UNETR(IN_CHANNELS, NUM_CLASSES, input_size=(32, 48, 16), **SMALL_UNETR)
    expected, logits = outputs(oracle, network, torch.randn(2, IN_CHANNELS, 32, 48, 16))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", [(32, 64, 32), (64, 32, 96)])
def test_swin_unetr_is_monais_at_multiples_of_32(sizes: Triple) -> None:
    torch.manual_seed(0)
    oracle = perturbed(swin_unetr.SwinUNETR(IN_CHANNELS, NUM_CLASSES, **SMALL_SWIN))
    network = SwinUNETR(IN_CHANNELS, NUM_CLASSES, **SMALL_SWIN)
    expected, logits = outputs(oracle, network, torch.randn(1, IN_CHANNELS, *sizes))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("name", "millions", "giga"), [("unetr", 92.8, 73.2), ("swinunetr", 62.2, 318.5), ("3d-uxnet", 53.0, 577.0)]
)
def test_costs_are_the_published_ones(name: str, millions: float, giga: float) -> None:
    """One channel of 96x96x96 voxels, 14 classes; transposed convolutions count once per input voxel."""
    with torch.device("meta"):
        network = build_network(network_config(name), 1, 14)
    assert parameters(network) / 1e6 == pytest.approx(millions, rel=0.01)
    assert multiply_adds(network, (1, 1, 96, 96, 96)) / 1e9 == pytest.approx(giga, rel=0.01)


def test_positions_are_interpolated_for_other_grids() -> None:
    torch.manual_seed(0)
    network = UNETR(1, 2, input_size=(32, 48, 16), **SMALL_UNETR)
    assert network._positions((2, 3, 1)) is network.vit.patch_embedding.position_embeddings
    with torch.no_grad():
        ramp = torch.arange(2.0).view(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 12).flatten(1, 3)
        network.vit.patch_embedding.position_embeddings.copy_(ramp)
        finer = network._positions((4, 3, 2)).view(4, 3, 2, 12)
    # Half a cell from the ends the positions stay, between the centres they grow evenly.
    assert torch.allclose(finer[:, 0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert torch.equal(finer, finer[:, :1, :1, :1].expand_as(finer))


@pytest.mark.parametrize(
    ("sizes", "window", "shift"), [((4, 6, 8), (2, 3, 4), (1, 1, 2)), ((3, 8, 4), (3, 4, 2), (0, 2, 1))]
)
def test_masks_are_monais(sizes: Triple, window: Triple, shift: Triple) -> None:
    image = torch.empty(1, dtype=torch.float64)
    mask = shifted_window_mask(sizes, window, shift, image)
    assert torch.equal(mask, swin_unetr.compute_mask(sizes, window, shift, "cpu").double())
    assert {float(value) for value in mask.unique()} == {0.0, -100.0}


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    plain = SwinUNETR(1, 2, **SMALL_SWIN)
    frugal = SwinUNETR(1, 2, **SMALL_SWIN, checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 32, 32, 64)
    for network in (plain, frugal):
        network(image).square().mean().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_networks_without_data_are_built_without_weights() -> None:
    with torch.device("meta"):
        network = SwinUNETR(1, 2, **SMALL_SWIN)
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    twin = copy.deepcopy(network)
    assert twin(torch.empty(1, 1, 30, 30, 30, device="meta")).shape == (1, 2, 30, 30, 30)
