"""The Triton depthwise convolutions against PyTorch in float64; `test_gpu_kernels.py` runs this in a process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime import interpreter

from sagittal.kernels import choice, depthwise, gpu_depthwise
from sagittal.kernels.gpu_depthwise import convolve, convolve_with_moments, data_mode, mode_of, output_size, weight_grad
from sagittal.networks import depthwise_axes

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    # Every sum of integers is made a second time in 64 bits to see whether it overflows: three quarters of the time.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


class Form(NamedTuple):
    """A convolution: kernel and strides along D, H, W; the transposed form."""

    kernel: tuple[int, int, int]
    strides: tuple[int, int, int] = (1, 1, 1)
    transposed: bool = False

    @property
    def mode(self) -> int:
        return mode_of(self.strides, transposed=self.transposed)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolution = F.conv_transpose3d if self.transposed else F.conv3d
        padding = [size // 2 for size in self.kernel]
        y: Tensor = convolution(x, weight, bias, stride=self.strides, padding=padding, groups=x.shape[1])
        return y

    def taps(self, weight: Tensor) -> Tensor:
        """Return (C, 1, kd, kh, kw) or the like as the programs take it: (kd * kh * kw, C) float32."""
        axes = [2 + axis for axis, stride in enumerate(self.strides) if self.transposed and stride == 1]
        return weight.detach().flip(axes).flatten(1).t().float().contiguous()


CUBE3, CUBE5 = Form((3, 3, 3)), Form((5, 5, 5))
DOWN, UP = Form((3, 3, 3), (2, 2, 2)), Form((3, 3, 3), (2, 2, 2), transposed=True)
FLAT_DOWN = Form((1, 3, 3), (1, 2, 2))
FLAT_UP = Form((1, 3, 3), (1, 2, 2), transposed=True)
MIXED_UP = Form((3, 3, 1), (2, 1, 1), transposed=True)


class Numbers(NamedTuple):
    """x (N, C, D, H, W), weight, bias, y, the gradient given at y, and the gradients at the first three; float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor
    grad: Tensor
    grads: Sequence[Tensor]


def numbers(
    form: Form, size: tuple[int, int, int], channels: int, samples: int = 1, dtype: torch.dtype = torch.float32
) -> Numbers:
    generator = torch.Generator().manual_seed(channels)
    shapes = [(samples, channels, *size), (channels, 1, *form.kernel), (channels,)]
    # Rounded first, so that what is compared later is what the programs do, not what their input's dtype lost.
    given = [torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes]
    y = form.plain(*given)
    grad = torch.randn(y.shape, generator=generator).to(dtype).double()
    return Numbers(*(each.detach() for each in given), y.detach(), grad, torch.autograd.grad(y, given, grad))


def dense(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.to(DEVICE, dtype).permute(0, 2, 3, 4, 1).contiguous()


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return float((ours.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30))


def volume(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


def forward(form: Form, case: Numbers, dtype: torch.dtype = torch.float32) -> Tensor:
    out = output_size(case.x.shape[2:], form.mode)
    taps, bias = form.taps(case.weight).to(DEVICE), case.bias.to(DEVICE, dtype)
    return volume(convolve(dense(case.x, dtype), taps, bias, form.kernel, form.mode, out))


def data_grad(form: Form, case: Numbers, dtype: torch.dtype = torch.float32, add: Tensor | None = None) -> Tensor:
    mode, flips = data_mode(form.mode)
    axes = [2 + axis for axis in flips]
    if form.transposed:
        axes = [axis for axis in axes if form.strides[axis - 2] != 1]  # flipped twice
    taps = case.weight.flip(axes).flatten(1).t().float().contiguous().to(DEVICE)
    return volume(convolve(dense(case.grad, dtype), taps, None, form.kernel, mode, case.x.shape[2:], add=add))


def weight_grads(form: Form, case: Numbers, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    taps, bias = weight_grad(dense(case.x, dtype), dense(case.grad, dtype), form.kernel, form.mode)
    grad = taps.t().reshape(case.weight.shape)
    return grad.flip([2 + axis for axis, stride in enumerate(form.strides) if form.transposed and stride == 1]), bias


def assert_exact(form: Form, case: Numbers) -> None:
    assert error(forward(form, case), case.y) < 1e-6
    assert error(data_grad(form, case), case.grads[0]) < 1e-6
    taps, bias = weight_grads(form, case)
    assert error(taps, case.grads[1]) < 1e-6
    assert error(bias, case.grads[2]) < 1e-6


@pytest.mark.parametrize("form", [CUBE3, DOWN, UP, FLAT_DOWN, FLAT_UP, MIXED_UP], ids=str)
@pytest.mark.parametrize(("size", "channels"), [((2, 5, 4), 3), ((1, 2, 9), 17)])
def test_values_and_gradients_are_those_of_float64(form: Form, size: tuple[int, int, int], channels: int) -> None:
    assert_exact(form, numbers(form, size, channels))


@pytest.mark.parametrize("form", [CUBE5, Form((7, 7, 7)), Form((3, 5, 1), (2, 1, 2))], ids=str)
def test_larger_kernels(form: Form) -> None:
    assert_exact(form, numbers(form, (2 if form == CUBE5 else 1, 4, 3), 2))


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 5), (1, 7, 2)])
def test_every_size_of_an_axis(size: tuple[int, int, int]) -> None:
    for form in (CUBE3, DOWN, UP):
        case = numbers(form, size, 2)
        assert error(forward(form, case), case.y) < 1e-6
        assert error(data_grad(form, case), case.grads[0]) < 1e-6


