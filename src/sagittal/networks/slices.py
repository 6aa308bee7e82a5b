"""Let a network of two spatial axes take volumes of one slice, so that all around it sees (N, C, 1, H, W) only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sagittal.errors import DataError


def as_slices(network: nn.Module) -> nn.Module:
    """Make `network` take (N, C, 1, H, W) for its (N, C, H, W) and give logits (N, K, 1, H, W), and return it.

    It stays the module that it was, changed in place by hooks: its weights keep their names, and code that asks for its
    class gets its answer. Only calling it is changed, not `forward` or other methods.
    """
    network.register_forward_pre_hook(_to_slices)
    network.register_forward_hook(_to_volumes)
    return network


def _to_slices(_network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    volume, *others = inputs
    if volume.ndim != 5 or volume.shape[2] != 1:
        raise DataError(
            f"a network of slices was given a tensor of shape {tuple(volume.shape)}. Expected (N, C, 1, H, W): one "
            "slice at a time, along the first spatial axis.",
            code="input_axes",
        )
    return (volume.squeeze(2), *others)


def _to_volumes(_network: nn.Module, _inputs: tuple[Any, ...], output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(output, Tensor):
        return output.unsqueeze(2)
    return [logits.unsqueeze(2) for logits in output]
