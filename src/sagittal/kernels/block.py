"""The body of a MedNeXt block as one operation: norm, expansion, GELU, contraction, with the depthwise convolution
before it.

The expanded activation (R times the channels) is what fills the memory in training and what makes each step wait for
it. Here a few hundred voxels at a time go through the whole chain while they lie in the cache; the forward pass keeps
only the block's input and the convolution's output, and the backward pass computes the rest again. The per-channel
norm needs no pass of its own: its scale and shift are folded into the expansion, and its gradient's two sums per
channel follow from the expansion's weight gradient. Under autocast on the CPU the products run in bfloat16, where the
processor can (`kernels.bf16`).

Letters: N batch, C channels, R expanded channels, O output channels, L = D*H*W voxels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sagittal.errors import DataError
from sagittal.kernels import choice, depthwise, gpu_block, native
from sagittal.kernels.bf16 import autocasting, outside_autocast, products_in_bf16
from sagittal.kernels.channel_norm import normalise_channels
from sagittal.kernels.gpu_block_autograd import whole_block
from sagittal.kernels.gpu_block_whole import How, Parts
from sagittal.kernels.pointwise_conv import pointwise


class TailWeights(NamedTuple):
    """What follows the depthwise convolution of a block: norm, expansion, contraction.

    norm_weight (C,), norm_bias (C,), expand (R, C), expand_bias (R,), contract (O, R), contract_bias (O,); kernels of
    size one may keep their trailing axes.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor


def expand_contract(h: Tensor, weights: TailWeights, *, residual: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return residual + contract(GELU(expand(norm(h)))), the norm over each case's and channel's space.

    Args:
        h: (N, C, D, H, W) or (N, C, H, W), any memory format.
        weights: the block's parameters.
        residual: (N, O, ...) of h's size, or None.
        eps: added to the variance.

    Raises:
        DataError: the shapes do not fit.
    """
    _check(h, weights, residual)
    if not autocasting(h):
        return _expand_contract(h, weights, residual, eps, bf16=False)
    bf16 = products_in_bf16(h)
    with outside_autocast():
        return _expand_contract(h.float(), weights, None if residual is None else residual.float(), eps, bf16=bf16)


def _expand_contract(h: Tensor, weights: TailWeights, residual: Tensor | None, eps: float, *, bf16: bool) -> Tensor:
    if _usable(h, weights, residual):
        return _fused_tail(h, residual, weights, eps, bf16)
    if _fit(weights) and depthwise.usable_in_graph(h, residual, *weights):
        return _tail_operator(h, residual, weights, eps, bf16)
    way = tail_on_gpu(h, weights, residual)
    if way is None:
        return _plain_tail(h, weights, residual, eps)
    h, residual = choice.as_autocast(h), None if residual is None else choice.as_autocast(residual)
    if way == "graph":
        return _tail_operator(h, residual, weights, eps, False)
    return _fused_tail(h, residual, weights, eps, False)


def _tail_operator(h: Tensor, residual: Tensor | None, weights: TailWeights, eps: float, bf16: bool) -> Tensor:
    y: Tensor = _tail(h, residual, eps, bf16, weights)[0]
    return y


def _fused_tail(h: Tensor, residual: Tensor | None, weights: TailWeights, eps: float, bf16: bool) -> Tensor:
    y: Tensor = _Tail.apply(h, residual, eps, bf16, *weights)  # type: ignore[no-untyped-call]
    return y


def _fused_block(
    x: Tensor, kernel: Tensor, kernel_bias: Tensor | None, weights: TailWeights, residual: bool, eps: float, bf16: bool
) -> Tensor:
    y: Tensor = _Block.apply(x, kernel, kernel_bias, residual, eps, bf16, *weights)  # type: ignore[no-untyped-call]
    return y


def tail_on_gpu(h: Tensor, weights: TailWeights, residual: Tensor | None = None) -> choice.Way:
    """Return how the Triton kernels are to do what `expand_contract` does, None where they are not."""
    h = choice.as_autocast(h)
    way = choice.way(h, residual, *weights)
    if way is None:
        return None
    details = (*weights.contract.shape[:2], h.shape[1], residual is not None)
    return way if choice.decide(choice.job_of("tail", h, details, (residual, *weights)), _tail_rivals) else None


def _tail_rivals(job: choice.Job, size: tuple[int, int, int]) -> choice.Rivals:
    """Return both forms of `expand_contract` for a trial."""
    outputs, wide, channels, is_added = job.details

    def arguments(h: Tensor, *tensors: Tensor) -> tuple[Tensor, TailWeights, Tensor | None]:
        return h, TailWeights(*tensors[:6]), tensors[6] if is_added else None

    def kernels(*tensors: Tensor) -> Tensor:
        h, weights, residual = arguments(*tensors)
        return _fused_tail(h, residual, weights, 1e-5, False)

    tensors = [_drawn(channels, size, job, seed=0), *_drawn_weights(channels, wide, outputs, job)]
    if is_added:
        tensors.append(_drawn(outputs, size, job, seed=9))
    return choice.Rivals(kernels, lambda *given: _plain_tail(*arguments(*given), 1e-5), tensors)


def _drawn(channels: int, size: tuple[int, int, int], job: choice.Job, *, seed: int) -> Tensor:
    x = choice.draw((1, *size, channels), job, seed=seed).detach()
    return x.movedim(-1, 1).requires_grad_(job.training)


def _drawn_weights(channels: int, wide: int, outputs: int, job: choice.Job) -> list[Tensor]:
    shapes = ((channels,), (channels,), (wide, channels), (wide,), (outputs, wide), (outputs,))
    drawn = (choice.draw(shape, job, seed=1 + index) for index, shape in enumerate(shapes))
    return [
        (each.detach() / each.shape[1] ** 0.5 if each.ndim > 1 else each.detach()).requires_grad_(job.training)
        for each in drawn
    ]


def mednext_block(
    x: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    weights: TailWeights,
    *,
    residual: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """Return x + contract(GELU(expand(norm(depthwise(x))))): a whole MedNeXt block, arXiv 2303.09975 figure 1.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W), any memory format.
        kernel: (C, 1, k, k, k) or (C, 1, k, k), k odd.
        kernel_bias: (C,) or None.
        weights: the rest of the block's parameters; O = C where `residual`.
        residual: add x.
        eps: added to the variance.

    Raises:
        DataError: the shapes do not fit.
    """
    _check(x, weights, x if residual else None)
    if not autocasting(x):
        return _block(x, kernel, kernel_bias, weights, residual=residual, eps=eps, bf16=False)
    bf16 = products_in_bf16(x)
    with outside_autocast():
        return _block(x.float(), kernel, kernel_bias, weights, residual=residual, eps=eps, bf16=bf16)


def _block(
    x: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    weights: TailWeights,
    *,
    residual: bool,
    eps: float,
    bf16: bool,
) -> Tensor:
    if x.ndim == 5 and kernel.ndim == 5 and _usable(x, weights) and native.usable(kernel, kernel_bias):
        depthwise.check(x, kernel, kernel_bias, 1)
        return _fused_block(x, kernel, kernel_bias, weights, residual, eps, bf16)
    if choice.takes_kernels(x):
        depthwise.check(x, kernel, kernel_bias, 1)
        y = whole_block(x, None, Parts(kernel, kernel_bias, weights), How(identity=residual, eps=eps))
        if y is not None:
            return y
    h = depthwise.depthwise_conv(x, kernel, kernel_bias)
    return _expand_contract(h, weights, x if residual else None, eps, bf16=bf16)


def mednext_up_block(
    x: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    weights: TailWeights,
    residual: Tensor | None,
    skip: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return skip + an up block of stride 2 where no gradient is wanted and the kernels can, else None.

    The block: zeros in front of contract(GELU(expand(norm(depthwise transposed(x))))), plus residual(x) at the odd
    voxels.

    Args:
        x: (N, C, D, H, W), any memory format.
        kernel: (C, 1, k, k, k), k odd.
        kernel_bias: (C,) or None.
        weights: the rest of the block's parameters.
        residual: (O, C), with or without trailing axes of size 1, or None.
        skip: (N, O, 2D, 2H, 2W).
        eps: added to the variance.
    """
    if torch.is_grad_enabled() or x.ndim != 5 or autocasting(x):
        return None
    if not (_usable(x, weights, skip) and native.usable(kernel, kernel_bias, residual)):
        return None
    odd = None if residual is None else _rows(pointwise(x, residual, None))
    h, moments = depthwise.swept(native.channels_last(x), kernel, kernel_bias, native.TRANSPOSED, eps)
    saved = _saved(moments, weights)
    y = _forward(h.flatten(1, 3), saved, weights.contract_bias, _rows(skip), odd=odd, size=h.shape[1:4])
    return _volume(y, skip.shape[2:])