@pytest.mark.parametrize("form", [CUBE3, FLAT_DOWN], ids=str)
def test_samples_runs_and_blocks_of_channels(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_depthwise, "_LEAST_RUN", 1)
    assert_exact(form, numbers(form, (2, 1, 2), 34, samples=2))


def test_without_bias_and_with_something_added() -> None:
    case = numbers(CUBE3, (3, 4, 5), 3)
    taps = CUBE3.taps(case.weight).to(DEVICE)
    y = volume(convolve(dense(case.x), taps, None, (3, 3, 3), 1, (3, 4, 5)))
    assert error(y, CUBE3.plain(case.x, case.weight, None)) < 1e-6
    for form in (CUBE3, UP):
        case = numbers(form, (3, 4, 5), 3)
        extra = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5))
        assert error(data_grad(form, case, add=dense(extra)), case.grads[0] + extra.double()) < 1e-6


@pytest.mark.parametrize("form", [CUBE3, DOWN, FLAT_UP], ids=str)
def test_moments_come_with_the_result(form: Form) -> None:
    case = numbers(form, (3, 5, 4), 5, samples=2)
    # A mean of a hundred deviations: sums of h and of its square would keep three digits in float32. (Beyond that the
    # mean's own last bit, as a float32, is what the variance loses.)
    bias = (case.bias + 300).float().to(DEVICE)
    out = output_size(case.x.shape[2:], form.mode)
    y, mean, variance = convolve_with_moments(
        dense(case.x), form.taps(case.weight).to(DEVICE), bias, form.kernel, form.mode, out
    )
    stored = y.cpu().double().flatten(1, 3)
    assert error(volume(y), case.y + bias.cpu().double().view(-1, 1, 1, 1) - case.bias.view(-1, 1, 1, 1)) < 1e-6
    assert error(mean, stored.mean(1)) < 1e-6
    assert error(variance, stored.var(1, correction=0)) < 1e-5


