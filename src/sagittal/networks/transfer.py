"""Carry a network's weights into one for other channels, other outputs or other kernel sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sagittal.networks.ends import Axis, Ends
from sagittal.networks.transfer_report import TransferReport
from sagittal.networks.upkern import Move, Weights, carry_out, depthwise_kernels, fitted, tensors_of
from sagittal.networks.weights import COARSE_HEAD, WORKAROUND, misfit


def transfer(target: nn.Module, source: Weights, *, target_ends: Ends, source_ends: Ends) -> TransferReport:
    """Fill `target` in place from the weights of a network of the same architecture.

    - Where the outputs differ in number, name or order, the heads stay fresh.
    - Where the channels differ, each channel of the target gets the weights of the source's channel of that name (in
      any case); one that the source does not know gets the mean over all of the source's channels.
    - Depthwise kernels of another size are interpolated, as `upkern` does.
    - Heads of deep supervision may be absent or superfluous. Everything else must fit.

    Args:
        target: the network to fill; its present values are what stays fresh.
        source: a network, a state dict, or a checkpoint that holds one.
        target_ends: the target's channels, outputs and the tensors that hold them; see `network_ends`.
        source_ends: the source's.

    Returns:
        What was copied, interpolated, adapted, left fresh or dropped, tensor by tensor; print it.

    Raises:
        PlanError: a tensor does not fit; the message names it, and the target is unchanged.
    """
    wanted = target.state_dict()
    given = tensors_of(source, wanted)
    depthwise = depthwise_kernels(target)
    same_channels = _folded(target_ends.channels) == _folded(source_ends.channels)
    same_outputs = target_ends.outputs == source_ends.outputs
    has_heads = any(name in given for name in target_ends.heads)
    moves: list[Move] = []
    missing: list[str] = []
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, own in wanted.items():
        move: Move | None
        if name in target_ends.heads and not same_outputs:
            move = Move(name, "fresh", None, note="other outputs")
        elif name not in given:
            if name not in target_ends.heads or not has_heads:
                missing.append(name)
                continue
            move = Move(name, "fresh", None, note="the source has no such head")
        elif name in target_ends.stems and not same_channels:
            move = _adapted(name, own, given[name], target_ends, source_ends)
        else:
            move = fitted(name, own, given[name], depthwise)
        if move is None:
            misshapen[name] = tuple(given[name].shape), tuple(own.shape)
        else:
            moves.append(move)
    optional = {WORKAROUND, *wanted, *source_ends.heads}
    unexpected = [name for name in given if name not in optional and not COARSE_HEAD.fullmatch(name)]
    if missing or unexpected or misshapen:
        raise misfit(
            f"the weights can't be carried into this {type(target).__name__}",
            missing,
            unexpected,
            misshapen,
            advice="Only outputs, input channels and the size of depthwise kernels may differ.",
        )
    return carry_out(moves, wanted, given)


def _adapted(name: str, own: Tensor, given: Tensor, target: Ends, source: Ends) -> Move | None:
    """Return a stem's weights for the target's channels, None where its shape does not tell which belong to which."""
    axis: Axis = target.stems[name]
    counts = len(target.channels), len(source.channels)
    if not axis.is_plain or own.ndim != given.ndim or (own.shape[axis.index], given.shape[axis.index]) != counts:
        return None
    if own.select(axis.index, 0).shape != given.select(axis.index, 0).shape:
        return None
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    chosen = _matches(target.channels, source.channels)
    parts = [wide.mean(axis.index) if index is None else wide.select(axis.index, index) for index in chosen]
    told = [
        f"{channel} <- {'mean of ' + ', '.join(source.channels) if index is None else source.channels[index]}"
        for channel, index in zip(target.channels, chosen, strict=True)
    ]
    return Move(name, "adapted", torch.stack(parts, dim=axis.index), note="; ".join(told))


def _matches(target: Sequence[str], source: Sequence[str]) -> list[int | None]:
    """Return for each channel of the target the source's of the same name; each of the source's serves once."""
    free: list[str | None] = list(_folded(source))
    chosen: list[int | None] = []
    for name in _folded(target):
        index = free.index(name) if name in free else None
        if index is not None:
            free[index] = None
        chosen.append(index)
    return chosen


def _folded(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.strip().casefold() for name in names)
