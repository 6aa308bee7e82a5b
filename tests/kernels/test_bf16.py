"""The kernels under autocast to bfloat16 on the CPU: products rounded, all else float32, nothing left unwritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.kernels import (
    TailWeights,
    cpu_bf16_reason,
    depthwise_conv,
    depthwise_conv_transpose,
    expand_contract,
    mednext_block,
    native,
    pointwise,
)
from sagittal.kernels.bf16 import products_in_bf16
from sagittal.kernels.depthwise import plain_conv, plain_transpose

tiles = pytest.mark.skipif(not native.has_tiles(), reason="the processor has no AMX-BF16, or the kernels are not built")

Run = Callable[..., Tensor]


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(len, shapes)) + shapes[0][-1])
    return [torch.randn(shape, generator=generator) for shape in shapes]


def block_tensors(channels: int, wide: int, outputs: int, size: tuple[int, ...]) -> list[Tensor]:
    """x, the depthwise kernel and bias, then the six tensors of TailWeights."""
    one = (1,) * len(size)
    expand, contract = (wide, channels, *one), (outputs, wide, *one)
    x, kernel, *rest = draw(
        (2, channels, *size),
        (channels, 1, *(3,) * len(size)),
        *((channels,),) * 3,
        expand,
        (wide,),
        contract,
        (outputs,),
    )
    rest[3] /= channels**0.5
    rest[5] /= wide**0.5
    return [x, kernel, *rest]


def step(run: Run, tensors: list[Tensor], *, autocast: bool) -> list[Tensor]:
    """Return the result and all gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(*leaves)
    (grad,) = draw(tuple(y.shape))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def foul_memory() -> None:
    """Leave huge numbers in memory that is free, so that reading what nobody wrote shows."""
    for power in range(6, 18):
        torch.full((2**power,), 1e30)


def whole_block(*t: Tensor) -> Tensor:
    return mednext_block(t[0], t[1], t[2], TailWeights(*t[3:]), residual=t[0].shape[1] == t[7].shape[0])


@tiles
@pytest.mark.parametrize("size", [(5, 7, 6), (9, 20, 11), (3, 1, 2)])
@pytest.mark.parametrize(
    ("channels", "wide", "outputs"),
    [(16, 16, 16), (16, 32, 16), (32, 64, 32), (48, 144, 48), (64, 128, 96), (16, 560, 32)],
)
def test_a_block_is_near_float64_and_repeats_bit_for_bit(
    channels: int, wide: int, outputs: int, size: tuple[int, int, int]
) -> None:
    tensors = block_tensors(channels, wide, outputs, size)
    exact = step(whole_block, [tensor.double() for tensor in tensors], autocast=False)
    first = step(whole_block, tensors, autocast=True)
    foul_memory()
    second = step(whole_block, tensors, autocast=True)
    for index, (ours, again, expected) in enumerate(zip(first, second, exact, strict=True)):
        assert torch.equal(ours, again)
        # the norm takes the mean away, so the gradient at the depthwise bias is zero up to rounding
        scale = exact[0].norm() if index == 3 else expected.norm()
        assert (ours.double() - expected).norm() <= 0.015 * scale, f"tensor {index}"
    assert not torch.equal(first[0], step(whole_block, tensors, autocast=False)[0])


@tiles
def test_a_tail_takes_a_residual_of_other_width_and_slices() -> None:
    h, _, _, *weights = block_tensors(32, 64, 48, (9, 10))
    tensors = [h, *draw((2, 48, 9, 10)), *weights]

    def run(*t: Tensor) -> Tensor:
        return expand_contract(t[0], TailWeights(*t[2:]), residual=t[1])

    exact = step(run, [tensor.double() for tensor in tensors], autocast=False)
    for ours, expected in zip(step(run, tensors, autocast=True), exact, strict=True):
        assert (ours.double() - expected).norm() <= 0.01 * expected.norm()


