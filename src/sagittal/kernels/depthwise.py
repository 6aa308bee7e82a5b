"""Depthwise convolution of volumes: the kernels and their plain PyTorch twin.

PyTorch's depthwise 3D convolution is far from what a CPU can do, its backward most of all: the data gradient is
itself a depthwise convolution (with the flipped kernel, or transposed where the forward pass was strided), and the
weight gradient fits in registers. On a GPU Triton kernels do the same (`gpu_depthwise`), where they are the faster form
(`choice`). The twin runs wherever the kernels cannot: on other devices and dtypes, while exporting, on a CPU with
channels that are not a multiple of 16, without the library. Both give the same numbers up to rounding. torch.compile
cannot look into the kernels; its graphs call them as operators (`sagittal::depthwise...`), which eager code does not,
because each such call costs tens of microseconds.

Letters: N batch, C channels, D H W space, k the kernel; in 2D there is no D.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sagittal.errors import DataError
from sagittal.kernels import choice, gpu_depthwise, native
from sagittal.kernels.bf16 import autocasting, outside_autocast


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1) -> Tensor:
    """Convolve each channel with its own kernel, padding k // 2: a size n becomes n, or ceil(n / 2) with stride 2.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W) in any memory format; the result is channels-last where the kernel ran.
        weight: (C, 1, k, k, k) or (C, 1, k, k), k odd.
        bias: (C,) or None.
        stride: 1 or 2.

    Raises:
        DataError: the shapes do not fit, or an even kernel.
    """
    check(x, weight, bias, stride)
    if autocasting(x):
        with outside_autocast():
            return depthwise_conv(x.float(), weight, bias, stride=stride)
    y = _compiled(x, weight, bias, stride)
    if y is not None:
        return y
    return plain_conv(x, weight, bias, (stride,) * (x.ndim - 2))


def depthwise_conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel, transposed, with stride 2 and padding k // 2: a size n becomes 2n - 1.

    Arguments and errors as in `depthwise_conv`.
    """
    check(x, weight, bias, 2)
    if autocasting(x):
        with outside_autocast():
            return depthwise_conv_transpose(x.float(), weight, bias)
    compiled = _compiled(x, weight, bias, native.TRANSPOSED)
    if compiled is not None:
        return compiled
    return plain_transpose(x, weight, bias, (2,) * (x.ndim - 2))


def per_axis_on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int], *, transposed: bool
) -> Tensor | None:
    """Convolve with a kernel and stride of each axis by the Triton kernels, or return None where they do not compute.

    Args:
        x: (N, C, D, H, W) or (N, C, H, W).
        weight: (C, 1, kd, kh, kw) or (C, 1, kh, kw), each k odd.
        bias: (C,) or None.
        strides: 1 or 2 for each spatial axis.
        transposed: whether a stride makes the volume larger, n to 2n - 1.
    """
    x = choice.as_autocast(x)
    way = choice.way(x, weight, bias)
    fits = weight.ndim == x.ndim and weight.shape[:2] == (x.shape[1], 1) and all(k % 2 for k in weight.shape[2:])
    if way is None or not fits or (bias is not None and bias.shape != x.shape[1:2]):
        return None  # what does not fit, PyTorch refuses with words of its own
    details = (x.shape[1], int(transposed), x.ndim - 2, *weight.shape[2:], *strides)
    if not choice.decide(choice.job_of("depthwise_axes", x, details, (weight, bias)), _rivals_per_axis):
        return None
    return _per_axis(x, weight, bias, strides, transposed, _fused if way == "eager" else _depthwise)


def _per_axis(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    transposed: bool,
    convolve: Callable[[Tensor, Tensor, Tensor | None, int], Tensor],
) -> Tensor:
    if transposed:  # along an axis of stride 1 that is the ordinary form, backwards
        weight = weight.flip([axis for axis, stride in enumerate(strides, start=2) if stride == 1])
    mode = gpu_depthwise.mode_of((*(1,) * (5 - x.ndim), *strides), transposed=transposed)
    y = convolve(_as_3d(x), _as_3d(weight), bias, mode)
    return y if x.ndim == 5 else y.squeeze(2)


