"""A block's tail with many channels on a GPU: whole matrix products, for a few thousand voxels at a time.

With 256 channels and more a tile's sums fill the registers, and the libraries' products are faster than a fused kernel
that has to put them aside. Volumes are small there, so what the products exchange stays in the L2 cache; large ones
are computed in parts, so that the hidden activation takes `_HIDDEN` numbers at the most. Letters as in `gpu_block`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from sagittal.kernels.gpu_block import Tail, Up

_HIDDEN = 1 << 24


class _Part(NamedTuple):
    """Some voxels of a case: h standardised (float32) and with the affine part, and in front of and behind the GELU."""

    case: int
    voxels: slice
    standard: Tensor
    normed: Tensor
    wide: Tensor
    response: Tensor


def forward(h: Tensor, residual: Tensor | None, tail: Tail, y: Tensor) -> None:
    """Write what `gpu_block.forward` returns into y."""
    if tail.up is not None:
        small = y.new_empty((*h.shape[:2], y.shape[2]))
        forward(h, None, tail._replace(up=None), small)
        _place(small, residual, tail.up, y)
        return
    contract, bias = _matrix(tail.weights[4], h), tail.weights[5].to(h.dtype)
    for part in _parts(h, tail):
        ours = torch.addmm(bias, _responded(part, tail), contract.t())
        if residual is not None:
            ours = ours + residual[part.case, part.voxels]
        y[part.case, part.voxels] = ours


def gradients(h: Tensor, grad_y: Tensor, tail: Tail, pull: Tensor | None) -> list[Tensor]:
    """Return what the backward kernels do, in their order: with sums for each case."""
    grad_y, tail = _behind_front(grad_y, tail)
    expand, contract = _matrix(tail.weights[2], h), _matrix(tail.weights[4], h)
    cases, _, channels = h.shape
    hidden, outputs = expand.shape[0], contract.shape[0]
    along = torch.empty_like(h)
    shapes = [(2, channels), (outputs,), (hidden, channels), (hidden, outputs), (hidden,)]
    sums = [h.new_zeros((cases, *shape), dtype=torch.float32) for shape in shapes]
    for part in _parts(h, tail):
        grad = grad_y[part.case, part.voxels]
        narrow = grad.to(h.dtype)
        back = narrow @ contract
        if pull is not None and tail.gain is not None:
            back = (back * tail.gain[part.case] + part.response * pull[part.case]).to(h.dtype)
        inner = torch.ops.aten.gelu_backward(back, part.wide)
        by_normed = inner @ expand
        straight = by_normed.float()
        found = [
            torch.stack([straight.sum(0), (straight * part.standard).sum(0)]),
            grad.sum(0, dtype=torch.float32),
            inner.t() @ part.normed,
            _responded(part, tail).t() @ narrow,
            inner.sum(0, dtype=torch.float32),
        ]
        for total, share in zip(sums, found, strict=True):
            total[part.case] += share
        if tail.moments is None:
            straight = _through_layer_norm(
                straight * tail.weights[0].float(), part.standard, h[part.case, part.voxels], tail.eps
            )
        along[part.case, part.voxels] = straight
    # From the hidden channels' sums instead of by_normed, which is rounded once more.
    sums[0][:, 0] = sums[4] @ expand.float()
    return [along, *sums]


def hidden_sums(h: Tensor, grad_y: Tensor | None, tail: Tail) -> Tensor:
    """Return what `gpu_block.hidden_sums` does."""
    if grad_y is not None:
        grad_y, tail = _behind_front(grad_y, tail)
    contract = _matrix(tail.weights[4], h)
    sums = h.new_zeros((h.shape[0], contract.shape[1]), dtype=torch.float32)
    for part in _parts(h, tail):
        response = part.response.float()
        other = response if grad_y is None else grad_y[part.case, part.voxels].to(h.dtype) @ contract
        sums[part.case] += (response * other).sum(0)
    return sums


def _place(small: Tensor, residual: Tensor | None, up: Up, y: Tensor) -> None:
    """Write residual + small behind the front planes + odd into an up block's result."""
    cases, _, outputs = y.shape
    grid = y.view(cases, *up.full, outputs)
    if residual is None:
        y.zero_()
    else:
        y.copy_(residual)
    behind = grid[:, *(slice(int(twice), None) for twice in up.doubled)]
    behind.add_(small.view(cases, *up.size, outputs))
    if up.odd is not None:
        odd = behind[:, *(slice(None, None, 1 + twice) for twice in up.doubled)]
        odd.add_(up.odd.view(odd.shape))


def _behind_front(grad_y: Tensor, tail: Tail) -> tuple[Tensor, Tail]:
    """Return an up block's gradient at the voxels of h, and the tail without the rest."""
    if tail.up is None:
        return grad_y, tail
    grid = grad_y.view(grad_y.shape[0], *tail.up.full, grad_y.shape[2])
    behind = grid[:, *(slice(int(twice), None) for twice in tail.up.doubled)]
    return behind.flatten(1, 3), tail._replace(up=None)


def _parts(h: Tensor, tail: Tail) -> Iterator[_Part]:
    norm_weight, norm_bias, expand, expand_bias = tail.weights[:4]
    matrix, bias = _matrix(expand, h), expand_bias.to(h.dtype)
    step = max(1, _HIDDEN // matrix.shape[0])
    for case in range(h.shape[0]):
        for start in range(0, h.shape[1], step):
            voxels = slice(start, start + step)
            x = h[case, voxels].float()
            if tail.moments is None:
                standard = F.layer_norm(x, x.shape[1:], eps=tail.eps)
            else:
                standard = (x - tail.moments[0][case]) * tail.moments[1][case]
            normed = torch.addcmul(norm_bias.float(), standard, norm_weight.float()).to(h.dtype)
            wide = torch.addmm(bias, normed, matrix.t())
            yield _Part(case, voxels, standard, normed, wide, F.gelu(wide))


def _responded(part: _Part, tail: Tail) -> Tensor:
    """Return what goes into the contraction: GRN's result, if there is GRN."""
    if tail.gain is None or tail.offset is None:
        return part.response
    return torch.addcmul(tail.offset.flatten().float(), part.response, tail.gain[part.case]).to(part.response.dtype)


def _through_layer_norm(along: Tensor, standard: Tensor, h: Tensor, eps: float) -> Tensor:
    scale = (h.float().var(1, correction=0, keepdim=True) + eps).rsqrt()
    return (along - along.mean(1, keepdim=True) - standard * (along * standard).mean(1, keepdim=True)) * scale


def _matrix(weight: Tensor, h: Tensor) -> Tensor:
    return weight.flatten(1).to(h.dtype)
