"""The optimisers of a plan: fused ones take the same steps as torch's plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sagittal.plan.optimizers import SGD, AdamW, Muon, Optimizer
from sagittal.training.optimizers import new_optimizer, set_rate


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv3d(4, 2, 1)).to(
        memory_format=torch.channels_last_3d
    )


def _train(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for seed in range(4):
        optimizer.zero_grad()
        image = torch.randn(2, 1, 5, 6, 7, generator=torch.Generator().manual_seed(seed))
        network(image).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (
            AdamW(learning_rate=0.01, weight_decay=0.1, eps=1e-4, betas=(0.8, 0.9)),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-4, betas=(0.8, 0.9), foreach=False),
        ),
        (
            SGD(learning_rate=0.01, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.99, nesterov=True, foreach=False),
        ),
    ],
)
def test_steps_are_those_of_torchs_plain_optimisers(
    config: Optimizer, plain: Callable[..., torch.optim.Optimizer]
) -> None:
    fused, reference = _network(), _network()
    made = _train(fused, new_optimizer(fused, config))
    for one, other in zip(made, _train(reference, plain(reference.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [AdamW, SGD, Muon])
def test_the_rate_is_a_share_of_the_peak_in_every_group(kind: type[AdamW | SGD | Muon]) -> None:
    optimizer = new_optimizer(_network(), kind(learning_rate=0.02, weight_decay=0.0))
    for factor in (0.5, 0.25):
        set_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.02 * factor] * len(optimizer.param_groups)


def test_muon_holds_every_parameter_once_and_leaves_the_ends_to_adamw() -> None:
    network = _network()
    config = Muon(learning_rate=0.02, weight_decay=0.0)
    optimizer = new_optimizer(network, config, ends={"0.weight"})
    held = {group["orthogonal"]: {id(parameter) for parameter in group["params"]} for group in optimizer.param_groups}
    assert held[True] == {id(network[2].weight)}
    assert held[True] | held[False] == {id(parameter) for parameter in network.parameters()}
    assert not held[True] & held[False]
    _train(network, optimizer)
    assert set(optimizer.state[network[2].weight]) == {"momentum_buffer"}
    assert set(optimizer.state[network[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