def _rivals_per_axis(job: choice.Job, size: tuple[int, int, int]) -> choice.Rivals:
    """Do what `_rivals` does, for a kernel and stride of each axis."""
    channels, is_transposed, axes = job.details[:3]
    kernel, strides = job.details[3 : 3 + axes], job.details[3 + axes :]
    x, bias = _drawn_volume(job, channels, axes, size), choice.draw((channels,), job, seed=2)
    plain = plain_transpose if is_transposed else plain_conv
    return choice.Rivals(
        lambda x, weight, bias: _per_axis(x, weight, bias, strides, bool(is_transposed), _fused),
        lambda x, weight, bias: plain(x, weight, bias, strides),
        [x, choice.draw((channels, 1, *kernel), job, seed=1), bias],
    )


def _drawn_volume(job: choice.Job, channels: int, axes: int, size: tuple[int, int, int]) -> Tensor:
    samples, space = (1, size) if axes == 3 else (size[0], size[1:])
    return choice.draw((samples, *space, channels), job, seed=0).detach().movedim(-1, 1).requires_grad_(job.training)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int]) -> Tensor:
    """Convolve each channel, padding k // 2, by PyTorch's operators; strides and kernel per axis."""
    if autocasting(x):
        with outside_autocast():
            return plain_conv(x.float(), weight, bias, strides)
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    if x.is_cuda:
        x = x.contiguous()  # a GPU convolves channels-last channel by channel, which takes many times longer
    padding = [size // 2 for size in weight.shape[2:]]
    return convolve(x, weight, bias, stride=strides, padding=padding, groups=x.shape[1])


def plain_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int]) -> Tensor:
    """Convolve each channel, transposed, padding k // 2, by PyTorch's operators; strides and kernel per axis."""
    if autocasting(x):
        with outside_autocast():
            return plain_transpose(x.float(), weight, bias, strides)
    convolve = partial(
        F.conv_transpose3d if x.ndim == 5 else F.conv_transpose2d,
        stride=strides,
        padding=[size // 2 for size in weight.shape[2:]],
        groups=x.shape[1],
    )
    if x.is_cuda:
        x = x.contiguous()
    if not x.is_cuda or not (torch.is_autocast_enabled("cuda") or x.dtype in (torch.float16, torch.bfloat16)):
        return convolve(x, weight, bias)
    # In half precision cuDNN computes this channel by channel, several times slower than in float32.
    with torch.autocast("cuda", enabled=False):
        y = convolve(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def usable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether the compiled kernels can take x (N, C, ...) and these parameters."""
    return x.shape[1] % native.LANES == 0 and native.usable(x, *parameters)


def usable_in_graph(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether the graph that torch.compile is building can call the kernels on these."""
    return x.shape[1] % native.LANES == 0 and native.usable_in_graph(x, *parameters)


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor | None:
    """Convolve with the compiled kernel, or return None where it cannot run."""
    y: Tensor
    if usable(x, weight, bias):
        y = _fused(_as_3d(x), _as_3d(weight), bias, mode)
    elif usable_in_graph(x, weight, bias):
        y = _depthwise(_as_3d(x), _as_3d(weight), bias, mode)
    elif (way := _on_gpu(x, weight, bias, mode)) is not None:
        x = choice.as_autocast(x)
        y = (_fused if way == "eager" else _depthwise)(_as_3d(x), _as_3d(weight), bias, mode)
    else:
        return None
    return y if x.ndim == 5 else y.squeeze(2)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor:
    y: Tensor = _Depthwise.apply(x, weight, bias, mode)  # type: ignore[no-untyped-call]
    return y


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> choice.Way:
    """Return how the Triton kernels are to do this, None where they are not."""
    x = choice.as_autocast(x)
    way = choice.way(x, weight, bias)
    if way is None:
        return None
    job = choice.job_of("depthwise", x, (x.shape[1], weight.shape[-1], x.ndim - 2, mode), (weight, bias))
    return way if choice.decide(job, _rivals) else None


def _rivals(job: choice.Job, size: tuple[int, int, int]) -> choice.Rivals:
    """Return both forms of a depthwise convolution for a trial; in 2D the depth counts as cases."""
    channels, kernel, axes, mode = job.details
    x = _drawn_volume(job, channels, axes, size)
    weight = choice.draw((channels, 1, *(kernel,) * axes), job, seed=1)
    plain = plain_transpose if mode == native.TRANSPOSED else plain_conv
    strides = (2 if mode == native.TRANSPOSED else mode,) * axes

    def kernels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = _fused(_as_3d(x), _as_3d(weight), bias, mode)
        return y if axes == 3 else y.squeeze(2)

    tensors = [x, weight, choice.draw((channels,), job, seed=2)]
    return choice.Rivals(kernels, lambda x, weight, bias: plain(x, weight, bias, strides), tensors)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor:
    """Convolve dense x (N, D, H, W, C) with weight (C, 1, kd, k, k); mode: a code of `gpu_depthwise`."""
    out = gpu_depthwise.output_size(x.shape[1:4], mode)
    if choice.for_gpu_kernels(x):
        return gpu_depthwise.convolve(x, _taps(weight).float(), bias, weight.shape[2:], mode, out)
    return native.depthwise(x, _taps(weight), bias, _kernel(weight), mode, out)


def swept(
    x: Tensor, weight: Tensor, bias: Tensor | None, mode: int, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return `forward`, and its result's mean and reciprocal standard deviation, (N, C) each, taken on the way.

    On a CPU, another stride than 1 or `native.TRANSPOSED`, or another kernel than `native.SWEPT`, takes a second pass
    for them.
    """
    out = gpu_depthwise.output_size(x.shape[1:4], mode)
    if choice.for_gpu_kernels(x):
        taps = _taps(weight).float()
        h, mean, variance = gpu_depthwise.convolve_with_moments(x, taps, bias, weight.shape[2:], mode, out)
        return h, (mean, torch.rsqrt(variance + eps))
    if mode != 2 and weight.shape[3] in native.SWEPT:
        h, *moments = native.sweep(x, _taps(weight), bias, _kernel(weight), mode, out, eps)
        return h, (moments[0], moments[1])
    h = forward(x, weight, bias, mode)
    return h, native.moments(h.flatten(1, 3), eps)


def data_grad(grad: Tensor, weight: Tensor, mode: int, size: tuple[int, int, int], add: Tensor | None = None) -> Tensor:
    """Return the gradient at the input of `forward`, (N, *size, C), plus `add`; grad is the dense one at its output."""
    if choice.for_gpu_kernels(grad):
        back, flipped = gpu_depthwise.data_mode(mode)
        taps = _taps(weight.flip([2 + axis for axis in flipped])).float()
        return gpu_depthwise.convolve(grad, taps, None, weight.shape[2:], back, size, add=add)
    if mode == 1:
        return native.depthwise(grad, _taps(weight.flip(2, 3, 4)), None, _kernel(weight), 1, size, add)
    other = 2 if mode == native.TRANSPOSED else native.TRANSPOSED
    return native.depthwise(grad, _taps(weight), None, _kernel(weight), other, size, add)


def weight_grad(x: Tensor, grad: Tensor, weight: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight (C, 1, kd, k, k) and bias (C,), given input and output gradient, both dense."""
    if choice.for_gpu_kernels(x):
        taps, bias = gpu_depthwise.weight_grad(x, grad, weight.shape[2:], mode)
        return taps.t().reshape(weight.shape).to(weight.dtype), bias.to(weight.dtype)
    if mode == native.TRANSPOSED:
        # grad[2i + j - p] meets x[i]: the strided case with the two exchanged
        taps, _ = native.depthwise_weight_grad(grad, x, _kernel(weight), 2)
        bias = grad.sum((0, 1, 2, 3))
    else:
        taps, bias = native.depthwise_weight_grad(x, grad, _kernel(weight), mode)
    return taps.t().reshape(weight.shape), bias


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor:
        dense = native.channels_last(x)
        ctx.mode = mode
        ctx.save_for_backward(dense, weight)
        return forward(dense, weight, bias, mode).permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dense = native.channels_last(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = data_grad(dense, weight, ctx.mode, x.shape[1:4]).permute(0, 4, 1, 2, 3)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = weight_grad(x, dense, weight, ctx.mode)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


@torch.library.custom_op("sagittal::depthwise", mutates_args=(), device_types=("cpu", "cuda"))
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor:
    return forward(native.channels_last(x), weight, bias, mode).permute(0, 4, 1, 2, 3)


@torch.library.custom_op("sagittal::depthwise_data_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _depthwise_data_grad(grad: Tensor, weight: Tensor, mode: int, size: Sequence[int]) -> Tensor:
    depth, height, width = size
    return data_grad(native.channels_last(grad), weight, mode, (depth, height, width)).permute(0, 4, 1, 2, 3)


@torch.library.custom_op("sagittal::depthwise_weight_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _depthwise_weight_grad(x: Tensor, grad: Tensor, weight: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    taps, bias = weight_grad(native.channels_last(x), native.channels_last(grad), weight, mode)
    return taps.contiguous(), bias.clone()  # an operator's results may not share memory


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int) -> Tensor:
    return _empty_volume(x, gpu_depthwise.output_size(x.shape[2:], mode))


@_depthwise_data_grad.register_fake
def _(grad: Tensor, weight: Tensor, mode: int, size: Sequence[int]) -> Tensor:
    return _empty_volume(grad, size)


@_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _empty_volume(like: Tensor, size: Sequence[int]) -> Tensor:
    return like.new_empty((like.shape[0], *size, like.shape[1])).permute(0, 4, 1, 2, 3)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, weight, _, ctx.mode = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _depthwise_data_grad(grad, weight, ctx.mode, x.shape[2:])
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = _depthwise_weight_grad(x, grad, weight, ctx.mode)
    return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


_depthwise.register_autograd(_backward, setup_context=_save)


def _taps(weight: Tensor) -> Tensor:
    """Return (C, 1, kd, k, k) as dense (taps, C)."""
    return weight.detach().flatten(1).t().contiguous()


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _as_3d(x: Tensor) -> Tensor:
    return x if x.ndim == 5 else x.unsqueeze(2)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    """Raise DataError unless these can be convolved."""
    if x.ndim not in (4, 5) or weight.ndim != x.ndim or weight.shape[:2] != (x.shape[1], 1):
        raise DataError(
            f"a depthwise convolution of {tuple(x.shape)} with weights {tuple(weight.shape)}: expected x "
            "(N, C, D, H, W) with weights (C, 1, k, k, k), or (N, C, H, W) with (C, 1, k, k). "
            "Check the order of the axes.",
            code="depthwise_shape",
        )
    size = weight.shape[-1]
    if size % 2 == 0 or any(length != size for length in weight.shape[2:]):
        raise DataError(
            f"a depthwise kernel of size {tuple(weight.shape[2:])}: expected the same odd number along every axis. "
            "Use 3, 5 or 7.",
            code="depthwise_kernel",
        )
    if bias is not None and bias.shape != (x.shape[1],):
        raise DataError(
            f"a depthwise bias of shape {tuple(bias.shape)}: expected ({x.shape[1]},), one number for each "
            "channel. Check the weights.",
            code="depthwise_bias",
        )
    if stride not in (1, 2):
        raise DataError(
            f"a depthwise convolution with stride {stride}: expected 1 or 2. Use one of them.", code="depthwise_stride"
        )
