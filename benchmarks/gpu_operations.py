"""The single operations that benchmarks/gpu.py checks and times, each with its truth and its floor."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from gpu_floor import Block, launches, numbers, sizes
from gpu_measure import poisoned
from torch import Tensor

from sagittal.kernels import (
    TailWeights,
    block,
    depthwise,
    depthwise_conv,
    depthwise_conv_transpose,
    expand_contract,
    gpu_block_autograd,
)
from sagittal.kernels.choice import relative_error, use_kernels
from sagittal.networks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, mednext_blocks

Size = tuple[int, int, int]
Operation = Callable[..., Tensor]

SLACK = 1.25
"""How much worse than the plain form's own error in half precision ours may be: two roundings may fall differently."""
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative errors that pass in any case: the bound for fp32, and one rounding in half precision."""


@dataclass(frozen=True)
class Case:
    """An operation at a size; `passes` over the activation are those of its forward and backward pass;
    `constant` is the number of a tensor that no gradient is asked for; the first `volumes` tensors are activations.

    Letters: C channels, R expanded channels, O outputs.
    """

    name: str
    run: Operation
    shapes: tuple[tuple[int, ...], ...]
    passes: tuple[float, float]
    constant: int | None = None
    volumes: int = 1

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
            if index >= self.volumes and len(shape) > 1:
                tensor = tensor / max(1, torch.Size(shape[1:]).numel()) ** 0.5
            if index < self.volumes:
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


def whole(kind: type[Block], channels: int, size: Size, kernel: int = 3, ratio: int = 2, **options: Any) -> Case:
    """Return a block of the network, as a module with these options, called with its weights as tensors."""
    others = {MedNeXtBlock: channels, MedNeXtDownBlock: 2 * channels, MedNeXtUpBlock: channels // 2}
    with torch.device("meta"):
        module = kind(channels, others[kind], kernel_size=kernel, expansion_ratio=ratio, **options)
    names = [name for name, _ in module.named_parameters()]
    volumes = [(1, channels, *size)]
    if kind is MedNeXtUpBlock:
        volumes.append((1, others[kind], *(2 * n for n in size)))
    weights = [tuple(part.shape) for part in module.parameters()]

    def run(*tensors: Tensor) -> Tensor:
        given, parts = tensors[: len(volumes)], dict(zip(names, tensors[len(volumes) :], strict=True))
        y: Tensor = torch.func.functional_call(module, parts, given)
        return y

    activations = sizes(module, volumes[0])
    forward, backward = (numbers(part, activations) / activations["x"] for part in launches(module))
    told = "".join(f" {key}={value}" for key, value in options.items())
    # The norm takes the convolution's bias away again: its gradient is rounding alone, whatever computes it.
    constant = None if options.get("norm") == "layer" else len(volumes) + names.index("conv1.bias")
    name = {MedNeXtBlock: "block", MedNeXtDownBlock: "down block", MedNeXtUpBlock: "up block"}[kind]
    return Case(
        f"{name} k={kernel} R={ratio}C{told}", run, (*volumes, *weights), (forward, backward), constant, len(volumes)
    )


def _tail_shapes(channels: int, ratio: int) -> tuple[tuple[int, ...], ...]:
    wide = ratio * channels
    return (channels,), (channels,), (wide, channels, 1, 1, 1), (wide,), (channels, wide, 1, 1, 1), (channels,)


def checked_cases(tiny: bool) -> list[Case]:
    """Return what correctness is checked on: edges, sizes that are no multiple of anything, all kernels and strides."""
    if tiny:
        blocks = (MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock)
        return [conv(16, (2, 3, 4), 3), *(whole(kind, 4, (2, 1, 3), grn="v2") for kind in blocks)]
    small: list[Size] = [(1, 2, 3), (9, 6, 7), (17, 33, 20)]
    large: Size = (64, 48, 40)
    cases = [conv(32, size, kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2, 3) for size in (*small, large)]
    cases += [tail(64, size, 3) for size in (*small, large)]
    cases.append(tail(256, (9, 6, 7), 8))
    for kernel in (3, 5):
        cases += [whole(MedNeXtBlock, 32, size, kernel, 2) for size in (*small, large)]
        cases += [whole(MedNeXtDownBlock, 32, size, kernel, 4) for size in small[1:]]
        cases += [whole(MedNeXtUpBlock, 64, size, kernel, 4) for size in small[1:]]
    for options in ({"grn": True}, {"grn": "v2", "norm": "layer"}, {"norm": "layer"}):
        cases.append(whole(MedNeXtBlock, 32, (9, 6, 7), 3, 2, **options))
    cases.append(whole(MedNeXtDownBlock, 32, (9, 6, 7), 3, 2, grn=True))
    cases.append(whole(MedNeXtUpBlock, 64, (5, 6, 7), 3, 2, grn="v2"))
    cases += [whole(kind, 512, (3, 2, 4), 3, 4) for kind in (MedNeXtBlock, MedNeXtUpBlock)]
    cases.append(whole(MedNeXtDownBlock, 32, (9, 6, 7), 3, 2, stride=(1, 2, 2)))
    return cases


@contextmanager
def without_plain_forms() -> Iterator[None]:
    """Make the plain forms raise, so that a kernel that was silently passed by is no success."""
    plain = [(depthwise, "plain_conv"), (depthwise, "plain_transpose"), (block, "_plain_tail")]
    plain += [(gpu_block_autograd, "plain_block"), (mednext_blocks, "pad_front")]
    with ExitStack() as stack:
        for module, name in plain:
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
        with use_kernels("off"):
            shape = case.run(*exact).shape
        grad = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)
    grad = grad.to(dtype).float()
    with use_kernels("off"):
        truth, plain = results(case.run, exact, grad), results(case.run, half, grad)
    with use_kernels("on"), without_plain_forms(), poisoned():
        ours = results(case.run, tensors, grad)
    pairs = [(relative_error(a, t), relative_error(b, t)) for a, b, t in zip(ours, plain, truth, strict=True)]
    good = all(our <= max(FLOOR[dtype], SLACK * usual) for our, usual in pairs)
    return max(our for our, _ in pairs), max(usual for _, usual in pairs), good