def test_many_summaries_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_depthwise, "_PARTS_MERGED", 2)
    monkeypatch.setattr(gpu_depthwise, "_LEAST_RUN", 1)
    case = numbers(CUBE3, (5, 2, 3), 2)
    taps, bias = CUBE3.taps(case.weight).to(DEVICE), case.bias.float().to(DEVICE)
    _, mean, variance = convolve_with_moments(dense(case.x), taps, bias, (3, 3, 3), 1, (5, 2, 3))
    assert error(mean, case.y.mean((2, 3, 4))) < 1e-5
    assert error(variance, case.y.var((2, 3, 4), correction=0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [CUBE3, FLAT_UP], ids=str)
def test_half_precision_rounds_once(form: Form, dtype: torch.dtype) -> None:
    case = numbers(form, (2, 5, 4), 4, dtype=dtype)
    for ours, exact in (
        (forward(form, case, dtype), case.y),
        (data_grad(form, case, dtype), case.grads[0]),
    ):
        assert ours.dtype == dtype
        assert error(ours, exact) <= 1.05 * error(exact.to(dtype), exact)
    taps, bias = weight_grads(form, case, dtype)
    assert taps.dtype == bias.dtype == torch.float32
    assert error(taps, case.grads[1]) < 1e-6
    assert error(bias, case.grads[2]) < 1e-6


@pytest.fixture
def banded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let small volumes take the tensor cores' path too; returns what path each convolution took."""
    monkeypatch.setattr(gpu_depthwise, "_LEAST_PLANE", 0)
    monkeypatch.setattr(gpu_depthwise, "_LEAST_CHANNELS", 0)
    taken: list[str] = []
    choose = gpu_depthwise._band

    def note(*arguments: object) -> object:
        band = choose(*arguments)  # type: ignore[arg-type]
        taken.append("slide" if band is None else "band")
        return band

    monkeypatch.setattr(gpu_depthwise, "_band", note)
    return taken


BANDED = [
    (CUBE3, (2, 5, 9), 3, torch.bfloat16),
    (CUBE3, (1, 1, 41), 17, torch.float16),
    (CUBE5, (1, 3, 5), 2, torch.bfloat16),
    (Form((3, 7, 7)), (1, 3, 4), 2, torch.float16),
    (Form((1, 3, 3)), (1, 70, 2), 2, torch.bfloat16),
    (Form((3, 1, 5)), (2, 5, 9), 2, torch.float16),
]


@pytest.mark.parametrize(("form", "size", "channels", "dtype"), BANDED, ids=str)
def test_banded_products_round_once(
    form: Form, size: tuple[int, int, int], channels: int, dtype: torch.dtype, banded: list[str]
) -> None:
    case = numbers(form, size, channels, dtype=dtype)
    extra = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(5)).to(dtype).double()
    sums = case.grads[0] + extra
    for ours, exact in (
        (forward(form, case, dtype), case.y),
        (data_grad(form, case, dtype, add=dense(extra, dtype)), sums),
    ):
        assert error(ours, exact) <= 1.05 * error(exact.to(dtype), exact)
    taps, bias = weight_grads(form, case, dtype)
    assert error(taps, case.grads[1]) < 1e-6
    assert error(bias, case.grads[2]) < 1e-6
    assert banded == ["band"] * 3


def test_moments_come_with_banded_products(banded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_depthwise, "_LEAST_RUN", 1)
    case = numbers(CUBE3, (2, 5, 9), 3, samples=2, dtype=torch.float16)
    taps, bias = CUBE3.taps(case.weight).to(DEVICE), (case.bias + 30).float().to(DEVICE)
    y, mean, variance = convolve_with_moments(dense(case.x, torch.float16), taps, bias, (3, 3, 3), 1, (2, 5, 9))
    stored = y.cpu().double().flatten(1, 3)
    assert error(mean, stored.mean(1)) < 1e-6
    assert error(variance, stored.var(1, correction=0)) < 1e-5
    assert banded == ["band"]


def test_fp32_strides_and_small_planes_keep_to_the_cuda_cores(banded: list[str]) -> None:
    for form, dtype in ((CUBE3, torch.float32), (DOWN, torch.bfloat16), (Form((3, 3, 1)), torch.bfloat16)):
        forward(form, numbers(form, (1, 2, 3), 1, dtype=dtype), dtype)
    assert banded == ["slide"] * 3


def test_a_patch_beside_takes_no_part_in_a_run_over_the_border(banded: list[str]) -> None:
    # Numbers that are no numbers lie in another sample and another channel: no load may reach beyond its own.
    case = numbers(CUBE3, (1, 3, 5), 3, samples=3, dtype=torch.bfloat16)
    case.x[1] = float("nan")
    case.x[0, 1] = float("nan")
    y = forward(CUBE3, case, torch.bfloat16).cpu()
    assert y[[0, 0, 2], [0, 2, 1]].isfinite().all()
    assert banded == ["band"]


MIXED = [
    ((1, 3, 3), (1, 2, 2)),
    ((3, 3, 3), (1, 2, 2)),
    ((3, 1, 3), (2, 1, 1)),
    ((5, 3), (1, 2)),
    ((1, 3, 3), (1, 1, 1)),
]


