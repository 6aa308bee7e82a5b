"""The running mean of the weights."""

from __future__ import annotations

import torch
from torch import nn

from sagittal.training.average import WeightAverage, new_average


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3))


def test_the_mean_follows_its_formula_with_running_statistics_and_takes_counters_over() -> None:
    network = _network()
    average = WeightAverage(network, 0.6)
    expected = {name: value.double() for name, value in network.state_dict().items()}
    for step in range(6):
        network(torch.randn(2, 1, 4, 5, 6))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * (step + 1))
        average.update(network, step)
        kept = min(0.6, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            expected[name] = value if "num_batches" in name else kept * expected[name] + (1 - kept) * value.double()
    assert (1 + 5) / (10 + 5) < 0.6, "the share that is kept still rises in this test"
    state = average.network.state_dict()
    assert int(state["1.num_batches_tracked"]) == 6
    for name, value in state.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-7)


def test_the_mean_does_not_train_and_is_no_view_of_the_network() -> None:
    network = _network()
    average = new_average(network, 0.9)
    assert average is not None
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    before = average.network[0].weight.clone()
    with torch.no_grad():
        network[0].weight.add_(1)
    assert torch.equal(average.network[0].weight, before)
    average.start_from(network)
    assert torch.equal(average.network[0].weight, network[0].weight)
    assert new_average(network, 0.0) is None
