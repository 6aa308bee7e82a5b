"""A whole MedNeXt block on a GPU for autograd: eagerly, and as operators of a compiled graph.

`whole_block` is what networks call. Eager code goes through an autograd function, since an operator's call costs tens
of microseconds and a block's kernels take as little; torch.compile and fake tensors see `sagittal::mednext_block`. Both
keep the block's input and the convolution's output, and nothing of the expansion. `plain_block` is the twin of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sagittal.kernels import choice, gpu_block_whole
from sagittal.kernels.channel_norm import normalise_channels
from sagittal.kernels.depthwise import plain_conv, plain_transpose
from sagittal.kernels.gpu_block_whole import How, Kept, Parts, unflat
from sagittal.kernels.pointwise_conv import pointwise
from sagittal.kernels.response_norm import global_response_norm

_PARTS = 12
"""Entries of `Parts.flat`."""


def whole_block(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> Tensor | None:
    """Return a MedNeXt block by the Triton kernels, differentiable, or None where they are not to compute it.

    Args:
        x: (N, C, D, H, W), or (N, C, H, W) with a kernel of two axes and strides of (1, s, s); any memory format.
        skip: of the result's shape, added to it; up blocks only.
        parts: the block's parameters.
        how: which block.
    """
    if not choice.takes_kernels(x) or x.ndim not in (4, 5) or parts.kernel.ndim != x.ndim:
        return None
    is_flat = x.ndim == 4
    if is_flat:
        x, skip = x.unsqueeze(2), None if skip is None else skip.unsqueeze(2)
        parts = parts._replace(kernel=parts.kernel.unsqueeze(2))
    y = _volume_block(choice.as_autocast(x), None if skip is None else choice.as_autocast(skip), parts, how)
    return y.squeeze(2) if is_flat and y is not None else y


def _volume_block(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> Tensor | None:
    flat = parts.flat
    way = choice.way(x, skip, *flat)
    if way is None or (skip is not None and not _skip_fits(x, skip, parts, how)):
        return None
    if not choice.decide(choice.job_of("block", x, _details(x, skip, parts, how), [skip, *flat]), _rivals):
        return None
    y: Tensor
    if way == "eager":
        y = _WholeBlock.apply(x, skip, how, *flat)  # type: ignore[no-untyped-call]
        return y
    present = [index for index, part in enumerate(flat) if part is not None]
    tensors = [part for part in flat if part is not None]
    y = _block(x, skip, tensors, present, how.strides, how.transposed, how.identity, how.eps, how.layer, how.by_sum)[0]
    return y


def plain_block(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> Tensor:
    """Return what `whole_block` does for (N, C, D, H, W), by PyTorch's operators."""
    contract_bias = parts.tail[5]
    if parts.residual_bias is not None:
        contract_bias = contract_bias + parts.residual_bias
    convolve = plain_transpose if how.transposed else plain_conv
    h = convolve(x, parts.kernel, parts.kernel_bias, how.strides)
    y = plain_tail(h, (*parts.tail[:5], contract_bias), parts.grn, how)
    if not how.transposed:
        return y + _plain_residual(x, parts, how) if how.identity or parts.residual is not None else y
    y = F.pad(y, [side for stride in reversed(how.strides) for side in (stride - 1, 0)])
    if parts.residual is not None:
        odd = pointwise(x, parts.residual, None)
        places = [slice(stride - 1, None, stride) for stride in how.strides]
        y[:, :, places[0], places[1], places[2]].add_(odd)
    return y if skip is None else skip + y


def plain_tail(h: Tensor, weights: Sequence[Tensor], grn: tuple[Tensor, Tensor] | None, how: How) -> Tensor:
    """Return contract(GRN(GELU(expand(norm(h))))) for (N, C, ...), by PyTorch's operators."""
    norm_weight, norm_bias, expand, expand_bias, contract, contract_bias = weights
    if how.layer:
        rows = F.layer_norm(h.movedim(1, -1), norm_weight.shape, norm_weight, norm_bias, how.eps)
        normed = rows.movedim(-1, 1)
    else:
        normed = normalise_channels(h, norm_weight, norm_bias, how.eps)
    wide = F.gelu(pointwise(normed, expand, expand_bias))
    if grn is not None:
        gamma, beta = (part.view(1, -1, *(1,) * (h.ndim - 2)) for part in grn)
        wide = global_response_norm(wide, gamma, beta, by_sum=how.by_sum)
    return pointwise(wide, contract, contract_bias)


