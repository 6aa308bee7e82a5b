"""The fused tail of a MedNeXt block on a GPU as PyTorch operators: for autograd, torch.compile and the rest.

For blocks that are not computed as a whole (`gpu_block_autograd`), because plain PyTorch convolves faster, say.
`sagittal::tail` takes what the CPU's `sagittal::expand_contract` does not: statistics that came with the depthwise
convolution, the norm over channels, GRN. torch.compile, export and fake tensors see its shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sagittal.kernels import choice, gpu_block, gpu_grn
from sagittal.kernels.gpu_block import Tail
from sagittal.kernels.gpu_block_autograd import drawn, drawn_volume, plain_tail
from sagittal.kernels.gpu_block_whole import How
from sagittal.kernels.gpu_grn import Responses


def tail_on_gpu(
    h: Tensor, weights: Sequence[Tensor], residual: Tensor | None, grn: tuple[Tensor, Tensor] | None, how: How
) -> Tensor | None:
    """Return `block_tail`, or None where the Triton kernels are not to compute it.

    Args:
        h: as in `block_tail`.
        weights: as in `block_tail`.
        residual: as in `block_tail`.
        grn: gamma and beta, or None.
        how: norm, epsilon and kind of GRN; the rest is not looked at.
    """
    h, residual = choice.as_autocast(h), None if residual is None else choice.as_autocast(residual)
    if choice.way(h, residual, *weights, *(grn or ())) is None:
        return None
    kind = 0 if grn is None else 2 if how.by_sum else 1
    widths = (h.shape[1], weights[2].shape[0], weights[4].shape[0])
    details = (*widths, int(how.layer), kind, int(residual is not None))
    if not choice.decide(choice.job_of("tail of any norm", h, details, [residual, *weights]), _rivals):
        return None
    return _with(h, weights, residual, grn, how)


def _with(
    h: Tensor, weights: Sequence[Tensor], residual: Tensor | None, grn: tuple[Tensor, Tensor] | None, how: How
) -> Tensor:
    responses = None if grn is None else Responses(*grn, how.by_sum)
    return block_tail(h, weights, grn=responses, residual=residual, eps=how.eps, layer_norm=how.layer)


def _rivals(job: choice.Job, size: tuple[int, int, int]) -> choice.Rivals:
    """Return both forms of a tail for a trial."""
    channels, wide, outputs, layer, kind, is_added = job.details
    how = How(layer=bool(layer), by_sum=kind == 2)
    shapes = [(channels,), (channels,), (wide, channels), (wide,), (outputs, wide), (outputs,)]
    shapes += [(wide,), (wide,)] if kind else []
    tensors = [drawn_volume(channels, size, job, seed=0)]
    tensors += [drawn(shape, job, seed=2 + index) for index, shape in enumerate(shapes)]
    if is_added:
        tensors.append(drawn_volume(outputs, size, job, seed=1))

    def sorted_out(given: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None, Tensor | None]:
        return list(given[1:7]), (given[7], given[8]) if kind else None, given[-1] if is_added else None

    def kernels(*given: Tensor) -> Tensor:
        weights, grn, residual = sorted_out(given)
        return _with(given[0], weights, residual, grn, how)

    def plain(*given: Tensor) -> Tensor:
        weights, grn, residual = sorted_out(given)
        y = plain_tail(given[0], weights, grn, how)
        return y if residual is None else residual + y

    return choice.Rivals(kernels, plain, tensors)


def block_tail(
    h: Tensor,
    weights: Sequence[Tensor],
    *,
    moments: tuple[Tensor, Tensor] | None = None,
    grn: Responses | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    layer_norm: bool = False,
) -> Tensor:
    """Return residual + contract(GRN(GELU(expand(norm(h))))) by the Triton kernels, differentiable.

    Args:
        h: (N, C, D, H, W) or (N, C, H, W), any memory format; float32, bfloat16 or float16.
        weights: norm_weight (C,), norm_bias (C,), expand (R, C), expand_bias (R,), contract (O, R), contract_bias (O,)
            of any of these dtypes; the matrices may keep trailing axes of size 1.
        moments: each case's and channel's mean and 1 / sqrt(variance + eps) over space, (N, C) float32, where they are
            known already; the gradient at h goes through them all the same. One pass over h where they are not.
        grn: response normalisation behind the GELU.
        residual: (N, O, ...) of h's size, or None.
        eps: added to the variance.
        layer_norm: normalise each voxel over its channels, instead of each channel over space.
    """
    known: list[Tensor] = []
    if not layer_norm:
        with torch.no_grad():
            known = [part.detach() for part in (_moments(h.detach(), eps) if moments is None else moments)]
    responding = [] if grn is None else [grn.gamma, grn.beta]
    by_sum = grn is not None and grn.by_sum
    y: Tensor = _tail(h, known, residual, eps, by_sum, [*weights, *responding])[0]
    return y


def rows(x: Tensor) -> Tensor:
    """Return (N, C, ...) as dense (N, L, C), a view where the memory already lies so."""
    return x.movedim(1, -1).flatten(1, -2).contiguous()


def volume(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return rows (N, L, C) as (N, C, *size), channels-last."""
    return x.view(x.shape[0], *size, x.shape[2]).movedim(-1, 1)


