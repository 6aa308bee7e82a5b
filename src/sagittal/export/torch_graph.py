"""A network as a torch.export program: plain ATen operators, open sizes where the network allows them, and nothing of
the machine that made it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sagittal.bundle import Bundle
from sagittal.errors import PlanError
from sagittal.inference.engines import torch_engine
from sagittal.plan.base import Triple

Run = Callable[[Float32[np.ndarray, "N C D H W"]], Float32[np.ndarray, "N K D H W"]]
"""From images to logits."""

_EXAMPLE = (34, 69, 50)
"""Sizes to trace open axes with: all different, none a multiple of 16, the coarsest grid longer than one voxel."""
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")


def network_of(bundle: Bundle, name: str) -> nn.Module:
    """Return the network of the weights called `name`, in eval mode on the CPU, without deep supervision's outputs.

    Raises:
        BundleError: the weights do not fit the plan.
        ResourceError: the network comes from a library that is not installed.
    """
    return torch_engine.network_of(bundle, name, torch.device("cpu"))


def export_program(network: nn.Module, in_channels: int, window: Triple, *, open_sizes: bool) -> ExportedProgram:
    """Return the program of a network in eval mode, input `image` (N, C, D, H, W).

    Args:
        network: on the CPU.
        in_channels: C.
        window: D, H, W of a program whose sizes are fixed, with N = 1.
        open_sizes: leave N, D, H and W open.

    Raises:
        PlanError: the network can't be exported in this form.
    """
    shape = (2, in_channels, *_EXAMPLE) if open_sizes else (1, in_channels, *window)
    sizes = dict.fromkeys((0, 2, 3, 4), Dim.DYNAMIC) if open_sizes else None
    image = torch.zeros(shape)
    try:
        with torch.no_grad():
            program = torch.export.export(_Named(network), (image,), dynamic_shapes=(sizes,))
    # torch.export raises whatever its tracer or its solver of sizes meets.
    except Exception as error:
        raise _refused(error) from None
    foreign = sorted(_namespaces(program) - {"aten", "python"})
    if foreign:
        raise PlanError(
            f"the network uses operators of {', '.join(foreign)}, which only this machine's libraries have. Expected "
            "PyTorch's own. Predict with 'sagittal predict'.",
            code="not_exportable",
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                # They tell files and folders of the machine that exported, and PyTorch does without them.
                for trace in _TRACES:
                    node.meta.pop(trace, None)
    return program


def runner(module: nn.Module) -> Run:
    """Return a function on numpy's arrays."""

    def run(images: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K D H W"]:
        with torch.inference_mode():
            logits: Tensor = module(torch.from_numpy(images))
        return np.asarray(logits.numpy())

    return run


class _Named(nn.Module):
    """Gives the input its name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


def _namespaces(program: ExportedProgram) -> set[str]:
    targets: list[Any] = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {getattr(target, "namespace", "python") for target in targets if target is not operator.getitem}


def _refused(error: Exception) -> PlanError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return PlanError(
        f"the network can't be exported: {lines[0][:300]}. Expected one whose graph does not depend on its data. "
        "Predict with 'sagittal predict'.",
        code="not_exportable",
    )