@tiles
def test_threads_and_the_place_of_the_backward_pass_do_not_change_a_bit() -> None:
    tensors = block_tensors(32, 64, 32, (9, 20, 11))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = step(whole_block, tensors, autocast=True)
        torch.set_num_threads(3)
        three = step(whole_block, tensors, autocast=True)
        with torch.autocast("cpu", torch.bfloat16):
            inside = step(whole_block, tensors, autocast=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert all(torch.equal(a, b) for a, b in zip(three, inside, strict=True))


@tiles
def test_values_that_are_not_numbers_are_handed_on() -> None:
    tensors = block_tensors(16, 32, 16, (3, 4, 5))
    tensors[0][1, 3, 1, 2, 3] = torch.nan
    y, grad, *_ = step(whole_block, tensors, autocast=True)
    assert y[1].isnan().any() and grad[1].isnan().any()
    assert y[0].isfinite().all()


@tiles
def test_the_activation_is_the_erf_gelu_to_the_digits_of_bfloat16() -> None:
    # The norm divides by 4 and its weight multiplies by 4, so that the activation sees h with the digits of bfloat16.
    values = torch.linspace(-1, 1, 4001)
    values = values * (4 / values.std(correction=0))
    h = values.expand(1, 16, -1).contiguous().view(1, 16, 1, 1, -1)
    one = torch.eye(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = expand_contract(
            h, TailWeights(torch.full((16,), 4.0), torch.zeros(16), one, torch.zeros(16), one, torch.zeros(16))
        )
    x = values.double().requires_grad_()
    exact = F.gelu(x)
    (slope,) = torch.autograd.grad(exact.sum(), x)
    allowed = 1e-4 + 2**-8 * (exact.abs() + (x * slope).abs())
    assert ((y[0, 0, 0, 0] - exact).abs() <= allowed).all()
    assert y.abs().max() > 6


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 2), (2, 2, 2), (5, 6, 7)])
@pytest.mark.parametrize("channels", [16, 3])
@pytest.mark.parametrize(
    "run",
    [
        depthwise_conv,
        lambda *t: depthwise_conv(*t, stride=2),
        depthwise_conv_transpose,
        lambda *t: plain_conv(*t, strides=(1, 2, 2)),
        lambda *t: plain_transpose(*t, strides=(1, 2, 2)),
        lambda x, weight, bias: pointwise(x, weight[:, 0, 0, 0, :1].expand(-1, x.shape[1]), bias),
    ],
)
def test_convolutions_stay_in_float32(run: Run, channels: int, size: tuple[int, int, int]) -> None:
    tensors = draw((2, channels, *size), (channels, 1, 3, 3, 3), (channels,))
    expected = step(run, tensors, autocast=False)
    foul_memory()
    for ours, exact in zip(step(run, tensors, autocast=True), expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact)


def test_half_precision_input_is_taken_as_float32() -> None:
    x, weight, bias = draw((1, 16, 3, 4, 5), (16, 1, 3, 3, 3), (16,))
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x.bfloat16(), weight, bias)
    assert torch.equal(y, depthwise_conv(x.bfloat16().float(), weight, bias))


@pytest.mark.parametrize("missing", ["library", "tiles", "dtype"])
def test_without_tiles_or_bfloat16_autocast_gives_the_float32_block(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = block_tensors(16, 32, 16, (3, 4, 5))
    dtype = torch.float16 if missing == "dtype" else torch.bfloat16
    if missing == "library":
        monkeypatch.setattr(native, "_library", None)
    if missing != "dtype":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
    with torch.autocast("cpu", dtype):
        assert not products_in_bf16(tensors[0])
        y = whole_block(*tensors)
    assert torch.equal(y, whole_block(*tensors))


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cpu_bf16_reason() is None) == native.has_tiles()
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(native, "cpu_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "AMX" in str(cpu_bf16_reason())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "built without" in str(cpu_bf16_reason())
    monkeypatch.setattr(native, "cpu_available", lambda: False)
    assert "not installed" in str(cpu_bf16_reason())
