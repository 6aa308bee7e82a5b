"""The two ends of a network: which of its tensors depend on the input's channels, and which on the outputs.

No list of names is kept: the network is built once more with another channel and once more with another output, and the
tensors whose shape changes are the ends. So this holds for every network that can be built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Build = Callable[[int, int], nn.Module]
"""Makes the network for a number of input channels and a number of outputs."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Axis:
    """The axis of a tensor that grows with a number of channels or outputs: it measures `per_item` x n + `offset`."""

    index: int
    per_item: int = 1
    offset: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether each entry along the axis belongs to one channel, and nothing else lies along it."""
        return self.per_item == 1 and self.offset == 0


@dataclass(frozen=True)
class Ends:
    """A network's ends and what they stand for.

    Attributes:
        channels: names of the input's channels, in order.
        outputs: names of the outputs, in order.
        stems: tensors that depend on the number of channels, with the axis that does.
        heads: tensors that depend on the number of outputs, with the axis that does.
    """

    channels: tuple[str, ...]
    outputs: tuple[str, ...]
    stems: Mapping[str, Axis]
    heads: Mapping[str, Axis]


def network_ends(build: Build, channels: Sequence[str], outputs: Sequence[str]) -> Ends:
    """Find the ends of the network that `build` makes.

    Args:
        build: for example `lambda channels, outputs: MedNeXt(channels, outputs)`; called three times.
        channels: names of the input's channels, in order.
        outputs: names of the outputs, in order.
    """
    base = _shapes(build, len(channels), len(outputs))
    return Ends(
        channels=tuple(channels),
        outputs=tuple(outputs),
        stems=_growing(base, _shapes(build, len(channels) + 1, len(outputs)), len(channels)),
        heads=_growing(base, _shapes(build, len(channels), len(outputs) + 1), len(outputs)),
    )


def _growing(base: Shapes, larger: Shapes, count: int) -> dict[str, Axis]:
    found = {}
    for name, shape in base.items():
        grown = larger.get(name, shape)
        changed = [axis for axis in range(len(shape)) if shape[axis] != grown[axis]]
        if len(changed) == 1:
            axis = changed[0]
            per_item = grown[axis] - shape[axis]
            found[name] = Axis(axis, per_item, shape[axis] - per_item * count)
    return found


def _shapes(build: Build, channels: int, outputs: int) -> Shapes:
    # Building may draw random numbers; the caller's must not depend on that.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                network = build(channels, outputs)
        except (RuntimeError, NotImplementedError):
            # Some networks read numbers off tensors while they are built, which tensors without data can't give.
            network = build(channels, outputs)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
