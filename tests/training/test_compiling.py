"""Compiling: the same results, the same names, and a step that is not lost when it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import TrainingError
from sagittal.training import compiling
from sagittal.training.compiling import CompiledNetwork, compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Dropout(0.5))


def _compile_to(monkeypatch: pytest.MonkeyPatch, forward: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: forward(network))


def test_auto_compiles_on_cuda_alone_and_off_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _compile_to(monkeypatch, lambda network: network)
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    said: list[str] = []
    network = _network()
    assert compiled(network, "auto", CPU, said.append) is None
    assert compiled(network, "off", CUDA, said.append) is None
    assert isinstance(compiled(network, "auto", CUDA, said.append), CompiledNetwork)
    assert isinstance(compiled(network, "on", CPU, said.append), CompiledNetwork)
    assert said == []


@pytest.mark.parametrize(("device", "missing"), [(CPU, "compiler"), (CUDA, "compiler"), (CUDA, "Triton")])
def test_what_is_missing_is_told(device: torch.device, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/bin/cc" if missing == "Triton" else None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    assert compiled(_network(), "on", device, said.append) is None
    assert len(said) == 1
    assert said[0].startswith("compile: off")
    assert missing in said[0]


def _work(network: nn.Module, forward: Callable[[Tensor], Any]) -> Callable[[], float]:
    def work() -> float:
        network.zero_grad()
        loss = forward(torch.ones(2, 1, 4, 5, 6)).square().mean()
        loss.backward()
        return float(loss.detach())

    return work


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_is_told_once_and_the_step_is_done_without(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise RuntimeError("no such kernel\nand a long trace")

    def broken(network: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = network(x)
            if where == "forward":
                raise RuntimeError("no such kernel\nand a long trace")
            return Fails.apply(y)

        return forward

    plain = _network()
    expected = [_work(plain, plain)() for _ in range(2)]

    _compile_to(monkeypatch, broken)
    network, said = _network(), []
    fallen = CompiledNetwork(network, said.append)
    made = [fallen.attempt(_work(network, fallen)) for _ in range(2)]
    assert made == expected, "dropout draws the same, and the batch is counted once"
    assert len(said) == 1
    assert "no such kernel" in said[0]
    assert not fallen.active
    for one, other in zip(network.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for mine, reference in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, reference.grad)


def test_an_error_for_the_user_is_no_failure_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    _compile_to(monkeypatch, lambda network: network)
    network = _network()
    forward = CompiledNetwork(network, lambda line: pytest.fail(line))

    def work() -> None:
        raise TrainingError("another process ended")

    with pytest.raises(TrainingError, match="another process"):
        forward.attempt(work)
    assert forward.active


def test_a_compiler_that_fails_leaves_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("this backend can do nothing")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend=refuse, **options))
    network = nn.Sequential(nn.Conv3d(1, 2, 3))
    said: list[str] = []
    forward = CompiledNetwork(network, said.append)
    forward.attempt(_work(network, forward))
    assert "this backend can do nothing" in said[0]
    assert set(network.state_dict()) == {"0.weight", "0.bias"}
    assert network[0].weight.grad is not None


class _WithoutLength(nn.Module):
    """As all networks are, unlike nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _network()[:2]

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.inner(images)
        return result


def test_a_network_without_a_length_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend="eager", **options))
    network = _WithoutLength()
    forward = CompiledNetwork(network, lambda line: pytest.fail(line))
    forward.attempt(_work(network, forward))
    assert forward.active


def test_what_is_compiled_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend="aot_eager", **options))
    plain, network = _network()[:2], _network()[:2]
    expected = _work(plain, plain)()
    forward = CompiledNetwork(network, lambda line: pytest.fail(line))
    assert forward.attempt(_work(network, forward)) == pytest.approx(expected, rel=1e-6)
    for mine, reference in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)
