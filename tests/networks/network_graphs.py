"""What every network promises to those who take its graph: torch.compile, torch.export, ONNX.

A part of `NetworkContract`, apart from it because these tests take seconds where the others take a tenth.
"""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

IN_CHANNELS = 2
NUM_CLASSES = 3


def graph_namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Return the libraries whose operators a program calls; "python" where it computes a size that was left open."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", "python") for target in targets if target is not operator.getitem}


def train_once(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the logits, gradients and buffers of a training step."""
    scales = network(image)
    scales = scales if isinstance(scales, list) else [scales]
    sum(logits.square().mean() for logits in scales).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    return [*(logits.detach() for logits in scales), gradients, *network.buffers()]


def assert_near(ours: list[Tensor], exact: list[Tensor]) -> None:
    """Check tensors of two training steps, each by its norm: a single gradient may be noise around zero."""
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b).norm() <= 1e-4 * b.double().norm()


class GraphContract(ABC):
    """Tests of a network's graph; `NetworkContract` says how to build the network."""

    spatial_dims: ClassVar[int] = 3

    @abstractmethod
    def image(self, *sizes: int, batch: int = 1) -> Tensor:
        """Return a reproducible image of these sizes, without the first in 2D."""

    @pytest.fixture
    def compiler(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.usefixtures("compiler")
    def test_compiles_whole_and_trains_the_same(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33, batch=2)
        network.train()
        expected = train_once(copy.deepcopy(network), image)
        assert_near(train_once(torch.compile(network, fullgraph=True, backend="aot_eager"), image), expected)

    @pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
    @pytest.mark.usefixtures("compiler")
    def test_exports_to_plain_operators_that_run_as_onnx(self, network: nn.Module, tmp_path: Path) -> None:
        image, path = self.image(16, 20, 33, batch=2), tmp_path / "network.onnx"
        program = torch.export.export(network, (image,))
        assert graph_namespaces(program) == {"aten"}
        with torch.no_grad():
            logits, expected = program.module()(image), network(image)
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (feed,) = session.get_inputs()
        onnx = torch.from_numpy(session.run(None, {feed.name: image.numpy()})[0])
        for ours, tolerance in ((logits, 1e-5), (onnx, 1e-4)):
            assert ours.shape == expected.shape
            assert (ours - expected).abs().max() < tolerance * expected.abs().max()