def _plain_residual(x: Tensor, parts: Parts, how: How) -> Tensor:
    if parts.residual is None:
        return x
    d, h, w = how.strides
    return pointwise(x[:, :, ::d, ::h, ::w], parts.residual, None)


def _skip_fits(x: Tensor, skip: Tensor, parts: Parts, how: How) -> bool:
    d, h, w = x.shape[2:]
    outputs = parts.tail[4].shape[0]
    return tuple(skip.shape) == (x.shape[0], outputs, *gpu_block_whole.output_size((d, h, w), how))


def _details(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> tuple[int, ...]:
    residual = 1 if how.identity else 0 if parts.residual is None else 2
    grn = 0 if parts.grn is None else 2 if how.by_sum else 1
    widths = (x.shape[1], parts.tail[2].shape[0], parts.tail[4].shape[0])
    kinds = (int(how.transposed), residual, int(how.layer), grn, int(skip is not None))
    return (*widths, *parts.kernel.shape[2:], *how.strides, *kinds)


def _rivals(job: choice.Job, size: tuple[int, int, int]) -> choice.Rivals:
    """Return both forms of a block for a trial."""
    channels, wide, outputs, *numbers = job.details
    kernel, strides = numbers[:3], numbers[3:6]
    transposed, residual, layer, grn, has_skip = numbers[6:]
    how = How((strides[0], strides[1], strides[2]), bool(transposed), residual == 1, 1e-5, bool(layer), grn == 2)
    tail = [(channels,), (channels,), (wide, channels), (wide,), (outputs, wide), (outputs,)]
    path = [(outputs, channels), (outputs,)] if residual == 2 else [None, None]
    responses = [(wide,), (wide,)] if grn else [None, None]
    shapes: list[tuple[int, ...] | None] = [(channels, 1, *kernel), (channels,), *tail, *path, *responses]
    made = [None if shape is None else drawn(shape, job, seed=2 + index) for index, shape in enumerate(shapes)]
    # No gradient is asked for the convolution's bias: the norm takes it away again, so that is rounding alone.
    made[1] = None if made[1] is None else made[1].detach()
    present = [index for index, part in enumerate(made) if part is not None]
    volumes = [drawn_volume(channels, size, job, seed=0)]
    if has_skip:
        volumes.append(drawn_volume(outputs, gpu_block_whole.output_size(size, how), job, seed=1))

    def sorted_out(given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Parts]:
        x, *rest = given
        skip = rest.pop(0) if has_skip else None
        return x, skip, unflat(_spread(rest, present))

    def kernels(*given: Tensor) -> Tensor:
        x, skip, parts = sorted_out(given)
        y: Tensor = _WholeBlock.apply(x, skip, how, *parts.flat)  # type: ignore[no-untyped-call]
        return y

    tensors = [*volumes, *(part for part in made if part is not None)]
    return choice.Rivals(kernels, lambda *given: plain_block(*sorted_out(given), how), tensors)


def drawn(shape: tuple[int, ...], job: choice.Job, *, seed: int) -> Tensor:
    """Return a parameter for a trial."""
    numbers = choice.draw(shape, job, seed=seed).detach()
    return numbers.div(prod(shape[1:]) ** 0.5).requires_grad_(job.training)


def drawn_volume(channels: int, size: tuple[int, int, int], job: choice.Job, *, seed: int) -> Tensor:
    """Return an activation for a trial, channels-last."""
    x = choice.draw((1, *size, channels), job, seed=seed).detach()
    return x.movedim(-1, 1).requires_grad_(job.training)


def _spread(tensors: Sequence[Tensor], present: Sequence[int]) -> list[Tensor | None]:
    flat: list[Tensor | None] = [None] * _PARTS
    for index, tensor in zip(present, tensors, strict=True):
        flat[index] = tensor
    return flat


def _converting_nothing(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, which would round the sums of gradients on their way through products."""
    is_converting = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", enabled=False) if is_converting else nullcontext()


def _dense(x: Tensor) -> Tensor:
    """Return (N, C, D, H, W) as dense (N, D, H, W, C), without a copy where the memory already lies so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _shaped(grad: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if grad is None or part is None else grad.reshape(part.shape).to(part.dtype)


class _WholeBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, how: How, *flat: Tensor | None) -> Tensor:
        dense = _dense(x)
        with _converting_nothing(x):
            given = None if skip is None else _dense(skip)
            y, kept = gpu_block_whole.forward(dense, given, unflat(list(flat)), how)
        ctx.how = how
        ctx.save_for_backward(dense, *kept, *flat)
        return y.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, mean, scale, norms, *flat = ctx.saved_tensors
        wants_x, wants_skip = ctx.needs_input_grad[:2]
        with _converting_nothing(x):
            kept = Kept(h, mean, scale, norms)
            grad_x, grads = gpu_block_whole.backward(x, _dense(grad), kept, unflat(flat), ctx.how, wants_x=wants_x)
        shaped = [_shaped(found, part) for found, part in zip(grads, flat, strict=True)]
        by_x = None if grad_x is None else grad_x.permute(0, 4, 1, 2, 3)
        return by_x, grad if wants_skip else None, None, *shaped


@torch.library.custom_op("sagittal::mednext_block", mutates_args=())
def _block(
    x: Tensor,
    skip: Tensor | None,
    tensors: Sequence[Tensor],
    present: Sequence[int],
    strides: Sequence[int],
    transposed: bool,
    identity: bool,
    eps: float,
    layer: bool,
    by_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y (N, O, ...) and what `Kept` holds; `present`: where the tensors stand in `Parts.flat`."""
    how = How((strides[0], strides[1], strides[2]), transposed, identity, eps, layer, by_sum)
    with _converting_nothing(x):
        given = None if skip is None else _dense(skip)
        y, kept = gpu_block_whole.forward(_dense(x), given, unflat(_spread(tensors, present)), how)
    # An operator's results may not share memory, and tensors without elements do.
    h, *rest = kept
    mean, scale, norms = (part if part.numel() else part.clone() for part in rest)
    return y.permute(0, 4, 1, 2, 3), h, mean, scale, norms


@torch.library.custom_op("sagittal::mednext_block_backward", mutates_args=())
def _block_grad(
    x: Tensor,
    grad: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    present: Sequence[int],
    strides: Sequence[int],
    transposed: bool,
    identity: bool,
    eps: float,
    layer: bool,
    by_sum: bool,
    wants_x: bool,
) -> list[Tensor]:
    """Return the gradients at x (no elements where it is not wanted) and at the tensors."""
    how = How((strides[0], strides[1], strides[2]), transposed, identity, eps, layer, by_sum)
    parts = unflat(_spread(tensors, present))
    with _converting_nothing(x):
        grad_x, grads = gpu_block_whole.backward(_dense(x), _dense(grad), Kept(*kept), parts, how, wants_x=wants_x)
    found = [_shaped(each, part) for each, part in zip(grads, parts.flat, strict=True)]
    own = [part.clone(memory_format=torch.contiguous_format) for part in found if part is not None]
    return [x.new_empty((0,)) if grad_x is None else grad_x.permute(0, 4, 1, 2, 3), *own]


@_block.register_fake
def _(
    x: Tensor,
    skip: Tensor | None,
    tensors: Sequence[Tensor],
    present: Sequence[int],
    strides: Sequence[int],
    transposed: bool,
    identity: bool,
    eps: float,
    layer: bool,
    by_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    how = How((strides[0], strides[1], strides[2]), transposed, identity, eps, layer, by_sum)
    parts = unflat(_spread(tensors, present))
    cases, channels, *size = x.shape
    dtype = x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype)
    grid = size[0], size[1], size[2]
    y = x.new_empty((cases, *gpu_block_whole.output_size(grid, how), parts.tail[4].shape[0]), dtype=dtype)
    h = x.new_empty((cases, *gpu_block_whole.convolved_size(grid, how), channels))
    shapes = [(0,) if layer else (cases, channels)] * 2 + [(cases, parts.tail[2].shape[0]) if parts.grn else (0,)]
    mean, scale, norms = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return y.permute(0, 4, 1, 2, 3), h, mean, scale, norms


@_block_grad.register_fake
def _(
    x: Tensor,
    grad: Tensor,
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    present: Sequence[int],
    strides: Sequence[int],
    transposed: bool,
    identity: bool,
    eps: float,
    layer: bool,
    by_sum: bool,
    wants_x: bool,
) -> list[Tensor]:
    dense = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).permute(0, 4, 1, 2, 3)
    return [dense if wants_x else x.new_empty((0,)), *(part.new_empty(part.shape) for part in tensors)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, tensors, *ctx.constants = inputs
    ctx.save_for_backward(x, *output[1:], *tensors)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    wants_x, wants_skip = ctx.needs_input_grad[:2]
    grad_x, *grads = _block_grad(x, grad, saved[:4], saved[4:], *ctx.constants, wants_x)
    return grad_x if wants_x else None, grad if wants_skip else None, grads, *[None] * len(ctx.constants)


_block.register_autograd(_backward, setup_context=_save)