@pytest.mark.parametrize(("kernel", "strides"), MIXED)
@pytest.mark.parametrize("transposed", [False, True])
def test_mixed_axes_take_the_kernels(kernel: tuple[int, ...], strides: tuple[int, ...], transposed: bool) -> None:
    axes = len(kernel)
    shapes = [(1, 2, *(2, 4, 5)[-axes:]), (2, 1, *kernel), (2,)]
    generator = torch.Generator().manual_seed(axes)
    exact = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes]
    plain = depthwise.plain_transpose if transposed else depthwise.plain_conv
    convolve = depthwise_axes.depthwise_transpose if transposed else depthwise_axes.depthwise
    y = plain(*exact, strides)
    grad = torch.randn(y.shape, generator=generator).double()
    expected = [y, *torch.autograd.grad(y, exact, grad)]
    given = [tensor.detach().float().to(DEVICE).requires_grad_() for tensor in exact]
    with ExitStack() as stack:
        stack.enter_context(choice.interpreted_on_cpu() if INTERPRETED else nullcontext())
        stack.enter_context(choice.use_kernels("on"))
        for name in ("plain_conv", "plain_transpose"):
            stack.enter_context(mock.patch.object(depthwise_axes, name, side_effect=AssertionError(name)))
        y = convolve(*given, strides)
        ours = [y, *torch.autograd.grad(y, given, grad.float().to(DEVICE))]
    for found, true in zip(ours, expected, strict=True):
        assert error(found.detach(), true.detach()) < 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_a_trial_of_mixed_axes_compares_like_with_like(transposed: bool) -> None:
    job = choice.Job("depthwise_axes", DEVICE, "float32", 8, (2, int(transposed), 3, 1, 3, 3, 1, 2, 1), training=False)
    rivals = depthwise._rivals_per_axis(job, (2, 3, 4))
    with choice.interpreted_on_cpu() if INTERPRETED else nullcontext():
        assert error(rivals.kernels(*rivals.tensors), rivals.plain(*rivals.tensors).double().cpu()) < 1e-6


def test_shapes_that_do_not_fit_are_left_to_pytorch() -> None:
    x, bias = torch.randn(1, 2, 3, 4, 5, device=DEVICE), torch.randn(2, device=DEVICE)
    with choice.interpreted_on_cpu() if INTERPRETED else nullcontext(), choice.use_kernels("on"):
        for weight, given in (((3, 1, 1, 3, 3), bias), ((2, 1, 1, 2, 3), bias), ((2, 1, 1, 3, 3), bias[:1])):
            taps = torch.randn(weight, device=DEVICE)
            assert depthwise.per_axis_on_gpu(x, taps, given, (1, 1, 1), transposed=False) is None


def test_the_operator_knows_the_size_of_mixed_axes() -> None:
    x, weight = torch.empty(1, 2, 3, 4, 5, device="meta"), torch.empty(2, 1, 1, 3, 3, device="meta")
    mode = mode_of((1, 2, 2), transposed=True)
    assert torch.ops.sagittal.depthwise(x, weight, None, mode).shape == (1, 2, 3, 7, 9)


def test_the_same_bits_at_each_run() -> None:
    case = numbers(CUBE3, (2, 5, 9), 5)
    first, second = (weight_grads(CUBE3, case) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_nothing_unwritten_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Tensor.new_empty

    def poisoned(tensor: Tensor, *arguments: object, **options: object) -> Tensor:
        return empty(tensor, *arguments, **options).fill_(float("nan"))  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for form in (CUBE3, DOWN, UP):
        assert_exact(form, numbers(form, (1, 3, 5), 3))


@pytest.mark.parametrize(
    ("strides", "transposed", "mode"),
    [
        ((1, 1, 1), False, 1),
        ((2, 2, 2), False, 2),
        ((2, 2, 2), True, 3),
        ((1, 2, 2), False, 122),
        ((1, 2, 2), True, 133),
    ],
)
def test_codes_of_modes(strides: tuple[int, int, int], transposed: bool, mode: int) -> None:
    assert mode_of(strides, transposed=transposed) == mode
    back, flips = data_mode(mode)
    assert data_mode(back) == (mode, flips)
