"""The CPU kernels inside the graphs of torch.compile: called as operators, with the numbers of eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sagittal.kernels import (
    TailWeights,
    block,
    cpu_available,
    depthwise,
    depthwise_conv,
    depthwise_conv_transpose,
    expand_contract,
    mednext_block,
    native,
)

compiled = pytest.mark.skipif(not cpu_available(), reason="the compiled CPU kernels are not built here")

Run = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """A backend of torch.compile that runs a graph as it is and keeps the names of its operators."""

    def __init__(self) -> None:
        self.operators: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.operators |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        return graph.forward


def convolution(*size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16, *size), (16, 1, *(3,) * len(size)), (16,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def whole_block(*size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    one = (1,) * len(size)
    shapes = [(16,), (16,), (32, 16, *one), (32,), (16, 32, *one), (16,)]
    return [*convolution(*size), *(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)]


def run_block(*tensors: Tensor) -> Tensor:
    return mednext_block(tensors[0], tensors[1], tensors[2], TailWeights(*tensors[3:]))


def run_down(*tensors: Tensor) -> Tensor:
    return expand_contract(depthwise_conv(*tensors[:3], stride=2), TailWeights(*tensors[3:]))


def run_up(*tensors: Tensor) -> Tensor:
    return expand_contract(depthwise_conv_transpose(*tensors[:3]), TailWeights(*tensors[3:]))


def run_checkpointed(*tensors: Tensor) -> Tensor:
    y: Tensor = checkpoint(run_block, *tensors, use_reentrant=False, preserve_rng_state=False)
    return y


def step(run: Run, tensors: list[Tensor]) -> list[Tensor]:
    y = run(*tensors)
    return [y, *torch.autograd.grad(y.square().sum(), tensors)]


@compiled
@pytest.mark.parametrize("run", [run_block, run_down, run_up, run_checkpointed])
@pytest.mark.parametrize("size", [(5, 6, 7), (9, 10)])
def test_a_compiled_step_gives_the_same_bits(run: Run, size: tuple[int, ...]) -> None:
    tensors = whole_block(*size)
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, eager = step(graph, tensors), step(run, tensors)
    assert ours[0].stride() == eager[0].stride()
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)


@compiled
@pytest.mark.parametrize("run", [run_block, run_up])
def test_a_compiled_step_under_autocast_gives_the_same_bits(run: Run) -> None:
    tensors = whole_block(5, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = step(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors)
        eager = step(run, tensors)
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)


@compiled
def test_the_graph_calls_the_kernels() -> None:
    backend = Backend()
    torch.compile(run_block, fullgraph=True, backend=backend)(*whole_block(5, 6, 7))
    assert {"sagittal.depthwise.default", "sagittal.expand_contract.default"} <= backend.operators


@pytest.mark.parametrize("why", ["double", "width", "vmap", "no library"])
def test_the_twin_is_compiled_where_the_kernels_cannot_run(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [tensor.detach() for tensor in convolution(5, 6, 7)]
    run: Run = depthwise_conv
    if why == "double":
        tensors = [tensor.double() for tensor in tensors]
    elif why == "width":
        tensors = [tensors[0][:, :8], tensors[1][:8], tensors[2][:8]]
    elif why == "vmap":
        tensors[0] = tensors[0][None]
        run = torch.func.vmap(depthwise_conv, in_dims=(0, None, None))
    elif why == "no library":
        monkeypatch.setattr(native, "_library", None)
    backend = Backend()
    y = torch.compile(run, fullgraph=True, backend=backend)(*tensors)
    torch.testing.assert_close(y, run(*tensors))
    assert backend.operators
    assert not any("sagittal" in name for name in backend.operators)


@compiled
def test_other_sizes_run_through_one_graph() -> None:
    graph = torch.compile(run_block, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 6, 7), (9, 8, 13)):
        tensors = whole_block(*size)
        assert all(torch.equal(a, b) for a, b in zip(step(graph, tensors), step(run_block, tensors), strict=True))


@compiled
def test_operators_keep_the_rules_of_the_framework() -> None:
    x, weight, bias, *rest = whole_block(3, 4, 5)
    torch.library.opcheck(depthwise._depthwise, (x, weight, bias, 1))
    torch.library.opcheck(depthwise._depthwise, (x, weight, None, native.TRANSPOSED))
    torch.library.opcheck(block._tail, (x, x, 1e-5, False, rest))
    torch.library.opcheck(block._tail, (x, None, 1e-5, False, rest))
    grad = torch.randn(2, 16, 2, 2, 3)
    torch.library.opcheck(depthwise._depthwise_data_grad, (grad, weight.detach(), 2, [3, 4, 5]))
    torch.library.opcheck(depthwise._depthwise_weight_grad, (x.detach(), grad, weight.detach(), 2))
    moments = torch.randn(2, 16), torch.rand(2, 16)
    torch.library.opcheck(
        block._tail_grad, (x.detach(), torch.randn(x.shape), *moments, False, [tensor.detach() for tensor in rest])
    )
