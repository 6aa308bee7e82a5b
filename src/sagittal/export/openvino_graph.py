"""A network as an OpenVINO graph: built from plan and weights where there is a builder, else converted from PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import openvino
from torch.export import ExportedProgram

from sagittal.bundle import Bundle
from sagittal.errors import PlanError
from sagittal.export.description import INPUT, OUTPUT
from sagittal.export.torch_graph import Run
from sagittal.inference.engines.openvino_core import core
from sagittal.inference.engines.openvino_engine import BUILDERS


def built(bundle: Bundle, name: str) -> openvino.Model | None:
    """Return the graph of the weights called `name` with open sizes, None where no builder knows the network.

    Raises:
        BundleError: the weights do not fit the plan.
    """
    builder = BUILDERS.get(bundle.plan.network.kind)
    if builder is None:
        return None
    spec = bundle.plan.dataset
    weights = bundle.weights(name)
    return builder(bundle.plan.network, weights, len(spec.channel_names), spec.num_outputs, with_head=True)


def converted(program: ExportedProgram) -> openvino.Model:
    """Return the graph of a torch.export program.

    Raises:
        PlanError: an operator has no OpenVINO form.
    """
    try:
        with warnings.catch_warnings():
            # The converter calls parts of PyTorch that are on their way out.
            warnings.simplefilter("ignore")
            return openvino.convert_model(program)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise PlanError(
            f"the network has no OpenVINO form: {lines[0][:300]}. Export it with --format onnx.", code="not_exportable"
        ) from None


def write_openvino(model: openvino.Model, path: Path) -> None:
    """Write the graph to `path` (.xml) and its weights, float32, to the .bin file beside it."""
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    facts = model.get_rt_info()
    if "conversion_parameters" in facts:
        del facts["conversion_parameters"]
    openvino.save_model(model, path, compress_to_fp16=False)


def openvino_runner(path: Path) -> Run:
    """Return a function that runs the file on the CPU in float32."""
    # Where the processor has bfloat16, OpenVINO would take it by itself.
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Any) -> Any:
        return compiled(images)[0]

    return run
