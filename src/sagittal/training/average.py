"""The running mean of the weights: what the noise of single steps averages out of."""

from __future__ import annotations

import copy

import torch


class WeightAverage:
    """An exponential moving average of a network's weights; buffers are taken over as they are.

    The share that is kept rises from a tenth to `decay`, so that the first, random
    weights are soon forgotten.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: torch.nn.Module, step: int) -> None:
        """Take in the weights after `step` finished steps."""
        kept = min(self.decay, (1 + step) / (10 + step))
        for mean, weight in zip(self.network.parameters(), network.parameters(), strict=True):
            mean.lerp_(weight, 1 - kept)
        for held, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            held.copy_(buffer)


def new_average(network: torch.nn.Module, decay: float) -> WeightAverage | None:
    """Return an average that starts at the network's weights, None where the plan has none."""
    return WeightAverage(network, decay) if decay > 0 else None
