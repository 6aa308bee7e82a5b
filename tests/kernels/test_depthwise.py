"""The compiled depthwise convolution against PyTorch in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.errors import DataError
from sagittal.kernels import cpu_available, depthwise_conv, depthwise_conv_transpose, native

compiled = pytest.mark.skipif(not cpu_available(), reason="the compiled CPU kernels are not built here")

MODES = ("stride 1", "stride 2", "transposed")


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[int]:
    if native.limit_instruction_set(request.param) != request.param:
        native.limit_instruction_set(2)
        pytest.skip("this processor, or this machine's build, lacks the instruction set")
    yield request.param
    native.limit_instruction_set(2)


def convolve(mode: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if mode == "transposed":
        return depthwise_conv_transpose(x, weight, bias)
    return depthwise_conv(x, weight, bias, stride=int(mode[-1]))


def oracle(mode: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding, groups = weight.shape[-1] // 2, x.shape[1]
    if mode == "transposed":
        return F.conv_transpose3d(x, weight, bias, stride=2, padding=padding, groups=groups)
    return F.conv3d(x, weight, bias, stride=int(mode[-1]), padding=padding, groups=groups)


def parameters(channels: int, kernel: int, size: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels * 100 + kernel)
    shapes = [(2, channels, *size), (channels, 1, kernel, kernel, kernel), (channels,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def assert_close(ours: Tensor | None, exact: Tensor | None) -> None:
    assert ours is not None and exact is not None and ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()


def compare(mode: str, tensors: list[Tensor]) -> None:
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y, expected = convolve(mode, *tensors), oracle(mode, *exact)
    assert_close(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    for ours, other in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert_close(ours, other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "channels"), [(1, 16), (3, 16), (3, 48), (5, 32), (7, 16), (9, 16)])
def test_matches_float64_on_every_instruction_set(instruction_set: int, mode: str, kernel: int, channels: int) -> None:
    compare(mode, parameters(channels, kernel, (3, 6, 13)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 3), (9, 17, 2), (4, 10, 31)])
@pytest.mark.parametrize("channels", [1, 3, 32, 80])
def test_matches_float64_at_every_size_and_width(mode: str, size: tuple[int, int, int], channels: int) -> None:
    compare(mode, parameters(channels, 3, size))


@pytest.mark.parametrize("mode", MODES)
def test_works_without_bias_and_on_slices(mode: str) -> None:
    x, weight, _ = parameters(32, 3, (5, 6, 7))
    assert_close(convolve(mode, x, weight, None), oracle(mode, x.double(), weight.double(), None))
    flat = convolve(mode, x[:, :, 2], weight[:, :, 1], None)
    padding = {"padding": 1, "groups": 32}
    doubles = x[:, :, 2].double(), weight[:, :, 1].double()
    if mode == "transposed":
        assert_close(flat, F.conv_transpose2d(*doubles, stride=2, **padding))
    else:
        assert_close(flat, F.conv2d(*doubles, stride=int(mode[-1]), **padding))


@pytest.mark.parametrize("mode", MODES)
def test_memory_format_does_not_change_the_result(mode: str) -> None:
    x, weight, bias = (tensor.detach() for tensor in parameters(16, 3, (4, 5, 12)))
    y = convolve(mode, x, weight, bias)
    assert torch.equal(y, convolve(mode, x.contiguous(memory_format=torch.channels_last_3d), weight, bias))
    every_other = torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]
    assert not every_other.is_contiguous()
    assert torch.equal(y, convolve(mode, every_other, weight, bias))


@compiled
@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode: str) -> None:
    tensors = parameters(80, 3, (9, 10, 11))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = convolve(mode, *tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # the bias of the transposed form is summed by the framework
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


@compiled
def test_threads_of_our_own_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (tensor.detach() for tensor in parameters(32, 3, (9, 10, 11)))
    expected = depthwise_conv(x, weight, bias)
    monkeypatch.setattr(native, "_openmp_entry", lambda: None)
    try:
        native.limit_instruction_set(2)
        assert torch.equal(depthwise_conv(x, weight, bias), expected)
    finally:
        monkeypatch.undo()
        native.limit_instruction_set(2)


@pytest.mark.parametrize("mode", MODES)
def test_without_the_library_the_twin_takes_over(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = parameters(16, 3, (4, 5, 6))
    ours = convolve(mode, *tensors)
    monkeypatch.setattr(native, "_library", None)
    assert not cpu_available()
    assert native.limit_instruction_set(2) == -1
    assert_close(ours, convolve(mode, *tensors).double())
    compare(mode, tensors)


def test_a_nan_reaches_the_output() -> None:
    x, weight, bias = (tensor.detach() for tensor in parameters(16, 3, (4, 5, 6)))
    x[0, 3, 2, 2, 2] = torch.nan
    y = depthwise_conv(x, weight, bias)
    assert y[0, 3, 1:4, 1:4, 1:4].isnan().all()
    assert y.isnan().sum() == 27


@compiled
def test_the_twin_runs_where_the_kernels_cannot() -> None:
    x = torch.randn(1, 16, 4, 5, 6)
    assert native.usable(x)
    assert not native.usable(x.double())
    assert not native.usable(x.to("meta"))
    assert not native.usable(x[:0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not native.usable(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(native.usable(x)) or row)(x)
    assert seen == [False]


def test_export_sees_plain_operators() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return depthwise_conv(x, torch.ones(16, 1, 3, 3, 3))

    program = torch.export.export(Module(), (torch.randn(1, 16, 4, 5, 6),))
    assert any("conv3d" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "stride", "message"),
    [
        ((2, 16, 4, 4), (16, 1, 3, 3, 3), None, 1, r"expected x \(N, C, D, H, W\)"),
        ((2, 16, 4, 4, 4), (8, 1, 3, 3, 3), None, 1, r"expected x \(N, C, D, H, W\)"),
        ((2, 16, 4, 4, 4), (16, 1, 4, 4, 4), None, 1, "same odd number"),
        ((2, 16, 4, 4, 4), (16, 1, 3, 3, 5), None, 1, "same odd number"),
        ((2, 16, 4, 4, 4), (16, 1, 3, 3, 3), (8,), 1, "one number for each channel"),
        ((2, 16, 4, 4, 4), (16, 1, 3, 3, 3), None, 3, "expected 1 or 2"),
    ],
)
def test_wrong_shapes_are_named(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, stride: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        depthwise_conv(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), stride=stride)


@pytest.mark.parametrize("bias", [torch.ones(1).expand(16), torch.arange(32.0)[::2]], ids=["expanded", "strided"])
def test_a_bias_that_is_not_dense_is_read_by_its_values(bias):
    x, weight = torch.randn(1, 16, 3, 4, 5), torch.zeros(16, 1, 3, 3, 3)
    assert torch.equal(depthwise_conv(x, weight, bias), bias.view(1, 16, 1, 1, 1).expand_as(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_convolution_consists_of_plain_operators():
    weight = torch.randn(16, 1, 3, 3, 3)
    graph = str(torch.jit.trace(lambda x: depthwise_conv(x, weight), torch.randn(1, 16, 3, 4, 5)).graph)
    assert "aten::" in graph
    assert "PythonOp" not in graph and "^_Depthwise" not in graph
