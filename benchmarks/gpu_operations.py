"""The single operations that benchmarks/gpu.py checks and times, each with its truth and its floor."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from gpu_measure import poisoned
from torch import Tensor

from sagittal.kernels import (
    TailWeights,
    block,
    depthwise,
    depthwise_conv,
    depthwise_conv_transpose,
    expand_contract,
    mednext_block,
)
from sagittal.kernels.choice import relative_error, use_kernels

Size = tuple[int, int, int]
Operation = Callable[..., Tensor]

SLACK = 1.25
"""How much worse than the plain form's own error in half precision ours may be: two roundings may fall differently."""
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative errors that pass in any case: the bound for fp32, and one rounding in half precision."""


@dataclass(frozen=True)
class Case:
    """An operation at a size; `passes` over the activation are the floor of its forward and backward pass;
    `constant` is the number of a tensor that no gradient is asked for.

    Letters: C channels, R expanded channels, O outputs.
    """

    name: str
    run: Operation
    shapes: tuple[tuple[int, ...], ...]
    passes: tuple[float, float]
    constant: int | None = None

    @property
    def activation(self) -> int:
        """Numbers in the (larger) activation."""
        return torch.Size(self.shapes[0]).numel()

    def tensors(self, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> list[Tensor]:
        """Return random inputs: x in `dtype`, the parameters in float32 as in training; all want gradients."""
        generator = torch.Generator(device).manual_seed(seed)
        found = []
        for index, shape in enumerate(self.shapes):
            tensor = torch.randn(shape, generator=generator, device=device)
            if index > 0 and len(shape) > 1:
                tensor = tensor / max(1, torch.Size(shape[1:]).numel()) ** 0.5
            if index == 0:
                tensor = tensor.to(dtype).contiguous(memory_format=torch.channels_last_3d)
            found.append(tensor.requires_grad_(index != self.constant))
        return found


def conv(channels: int, size: Size, kernel: int, stride: int = 1) -> Case:
    """Return the depthwise convolution; stride 3 means transposed."""
    shapes = ((1, channels, *size), (channels, 1, kernel, kernel, kernel), (channels,))
    if stride == 3:
        return Case(f"depthwise k={kernel} transposed", depthwise_conv_transpose, shapes, (9.0, 18.0))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_conv(x, weight, bias, stride=stride)

    share = 1 + 1 / stride**3
    return Case(f"depthwise k={kernel} stride {stride}", run, shapes, (share, 2 * share))


def tail(channels: int, size: Size, ratio: int) -> Case:
    """Return norm, expansion, GELU, contraction and the residual: reads h and x, writes y; backward reads three."""
    shapes = ((1, channels, *size), *_tail_shapes(channels, ratio))

    def run(h: Tensor, *weights: Tensor) -> Tensor:
        return expand_contract(h, TailWeights(*weights), residual=h)

    # The norm's statistics take a pass of their own where no convolution gathers them.
    return Case(f"tail R={ratio}C", run, shapes, (4.0, 6.0))


def whole(channels: int, size: Size, kernel: int, ratio: int) -> Case:
    """Return a whole block."""
    first = ((1, channels, *size), (channels, 1, kernel, kernel, kernel), (channels,))

    def run(x: Tensor, weight: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        return mednext_block(x, weight, bias, TailWeights(*weights))

    # The norm takes the convolution's bias away again: its gradient is rounding alone, whatever computes it.
    return Case(f"block k={kernel} R={ratio}C", run, (*first, *_tail_shapes(channels, ratio)), (5.0, 11.0), constant=2)


def _tail_shapes(channels: int, ratio: int) -> tuple[tuple[int, ...], ...]:
    wide = ratio * channels
    return (channels,), (channels,), (wide, channels, 1, 1, 1), (wide,), (channels, wide, 1, 1, 1), (channels,)


def checked_cases(tiny: bool) -> Iterator[Case]:
    """Yield what correctness is checked on: edges, sizes that are no multiple of anything, all kernels and strides."""
    sizes: Sequence[Size] = ((2, 3, 4),) if tiny else ((1, 2, 3), (9, 6, 7), (17, 33, 20), (64, 48, 40))
    for size in sizes:
        for kernel in (3,) if tiny else (3, 5, 7):
            for stride in (1, 2, 3):
                yield conv(16 if tiny else 32, size, kernel, stride)
            yield whole(16 if tiny else 32, size, kernel, 2)
        yield tail(16 if tiny else 64, size, 3)
        if not tiny:
            yield tail(256, size, 8)


@contextmanager
def without_plain_forms() -> Iterator[None]:
    """Make the plain forms raise, so that a kernel that was silently passed by is no success."""
    with ExitStack() as stack:
        for module, name in ((depthwise, "plain_conv"), (depthwise, "plain_transpose"), (block, "_plain_tail")):
            error = AssertionError(f"{name} was called where the kernels should have been")
            stack.enter_context(mock.patch.object(module, name, side_effect=error))
        yield


def results(run: Operation, tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the result and the gradients at all tensors that want one."""
    y = run(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[float, float, bool]:
    """Return the worst relative error of the kernels and of the plain form, and whether each part is good enough."""
    tensors = case.tensors(dtype, device)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    half = [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in tensors]
    with torch.no_grad():
        grad = torch.randn(case.run(*exact).shape, generator=torch.Generator(device).manual_seed(1), device=device)
    grad = grad.to(dtype).float()
    with use_kernels("off"):
        truth, plain = results(case.run, exact, grad), results(case.run, half, grad)
    with use_kernels("on"), without_plain_forms(), poisoned():
        ours = results(case.run, tensors, grad)
    pairs = [(relative_error(a, t), relative_error(b, t)) for a, b, t in zip(ours, plain, truth, strict=True)]
    good = all(our <= max(FLOOR[dtype], SLACK * usual) for our, usual in pairs)
    return max(our for our, _ in pairs), max(usual for _, usual in pairs), good
