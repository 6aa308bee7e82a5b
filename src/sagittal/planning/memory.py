"""Whether a training step fits into memory: measured on the network itself, not by a formula for another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from sagittal.errors import ResourceError
from sagittal.networks.build import build_network
from sagittal.networks.cost import parameters, step_memory_bytes
from sagittal.plan.base import Triple
from sagittal.plan.networks import NetworkConfig

GIB = 2**30
_FLOAT_BYTES = 4
_ADAM_MOMENTS = 2
_LOSS_COPIES = 3
"""Tensors of the logits' size that Dice + CE makes beside the network: probabilities, one-hot targets, a gradient."""

Measure = Callable[[Triple], int]
"""From a patch size to the bytes of a step."""


@dataclass(frozen=True)
class TrainingStep:
    """A network's training step in fp32 with AdamW, whose memory can be measured at any size."""

    network: nn.Module
    in_channels: int
    num_outputs: int
    _measured: dict[tuple[Triple, int], int] = field(default_factory=dict, repr=False, compare=False)

    def memory_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Return the peak of live tensors: network, activations, gradients, optimiser and loss; about a second."""
        if (patch_size, batch_size) not in self._measured:
            self._measured[patch_size, batch_size] = self._measure(patch_size, batch_size)
        return self._measured[patch_size, batch_size]

    def _measure(self, patch_size: Triple, batch_size: int) -> int:
        activations = step_memory_bytes(self.network, (batch_size, self.in_channels, *patch_size), training=True)
        loss = _LOSS_COPIES * batch_size * self.num_outputs * prod(patch_size) * _FLOAT_BYTES
        return activations + loss + _ADAM_MOMENTS * parameters(self.network) * _FLOAT_BYTES

    @property
    def fixed_bytes(self) -> int:
        """What a step takes whatever its batch: parameters, their gradients and the optimiser's moments."""
        return (2 + _ADAM_MOMENTS) * parameters(self.network) * _FLOAT_BYTES


def training_step(config: NetworkConfig, in_channels: int, num_outputs: int) -> TrainingStep:
    """Return the step of the network that `config` describes; no weight is allocated or drawn."""
    with torch.device("meta"):
        return TrainingStep(build_network(config, in_channels, num_outputs), in_channels, num_outputs)


def largest_that_fits(
    sizes: Sequence[Triple], measure: Measure, limit_bytes: int, *, batch: int = 2
) -> tuple[Triple, int]:
    """Return the first of `sizes`, which shrink from one to the next, whose step fits, and its measured bytes.

    Memory is close to linear in voxels: a line through two measurements says which size to measure next, so that few
    measurements are needed. The returned size has been measured, and the next larger one is over the limit by
    measurement or by that line.

    Args:
        sizes: from the largest to the smallest.
        measure: from a size to the bytes of a step of `batch` patches.
        limit_bytes: what a step may take.
        batch: for the message.

    Raises:
        ResourceError: even the smallest does not fit.
    """
    assert sizes, "no sizes to choose from"
    used = measure(sizes[0])
    if used <= limit_bytes:
        return sizes[0], used
    over, over_bytes = 0, used
    fits, fits_bytes = len(sizes) - 1, measure(sizes[-1]) if len(sizes) > 1 else used
    if fits_bytes > limit_bytes:
        smallest = "x".join(map(str, sizes[-1]))
        raise ResourceError(
            f"a training step of {batch} patches of {smallest} voxels needs {fits_bytes / GIB:.2f} GiB; "
            f"{limit_bytes / GIB:.2f} GiB are allowed. Allow more (--memory-gib) or choose a smaller network.",
            code="memory",
        )
    while fits - over > 1:
        low, high = prod(sizes[fits]), prod(sizes[over])
        share = (limit_bytes - fits_bytes) / max(1, over_bytes - fits_bytes)
        reachable = low + share * (high - low)
        guess = next((i for i in range(over + 1, fits) if prod(sizes[i]) <= reachable), None)
        if guess is None:
            break
        guess_bytes = measure(sizes[guess])
        if guess_bytes <= limit_bytes:
            fits, fits_bytes = guess, guess_bytes
        else:
            over, over_bytes = guess, guess_bytes
    return sizes[fits], fits_bytes