def empty_volume(h: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return an empty (N, channels, ...) of h's size that lies in memory as `volume` does."""
    return h.new_empty((h.shape[0], *h.shape[2:], channels), dtype=dtype).movedim(-1, 1)


def wider(h: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of the result."""
    return h.dtype if residual is None else torch.promote_types(h.dtype, residual.dtype)


def shaped(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients in the shapes and dtypes of what they belong to, each with memory of its own."""
    return [
        grad.reshape(weight.shape).to(weight.dtype).clone(memory_format=torch.contiguous_format)
        for grad, weight in zip(grads, weights, strict=True)
    ]


@torch.library.custom_op("sagittal::channel_moments", mutates_args=())
def _moments(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return gpu_block.moments(rows(h), eps)


@torch.library.custom_op("sagittal::tail", mutates_args=())
def _tail(
    h: Tensor, moments: Sequence[Tensor], residual: Tensor | None, eps: float, by_sum: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return y and the response norms (N, R), empty without GRN; moments: two or, for the layer norm, none."""
    dense, given = rows(h), None if residual is None else rows(residual)
    tail, grn = _described(moments, eps, by_sum, weights)
    if grn is None:
        y, norms = gpu_block.forward(dense, given, tail), h.new_empty((0,), dtype=torch.float32)
    else:
        y, norms = gpu_grn.forward(dense, given, tail, grn)
    return volume(y, h.shape[2:]), norms


@torch.library.custom_op("sagittal::tail_backward", mutates_args=())
def _tail_grad(
    h: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    norms: Tensor,
    eps: float,
    by_sum: bool,
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients at h and at the weights."""
    tail, grn = _described(moments, eps, by_sum, weights)
    extra: tuple[Tensor, ...] = ()
    if grn is None:
        grads = gpu_block.backward(rows(h), rows(grad), tail)
    else:
        grads, extra = gpu_grn.backward(rows(h), rows(grad), tail, grn, norms)
    return [volume(grads.h, h.shape[2:]), *shaped((*grads.weights, *extra), weights)]


def _described(
    moments: Sequence[Tensor], eps: float, by_sum: bool, weights: Sequence[Tensor]
) -> tuple[Tail, Responses | None]:
    known = (moments[0], moments[1]) if moments else None
    grn = Responses(weights[6], weights[7], by_sum) if len(weights) > 6 else None
    return Tail(known, weights[:6], eps), grn


@_moments.register_fake
def _(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape[:2], dtype=torch.float32), h.new_empty(h.shape[:2], dtype=torch.float32)


@_tail.register_fake
def _(
    h: Tensor, moments: Sequence[Tensor], residual: Tensor | None, eps: float, by_sum: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    y = empty_volume(h, weights[4].shape[0], wider(h, residual))
    shape = (h.shape[0], weights[2].shape[0]) if len(weights) > 6 else (0,)
    return y, h.new_empty(shape, dtype=torch.float32)


@_tail_grad.register_fake
def _(
    h: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    norms: Tensor,
    eps: float,
    by_sum: bool,
    weights: Sequence[Tensor],
) -> list[Tensor]:
    return [empty_volume(h, h.shape[1], h.dtype), *(weight.new_empty(weight.shape) for weight in weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, moments, _, ctx.eps, ctx.by_sum, weights = inputs
    ctx.known = len(moments)
    ctx.save_for_backward(h, output[1], *moments, *weights)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | list[Tensor] | list[None] | None, ...]:
    h, norms, *rest = ctx.saved_tensors
    moments, weights = rest[: ctx.known], rest[ctx.known :]
    grad_h, *grads = _tail_grad(h, grad, moments, norms, ctx.eps, ctx.by_sum, weights)
    return grad_h, [None] * ctx.known, grad if ctx.needs_input_grad[2] else None, None, None, grads


_tail.register_autograd(_backward, setup_context=_save)
