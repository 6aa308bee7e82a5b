"""The running mean of the weights: what the noise of single steps averages out of."""

from __future__ import annotations

import copy

import torch


class WeightAverage:
    """An exponential moving average of a network's weights.

    Running statistics of BatchNorm are averaged along with the weights: those of the trained network describe the
    features of its latest weights, not of the mean. Counters and other integers are taken over. The share that is kept
    rises from a tenth to `decay`, so that the first, random weights are soon forgotten; it depends on the step alone,
    so the mean's state is that of its network.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    def start_from(self, network: torch.nn.Module) -> None:
        """Begin at other weights than those that the mean was made with."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: torch.nn.Module, step: int) -> None:
        """Take in the weights after `step` finished steps."""
        kept = min(self.decay, (1 + step) / (10 + step))
        means: list[torch.Tensor] = list(self.network.parameters())
        values: list[torch.Tensor] = list(network.parameters())
        for held, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            if held.is_floating_point():
                means.append(held)
                values.append(buffer)
            else:
                held.copy_(buffer)
        torch._foreach_lerp_(means, values, 1 - kept)


def new_average(network: torch.nn.Module, decay: float) -> WeightAverage | None:
    """Return an average that starts at the network's weights, None where the plan has none."""
    return WeightAverage(network, decay) if decay > 0 else None
