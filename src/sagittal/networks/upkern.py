"""UpKern: start a network of large depthwise kernels from one that was trained with small ones (arXiv 2303.09975).

The kernels are interpolated, everything else is copied. The same steps serve `transfer`, which goes further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks.transfer_report import Fate, TensorReport, TransferReport
from sagittal.networks.weights import COARSE_HEAD, WORKAROUND, misfit, official_tensors

Weights = nn.Module | Mapping[str, Tensor]
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def upkern(target: Weights, source: Weights) -> TransferReport:
    """Fill `target` in place from `source`, a network of the same configuration but for its kernel sizes.

    Tensors of equal shape are copied. Depthwise kernels, transposed ones and those of a decoder that differ from the
    encoder's included, are interpolated to the target's size (trilinear, in 2D bilinear, align_corners False) and not
    rescaled. Any pair of sizes works, a smaller target too. Heads of deep supervision at the coarse scales may be
    absent (the target's stay fresh) or superfluous (dropped).

    Args:
        target: the network to fill, or its state dict.
        source: a network, a state dict, or a checkpoint that holds one.

    Returns:
        What was copied, interpolated, left fresh or dropped, tensor by tensor; print it.

    Raises:
        PlanError: anything else does not fit; the message names the tensors, and the target is unchanged.
    """
    wanted = state_of(target)
    given = tensors_of(source, wanted)
    depthwise = depthwise_kernels(target)
    moves: list[Move] = []
    missing: list[str] = []
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, own in wanted.items():
        if name not in given:
            if COARSE_HEAD.fullmatch(name):
                moves.append(Move(name, "fresh", None, note="the source has no such head"))
            else:
                missing.append(name)
        elif (move := fitted(name, own, given[name], depthwise)) is not None:
            moves.append(move)
        else:
            misshapen[name] = tuple(given[name].shape), tuple(own.shape)
    left = [name for name in given if name not in wanted]
    unexpected = [name for name in left if name != WORKAROUND and not COARSE_HEAD.fullmatch(name)]
    if missing or unexpected or misshapen:
        raise misfit(
            "UpKern: the source does not fit the target",
            missing,
            unexpected,
            misshapen,
            advice="Only the size of depthwise kernels may differ: build both networks with the same blocks, widths, "
            "channels and classes.",
        )
    return carry_out(moves, wanted, given)


@dataclass(frozen=True)
class Move:
    """What is to become of one tensor of the target; `value` is None where it stays as it is."""

    name: str
    fate: Fate
    value: Tensor | None
    note: str = ""


def state_of(weights: Weights) -> Mapping[str, Tensor]:
    """Return the tensors of a network, which share its memory, or the given state dict.

    Raises:
        PlanError: the state dict holds something else than tensors.
    """
    if isinstance(weights, nn.Module):
        return weights.state_dict()
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"the entry '{name}' of the target is of type {type(value).__name__}. Expected a network or the state "
                "dict of one.",
                code="weights_not_tensors",
            )
    return weights


def tensors_of(weights: Weights, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a source by the names that the target gives them."""
    return official_tensors(weights.state_dict() if isinstance(weights, nn.Module) else weights, wanted)[0]


def depthwise_kernels(weights: Weights) -> frozenset[str]:
    """Return the names of depthwise kernels: known of a network, told by their shape in a state dict."""
    if isinstance(weights, nn.Module):
        return frozenset(
            f"{name}.weight"
            for name, module in weights.named_modules()
            if isinstance(module, _CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels
        )
    return frozenset(
        name
        for name, tensor in weights.items()
        if tensor.ndim in (4, 5) and tensor.shape[1] == 1 and max(tensor.shape[2:]) > 1
    )


def fitted(name: str, own: Tensor, given: Tensor, depthwise: frozenset[str]) -> Move | None:
    """Return how `given` becomes a tensor of `own`'s shape, None where it can't."""
    if given.shape == own.shape:
        return Move(name, "copied", given)
    same_but_kernel = own.ndim == given.ndim and own.ndim in (4, 5) and own.shape[:2] == given.shape[:2]
    if name in depthwise and same_but_kernel and own.shape[1] == 1:
        return Move(name, "interpolated", interpolate_kernel(given, own.shape[2:]))
    return None


def interpolate_kernel(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return depthwise kernels (C, 1, d, h, w) or (C, 1, h, w) at another size, not rescaled, in fp32 or wider."""
    wide = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    mode = "trilinear" if kernel.ndim == 5 else "bilinear"
    return nn.functional.interpolate(wide, size=tuple(size), mode=mode, align_corners=False)


def carry_out(moves: Sequence[Move], wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> TransferReport:
    """Copy into the tensors of `wanted` and return the report; sources that no move names are reported as dropped."""
    with torch.no_grad():
        for move in moves:
            if move.value is not None:
                wanted[move.name].copy_(move.value)
    tensors = [
        TensorReport(
            move.name,
            move.fate,
            tuple(wanted[move.name].shape),
            None if move.value is None else tuple(given[move.name].shape),
            move.note,
        )
        for move in moves
    ]
    dropped = [
        TensorReport(name, "dropped", tuple(tensor.shape), tuple(tensor.shape), "the target has no such tensor")
        for name, tensor in given.items()
        if name not in wanted
    ]
    return TransferReport((*tensors, *dropped))
