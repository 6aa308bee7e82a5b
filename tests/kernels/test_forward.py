"""The kernels of a forward pass: moments taken on the way, up blocks in one pass, volumes that go past the caches."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.kernels import TailWeights, cpu_available, depthwise, mednext_block, mednext_up_block, native, pointwise

pytestmark = pytest.mark.skipif(not cpu_available(), reason="the compiled CPU kernels are not built here")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tail(channels: int, wide: int, outputs: int) -> TailWeights:
    return TailWeights(
        1 + normal(channels) / 4,
        normal(channels, seed=1),
        normal(wide, channels, 1, 1, 1) / channels**0.5,
        normal(wide),
        normal(outputs, wide, 1, 1, 1) / wide**0.5,
        normal(outputs, seed=2),
    )


def tail_by_hand(h: Tensor, weights: TailWeights) -> Tensor:
    exact = TailWeights(*(weight.double() for weight in weights))
    normed = torch.group_norm(h, h.shape[1], exact.norm_weight, exact.norm_bias, 1e-5)
    wide = F.gelu(F.conv3d(normed, exact.expand, exact.expand_bias))
    return F.conv3d(wide, exact.contract, exact.contract_bias)


def assert_near(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [1, native.TRANSPOSED])
@pytest.mark.parametrize(
    ("size", "kernel"),
    [((1, 1, 1), (3, 3)), ((2, 9, 17), (3, 3)), ((35, 3, 8), (5, 5)), ((4, 11, 7), (1, 5)), ((3, 10, 5), (7, 7))],
)
def test_moments_are_those_of_the_convolution(
    level: int, mode: int, size: tuple[int, int, int], kernel: tuple[int, int]
) -> None:
    x, bias = normal(2, *size, 80), 50 * normal(80)
    weight = normal(80, 1, kernel[0], kernel[1], kernel[1])
    native.limit_instruction_set(level)
    try:
        h, (mean, scale) = depthwise.swept(x, weight, bias, mode, 1e-5)
        expected = depthwise.forward(x, weight, bias, mode)
    finally:
        native.limit_instruction_set(2)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-4)
    exact = expected.double().flatten(1, 3)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=1e-5)
    # What float32 leaves of values near 50 times some bias.
    deviation = (exact.var(1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(1 / scale.double(), deviation, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(
    ("size", "channels", "wide", "outputs", "kernel"),
    [
        ((2, 3, 4), 32, 64, 16, 3),
        ((5, 2, 9), 64, 128, 32, 5),
        ((2, 2, 2), 128, 528, 80, 3),
        ((3, 2, 101), 32, 64, 16, 7),
    ],
)
def test_an_up_block_in_one_pass(
    level: int, has_residual: bool, size: tuple[int, int, int], channels: int, wide: int, outputs: int, kernel: int
) -> None:
    x, weights = normal(2, channels, *size), tail(channels, wide, outputs)
    taps, bias = normal(channels, 1, kernel, kernel, kernel), normal(channels)
    skip = normal(2, outputs, *(2 * n for n in size))
    residual = normal(outputs, channels, 1, 1, 1) if has_residual else None
    native.limit_instruction_set(level)
    try:
        with torch.inference_mode():
            y = mednext_up_block(x, taps, bias, weights, residual, skip)
    finally:
        native.limit_instruction_set(2)
    h = F.conv_transpose3d(x.double(), taps.double(), bias.double(), 2, kernel // 2, groups=channels)
    expected = skip + F.pad(tail_by_hand(h, weights), (1, 0, 1, 0, 1, 0))
    if residual is not None:
        expected[:, :, 1::2, 1::2, 1::2] += F.conv3d(x.double(), residual.double())
    assert y is not None
    assert_near(y, expected)


def test_an_up_block_with_gradients_is_left_to_others() -> None:
    x, weights, skip = normal(1, 32, 2, 3, 4), tail(32, 64, 16), normal(1, 16, 4, 6, 8)
    assert mednext_up_block(x, normal(32, 1, 3, 3, 3), None, weights, None, skip) is None


def test_a_volume_that_goes_past_the_caches() -> None:
    x, weights = normal(1, 32, 47, 53, 61), tail(32, 64, 32)
    taps, bias = normal(32, 1, 3, 3, 3), normal(32)
    with torch.inference_mode():
        y = mednext_block(x, taps, bias, weights)
    h = F.conv3d(x.double(), taps.double(), bias.double(), padding=1, groups=32)
    assert_near(y, x + tail_by_hand(h, weights))


@pytest.mark.parametrize("channels", [512, 48])
def test_many_channels_go_in_blocks(channels: int) -> None:
    x, weights, taps = normal(2, channels, 3, 5, 10), tail(channels, 1040, 96), normal(channels, 1, 3, 3, 3)
    with torch.inference_mode():
        y = mednext_block(x, taps, None, weights, residual=False)
    h = F.conv3d(x.double(), taps.double(), None, padding=1, groups=channels)
    assert_near(y, tail_by_hand(h, weights))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_reads_channels_that_lie_apart(channels: int) -> None:
    x, weight, bias = normal(2, channels, 17, 16, 31), normal(48, channels, 1, 1, 1), normal(48)
    with torch.inference_mode():
        y, strided = pointwise(x, weight, bias), pointwise(x.transpose(2, 4), weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_near(y, F.conv3d(x.double(), weight.double(), bias.double()))
    assert torch.equal(strided, y.transpose(2, 4))
