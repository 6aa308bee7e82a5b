"""Muon: which tensors are matrices, how orthogonal their updates are, and torch's own Muon as an oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.networks.build import build_network
from sagittal.networks.ends import network_ends
from sagittal.plan.networks import network_config
from sagittal.training.muon import Muon, matrices_of, orthogonalised


def _with_spectrum(rows: int, columns: int, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))[0]
    return ((left * values) @ right.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (2, 300)])
def test_singular_values_become_nearly_one_and_singular_vectors_stay(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    matrices = [_with_spectrum(*shape, values * scale, dtype) for scale in (1e-6, 1.0, 1e4)]
    made = orthogonalised(matrices)
    assert made.shape == (3, *shape)
    assert made.dtype == dtype
    for matrix, result in zip(matrices, made, strict=True):
        found = torch.linalg.svdvals(result.double())
        assert 0.63 < float(found.min()) <= float(found.max()) < 1.2
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        mixed = left.T @ result.double() @ right.T
        tolerance = 0.1 if dtype == torch.float32 else 1e-6
        assert float((mixed - mixed.diag().diag()).abs().max()) < tolerance


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalised([torch.zeros(3, 5)]), torch.zeros(1, 3, 5))


def _names(network: nn.Module, ends: set[str]) -> set[str]:
    matrices = {id(matrix) for matrix in matrices_of(network, ends)}
    return {name for name, parameter in network.named_parameters() if id(parameter) in matrices}


def test_matrices_of_mednext_are_its_pointwise_convolutions_between_stem_and_heads() -> None:
    config = network_config("mednext-s").replace(channels=4, block_counts=(1,) * 9)

    def build(channels: int, outputs: int) -> nn.Module:
        return build_network(config, channels, outputs)

    network, ends = build(1, 3), network_ends(build, ["MR"], ["a", "b", "c"])
    names = _names(network, {*ends.stems, *ends.heads})
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    expected = {
        name
        for name, shape in shapes.items()
        if len(shape) == 5 and set(shape[2:]) == {1} and not name.startswith(("stem.", "out_"))
    }
    assert names == expected
    assert "up_0.res_conv.weight" in names
    assert not any("conv1" in name for name in names), "depthwise kernels are no matrices"


def test_matrices_of_segformer3d_are_linear_layers_and_dense_convolutions() -> None:
    config = network_config("segformer3d")

    def build(channels: int, outputs: int) -> nn.Module:
        return build_network(config, channels, outputs)

    with torch.device("meta"):
        network = build(1, 3)
    ends = network_ends(build, ["MR"], ["a", "b", "c"])
    left = {name for name, _ in network.named_parameters()} - _names(network, {*ends.stems, *ends.heads})
    weights = {name for name in left if dict(network.named_parameters())[name].ndim > 1}
    assert weights
    assert all("dwconv" in name or name in ends.stems or name in ends.heads for name in weights)


def test_a_parameter_with_two_names_is_left_out_by_either() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    network.alias = network[0]
    assert _names(network, {"alias.weight"}) == {"1.weight"}


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 6)) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own (it came with 2.9)")
def test_plain_matrices_are_trained_as_by_torchs_own() -> None:
    ours, theirs = _pair()
    matrices, others = matrices_of(ours), [value for value in ours.parameters() if value.ndim == 1]
    optimizer = Muon(matrices, others, lr=0.02, weight_decay=0.1, eps=1e-6)
    plain = [value for value in theirs.parameters() if value.ndim == 1]
    oracles = (
        torch.optim.Muon(
            [value for value in theirs.parameters() if value.ndim == 2],
            lr=0.02,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(plain, lr=0.02, weight_decay=0.1, eps=1e-6),
    )
    begun = [value.detach().clone() for value in ours.parameters()]
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        # Drawn, not computed: torch's products are in bf16, and what differs would grow from step to step.
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        for oracle in oracles:
            oracle.step()
    for mine, other, before in zip(ours.parameters(), theirs.parameters(), begun, strict=True):
        difference, change = (mine - other).detach().norm(), (other - before).detach().norm()
        assert difference / change < (0.02 if mine.ndim == 2 else 1e-5)


def test_an_update_has_the_size_of_one_of_adamw() -> None:
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    Muon([weight], [], lr=0.01, weight_decay=0.0).step()
    assert 0.14 * 0.01 < float(weight.detach().square().mean().sqrt()) < 0.22 * 0.01


def test_weights_of_convolutions_keep_their_memory_and_what_has_no_gradient_stays() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(4, 8, 3), nn.ConvTranspose3d(8, 4, 2), nn.Conv3d(4, 4, 1)).to(
        memory_format=torch.channels_last_3d
    )
    frozen = network[2].weight.detach().clone()
    network[2].requires_grad_(False)
    before = network[0].weight.detach().clone()
    matrices = matrices_of(network)
    optimizer = Muon(matrices, [value for value in network.parameters() if value.ndim == 1], lr=0.1, weight_decay=0.1)
    network(torch.randn(1, 4, 5, 6, 7)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(network[0].weight, before)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(network[2].weight, frozen)
    assert network[2].weight not in optimizer.state


def test_the_same_gradients_give_the_same_bits() -> None:
    first, second = _pair()
    for network in (first, second):
        others = [value for value in network.parameters() if value.ndim == 1]
        optimizer = Muon(matrices_of(network), others, lr=0.1, weight_decay=0.0)
        for _ in range(3):
            network.zero_grad()
            network(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