def _plain_tail(h: Tensor, weights: TailWeights, residual: Tensor | None, eps: float) -> Tensor:
    normed = normalise_channels(h, weights.norm_weight, weights.norm_bias, eps)
    wide = F.gelu(pointwise(normed, weights.expand, weights.expand_bias))
    y = pointwise(wide, weights.contract, weights.contract_bias)
    return y if residual is None else residual + y


class _Saved(NamedTuple):
    """What the tail's backward pass needs besides its input: mean and 1 / deviation, (N, C) each, and matrices."""

    mean: Tensor
    scale: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor


def _saved(moments: tuple[Tensor, Tensor], weights: TailWeights) -> _Saved:
    expand, contract = weights.expand.flatten(1).contiguous(), weights.contract.flatten(1).contiguous()
    return _Saved(*moments, weights.norm_weight, weights.norm_bias, expand, weights.expand_bias, contract)


def _moments(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / deviation, (N, C) each, of dense h (N, L, C)."""
    return gpu_block.moments(h, eps) if choice.for_gpu_kernels(h) else native.moments(h, eps)


def _tail_forward(
    h: Tensor, moments: tuple[Tensor, Tensor], residual: Tensor | None, weights: TailWeights, bf16: bool
) -> tuple[Tensor, _Saved]:
    """h (N, L, C) and residual (N, L, O) dense; returns y (N, L, O)."""
    saved = _saved(moments, weights)
    if choice.for_gpu_kernels(h):
        return gpu_block.forward(h, residual, gpu_block.Tail(moments, weights)), saved
    if not bf16:
        return _forward(h, saved, weights.contract_bias, residual), saved
    (expand_t, expand_bias), contract_t = _folded(saved), saved.contract.t().contiguous()
    matrices = [native.pairs(expand_t), expand_bias, native.pairs(contract_t), weights.contract_bias.contiguous()]
    return native.tail_forward_bf16([h, *moments, *matrices, residual]), saved


def _forward(
    h: Tensor,
    saved: _Saved,
    contract_bias: Tensor,
    residual: Tensor | None,
    *,
    odd: Tensor | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """h (N, L, C), residual (N, L, O), odd (N, L of the coarse grid, O) dense; `size` as in `native.forward`."""
    bias = torch.addmv(saved.expand_bias, saved.expand, saved.norm_bias)
    matrices = [saved.expand, saved.norm_weight.contiguous(), bias, saved.contract, contract_bias.contiguous()]
    inputs = [h, saved.mean, saved.scale, *matrices, residual, odd]
    return native.forward(inputs, None if size is None else (size[0], size[1], size[2]))


def _folded(saved: _Saved) -> tuple[Tensor, Tensor]:
    """Return the expansion with the norm's affine part inside it: (C, R) and (R,)."""
    return (
        (saved.expand * saved.norm_weight).t().contiguous(),
        torch.addmv(saved.expand_bias, saved.expand, saved.norm_bias),
    )


def _tail_backward(h: Tensor, grad_y: Tensor, saved: _Saved, bf16: bool) -> tuple[Tensor, TailWeights]:
    """Return the gradient at h (N, L, C) and at the weights as matrices, given dense grad_y (N, L, O)."""
    if autocasting(h):
        with outside_autocast():
            return _tail_backward(h, grad_y, saved, bf16)
    if choice.for_gpu_kernels(h):
        # The last bias, which comes behind everything, has no part in the backward pass.
        tail = gpu_block.Tail(saved[:2], (*saved[2:], saved.contract[:, 0]))
        grad_h, grads = gpu_block.backward(h, grad_y, tail)
        return grad_h, TailWeights(*grads)
    (expand_t, expand_bias), expand, contract = _folded(saved), saved.expand, saved.contract
    if bf16:
        expand_t, expand, contract = native.pairs(expand_t), native.pairs(expand), native.pairs(contract)
    inputs = [h, saved.mean, saved.scale, expand_t, expand_bias, expand, contract, grad_y]
    grad_h, sums = native.tail_backward(inputs, bf16=bf16)
    by_normed, contract_sum, hidden_sum, output_sum = sums
    # The norm's gradient, before its weight, summed over space: times the normed value, and alone, (N, C) each.
    along = (by_normed * saved.expand.t()).sum(2)
    straight = hidden_sum @ saved.expand
    per_voxel = saved.scale * saved.norm_weight / h.shape[1]
    if h.shape[1] == 1:
        # One voxel is its own mean; the difference of two sums would be rounding, times the largest scale there is.
        grad_h.zero_()
    else:
        native.norm_backward_(
            grad_h,
            h,
            (saved.mean, saved.scale * saved.norm_weight, -(per_voxel * saved.scale * along), -(per_voxel * straight)),
        )
    hidden = hidden_sum.sum(0)
    return grad_h, TailWeights(
        norm_weight=along.sum(0),
        norm_bias=straight.sum(0),
        expand=torch.addr(by_normed.sum(0).t() * saved.norm_weight, hidden, saved.norm_bias),
        expand_bias=hidden,
        contract=contract_sum.sum(0).t(),
        contract_bias=output_sum.sum(0),
    )


def _shaped(grads: TailWeights, ctx: Any) -> tuple[Tensor, ...]:
    return tuple(grad.reshape(shape).to(dtype) for grad, (shape, dtype) in zip(grads, ctx.weight_shapes, strict=True))


def _rows(x: Tensor) -> Tensor:
    """Return (N, C, ...) as dense (N, L, C), a view where the memory already lies so."""
    return x.movedim(1, -1).flatten(1, -2).contiguous()


def _volume(rows: Tensor, size: torch.Size) -> Tensor:
    return rows.view(rows.shape[0], *size, rows.shape[2]).movedim(-1, 1)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, residual: Tensor | None, eps: float, bf16: bool, *weights: Tensor) -> Tensor:
        rows = _rows(h)
        given = None if residual is None else _rows(residual)
        y, saved = _tail_forward(rows, _moments(rows, eps), given, TailWeights(*weights), bf16)
        ctx.bf16 = bf16
        ctx.size = h.shape[2:]
        ctx.weight_shapes = [(weight.shape, weight.dtype) for weight in weights]
        ctx.save_for_backward(rows, *saved)
        return _volume(y, ctx.size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        grad_h, grads = _tail_backward(rows, _rows(grad), _Saved(*saved), ctx.bf16)
        return _volume(grad_h, ctx.size), grad if ctx.needs_input_grad[1] else None, None, None, *_shaped(grads, ctx)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        kernel_bias: Tensor | None,
        residual: bool,
        eps: float,
        bf16: bool,
        *weights: Tensor,
    ) -> Tensor:
        dense = native.channels_last(x)
        if any(ctx.needs_input_grad):
            # A step takes the moments by themselves, as the operators of a compiled step do: it gets their bits.
            h = depthwise.forward(dense, kernel, kernel_bias, 1).flatten(1, 3)
            moments = _moments(h, eps)
        else:
            volume, moments = depthwise.swept(dense, kernel, kernel_bias, 1, eps)
            h = volume.flatten(1, 3)
        y, saved = _tail_forward(h, moments, dense.flatten(1, 3) if residual else None, TailWeights(*weights), bf16)
        ctx.residual, ctx.bf16 = residual, bf16
        ctx.weight_shapes = [(weight.shape, weight.dtype) for weight in weights]
        ctx.save_for_backward(dense, kernel, h, *saved)
        return _volume(y, x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dense, kernel, h, *saved = ctx.saved_tensors
        grad_y = native.channels_last(grad)
        grad_rows, grads = _tail_backward(h, grad_y.flatten(1, 3), _Saved(*saved), ctx.bf16)
        grad_h = grad_rows.view(dense.shape)
        grad_x = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            size = dense.shape[1:4]
            grad_x = depthwise.data_grad(grad_h, kernel, 1, size, grad_y if ctx.residual else None).permute(
                0, 4, 1, 2, 3
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_kernel, grad_bias = depthwise.weight_grad(dense, grad_h, kernel, 1)
        grad_bias = grad_bias if ctx.needs_input_grad[2] else None
        return grad_x, grad_kernel, grad_bias, None, None, None, *_shaped(grads, ctx)


@torch.library.custom_op("sagittal::expand_contract", mutates_args=(), device_types=("cpu", "cuda"))
def _tail(
    h: Tensor, residual: Tensor | None, eps: float, bf16: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and each case's and channel's mean and 1 / deviation."""
    rows, given = _rows(h), None if residual is None else _rows(residual)
    y, saved = _tail_forward(rows, _moments(rows, eps), given, TailWeights(*weights), bf16)
    return _volume(y, h.shape[2:]), saved.mean, saved.scale


@torch.library.custom_op("sagittal::expand_contract_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _tail_grad(
    h: Tensor, grad: Tensor, mean: Tensor, scale: Tensor, bf16: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at h and at the six weights."""
    norm_weight, norm_bias, expand, expand_bias, contract, _ = weights
    matrices = expand.flatten(1).contiguous(), expand_bias, contract.flatten(1).contiguous()
    grad_h, grads = _tail_backward(_rows(h), _rows(grad), _Saved(mean, scale, norm_weight, norm_bias, *matrices), bf16)
    # An operator's results may not share memory, and lie in memory as the fake form below says.
    a, b, c, d, e, f = (
        part.reshape(weight.shape).to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
        for part, weight in zip(grads, weights, strict=True)
    )
    return _volume(grad_h, h.shape[2:]), a, b, c, d, e, f


@_tail.register_fake
def _(
    h: Tensor, residual: Tensor | None, eps: float, bf16: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    y = h.new_empty((h.shape[0], *h.shape[2:], weights[4].shape[0])).movedim(-1, 1)
    moments = [h.new_empty(h.shape[:2], dtype=torch.float32) for _ in range(2)]
    return y, moments[0], moments[1]


@_tail_grad.register_fake
def _(
    h: Tensor, grad: Tensor, mean: Tensor, scale: Tensor, bf16: bool, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    grad_h = h.new_empty((h.shape[0], *h.shape[2:], h.shape[1])).movedim(-1, 1)
    return grad_h, *(weight.new_empty(weight.shape) for weight in weights)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor | None, float, bool, Sequence[Tensor]], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    h, _, _, ctx.bf16, weights = inputs
    ctx.save_for_backward(h, *output[1:], *weights)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | list[Tensor] | None, ...]:
    h, mean, scale, *weights = ctx.saved_tensors
    grad_h, *grads = _tail_grad(h, grad, mean, scale, ctx.bf16, weights)
    return grad_h, grad if ctx.needs_input_grad[1] else None, None, None, grads


_tail.register_autograd(_backward, setup_context=_save)


def _usable(x: Tensor, weights: TailWeights, residual: Tensor | None = None) -> bool:
    return _fit(weights) and depthwise.usable(x, residual, *weights)


def _fit(weights: TailWeights) -> bool:
    return all(width % native.LANES == 0 for width in (weights.expand.shape[0], weights.contract.shape[0]))


def _check(x: Tensor, weights: TailWeights, residual: Tensor | None) -> None:
    channels, wide, outputs = x.shape[1], weights.expand.shape[0], weights.contract.shape[0]
    expected = ((channels,), (channels,), (wide, channels), (wide,), (outputs, wide), (outputs,))
    for name, weight, shape in zip(TailWeights._fields, weights, expected, strict=True):
        if tuple(weight.shape[: len(shape)]) != shape or weight.numel() != weight.shape[:2].numel():
            raise DataError(
                f"{name} of a MedNeXt block has shape {tuple(weight.shape)}: expected {shape} for an input of "
                f"{tuple(x.shape)} (axes N, C, D, H, W). Check the weights and the order of the axes.",
                code="block_shape",
            )
    if residual is not None and residual.shape != (x.shape[0], outputs, *x.shape[2:]):
        raise DataError(
            f"the residual of a MedNeXt block has shape {tuple(residual.shape)}: expected "
            f"{(x.shape[0], outputs, *x.shape[2:])}. Use as many output channels as it has, or leave the residual out.",
            code="block_residual",
        )
