"""The fused MedNeXt block against its plain twin in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.errors import DataError
from sagittal.kernels import TailWeights, cpu_available, expand_contract, keep_freed_memory, mednext_block, native

compiled = pytest.mark.skipif(not cpu_available(), reason="the compiled CPU kernels are not built here")


def make(channels: int, wide: int, outputs: int, size: tuple[int, ...] = (5, 7, 6), kernel: int = 3) -> list[Tensor]:
    """x, the depthwise kernel and bias, then the six tensors of TailWeights."""
    generator = torch.Generator().manual_seed(channels + wide)
    shapes = [
        (2, channels, *size),
        (channels, 1, *(kernel,) * len(size)),
        (channels,),
        (channels,),
        (channels,),
        (wide, channels, *(1,) * len(size)),
        (wide,),
        (outputs, wide, *(1,) * len(size)),
        (outputs,),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[5] /= channels**0.5
    tensors[7] /= wide**0.5
    return [tensor.requires_grad_() for tensor in tensors]


def block(tensors: list[Tensor], residual: bool) -> Tensor:
    return mednext_block(tensors[0], tensors[1], tensors[2], TailWeights(*tensors[3:]), residual=residual)


def by_hand(tensors: list[Tensor], residual: bool) -> Tensor:
    x, kernel, kernel_bias, norm_weight, norm_bias, expand, expand_bias, contract, contract_bias = tensors
    h = F.conv3d(x, kernel, kernel_bias, padding=kernel.shape[-1] // 2, groups=x.shape[1])
    normed = torch.group_norm(h, x.shape[1], norm_weight, norm_bias, 1e-5)
    y = F.conv3d(F.gelu(F.conv3d(normed, expand, expand_bias)), contract, contract_bias)
    return x + y if residual else y


def assert_same_gradients(ours: list[Tensor], exact: list[Tensor], y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= 2e-6 * expected.norm()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    pairs = zip(torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True)
    for index, (a, b) in enumerate(pairs):
        # the norm takes the mean away, so the gradient at the depthwise bias is zero up to rounding
        scale = grad.norm() if index == 2 else b.norm()
        assert (a.double() - b).norm() <= 5e-6 * scale, f"tensor {index}"


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    ("channels", "wide", "outputs", "residual"),
    [
        (16, 32, 16, True),
        (32, 64, 32, True),
        (48, 144, 48, True),
        (64, 128, 96, False),
        (128, 256, 128, True),
        (3, 6, 3, True),
    ],
)
def test_block_matches_float64(level: int, channels: int, wide: int, outputs: int, residual: bool) -> None:
    native.limit_instruction_set(level)
    try:
        tensors = make(channels, wide, outputs)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        assert_same_gradients(tensors, exact, block(tensors, residual), by_hand(exact, residual))
    finally:
        native.limit_instruction_set(2)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 3), (13, 11, 9)])
def test_block_matches_at_odd_sizes(size: tuple[int, int, int]) -> None:
    tensors = make(32, 64, 32, size, kernel=5)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y, expected = block(tensors, True), by_hand(exact, True)
    assert (y.double() - expected).norm() <= 2e-6 * expected.norm()
    if size != (1, 1, 1):  # a single voxel's norm has no gradient: both give noise around zero
        assert_same_gradients(tensors, exact, y, expected)


def test_tail_takes_a_residual_of_other_width_and_slices() -> None:
    for size in ((5, 7, 6), (9, 10)):
        h, _, _, *weights = make(32, 64, 48, size)
        residual = torch.randn(2, 48, *size, requires_grad=True)
        tensors = [h, residual, *weights]
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        y = expand_contract(h, TailWeights(*weights), residual=residual)
        expected = expand_contract(exact[0], TailWeights(*exact[2:]), residual=exact[1])
        assert (y.double() - expected).norm() <= 2e-6 * expected.norm()
        grad = torch.randn(y.shape)
        for a, b in zip(
            torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
        ):
            assert (a.double() - b).norm() <= 5e-6 * b.norm()


@compiled
def test_a_mean_far_from_zero_costs_no_more_than_in_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [tensor.detach() for tensor in make(32, 64, 32)]
    weights = TailWeights(*tensors[3:])
    far = tensors[0] + 300
    expected = expand_contract(far.double(), TailWeights(*(weight.double() for weight in weights)))
    ours = expand_contract(far, weights)
    monkeypatch.setattr(native, "_library", None)
    plain = expand_contract(far, weights)
    assert not torch.equal(ours, plain)
    assert (ours - expected).norm() <= 1.5 * (plain - expected).norm()
    assert (ours - expected).norm() <= 3e-5 * expected.norm()


@compiled
def test_threads_do_not_change_a_bit() -> None:
    tensors = make(32, 64, 32, (9, 20, 11))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = block(tensors, True)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    # bits of the gradients rest on small products by the framework, which may add up in another order
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for a, b in zip(results[0][1:], other[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_backward_twice_through_the_same_run_is_bit_equal() -> None:
    tensors = make(64, 128, 64)
    y = block(tensors, True)
    first = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inference_gives_the_same_and_keeps_nothing() -> None:
    tensors = make(32, 64, 32)
    with torch.inference_mode():
        y = block(tensors, True)
    assert not y.requires_grad
    assert torch.equal(y, block(tensors, True).detach())


def test_frozen_tensors_get_no_gradient() -> None:
    tensors = make(32, 64, 32)
    full = torch.autograd.grad(block(tensors, True).sum(), tensors[5])
    frozen = [tensor.detach() for tensor in tensors]
    frozen[5].requires_grad_()
    assert torch.equal(torch.autograd.grad(block(frozen, True).sum(), frozen[5])[0], full[0])


def test_without_the_library_the_twin_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(32, 64, 32)
    ours = block(tensors, True)
    monkeypatch.setattr(native, "_library", None)
    torch.testing.assert_close(block(tensors, True), ours, rtol=1e-4, atol=1e-5)


@compiled
def test_only_what_the_backward_pass_needs_is_kept() -> None:
    tensors = make(32, 128, 32, (8, 8, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block(tensors, True)
    voxels = 2 * 8 * 8 * 8
    assert sum(tensor.numel() for tensor in kept) < 3 * voxels * 32, "x and h, never the four times wider activation"


@compiled
def test_gelu_follows_the_exact_function() -> None:
    u = torch.linspace(-20, 20, 160000)
    ours, grad = u.clone(), torch.ones_like(u)
    native.gelu_(ours, grad)
    exact = u.double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    assert exact.grad is not None
    assert ((ours - expected).abs() / exact.abs().clamp_min(1)).max() < 1.5e-7
    assert (grad - exact.grad).abs().max() < 3e-7
    assert torch.equal(native.gelu_(u.clone()), ours)


@compiled
def test_gelu_hands_a_nan_on() -> None:
    u = torch.tensor([torch.nan, torch.inf, 0.0, -100.0] * 4)
    result = native.gelu_(u)
    assert result[0].isnan()
    assert result[1] == torch.inf
    assert result[2] == 0
    assert abs(result[3]) < 1e-30


def test_a_nan_reaches_the_output() -> None:
    tensors = [tensor.detach() for tensor in make(32, 64, 32)]
    tensors[0][1, 4, 2, 2, 2] = torch.nan
    y = block(tensors, True)
    assert y[1].isnan().all()  # through the statistics of its case
    assert not y[0].isnan().any()


def test_second_derivatives_are_refused() -> None:
    tensors = make(32, 64, 32, (2, 3, 4))
    (grad,) = torch.autograd.grad(block(tensors, True).sum(), tensors[0], create_graph=True)
    if cpu_available():
        with pytest.raises(RuntimeError, match="does not require grad"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (16,), "norm_weight"),
        (2, (64, 16, 1, 1, 1), "expand of"),
        (3, (32,), "expand_bias"),
        (4, (48, 32, 1, 1, 1), "contract of"),
        (5, (32,), "contract_bias"),
    ],
)
def test_wrong_weights_are_named(index: int, shape: tuple[int, ...], message: str) -> None:
    h, _, _, *weights = make(32, 64, 48)
    weights[index] = torch.zeros(shape)
    with pytest.raises(DataError, match=message):
        expand_contract(h, TailWeights(*weights))


def test_a_residual_of_another_width_is_named() -> None:
    h, kernel, bias, *weights = make(32, 64, 48)
    with pytest.raises(DataError, match="the residual of a MedNeXt block"):
        mednext_block(h, kernel, bias, TailWeights(*weights))


def test_keeping_freed_memory_tells_whether_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLibrary:
        pass

    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: NoLibrary())
    assert keep_freed_memory() is False
