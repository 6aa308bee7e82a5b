"""A program as an ONNX file, and the file run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch.export import ExportedProgram

from sagittal.errors import PlanError
from sagittal.export.description import INPUT, OUTPUT
from sagittal.export.torch_graph import Run

_AXES = ("N", None, "D", "H", "W")
_ONLY_ERRORS, _NOTHING = 3, 4


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write a program to one ONNX file, weights included, input and output and their open axes named.

    Raises:
        PlanError: an operator has no ONNX form, or the file would exceed the 2 GB that ONNX allows.
    """
    try:
        with _quiet():
            made = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], external_data=False
            )
        assert made is not None
        model: Any = made.model_proto
    except (torch.onnx.OnnxExporterError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise PlanError(
            f"the network has no ONNX form: {lines[0][:300]}. Export it with --format torch.", code="not_exportable"
        ) from None
    _forget_origin(model)
    for value, channels in ((model.graph.input[0], "C"), (model.graph.output[0], "K")):
        for size, name in zip(value.type.tensor_type.shape.dim, _AXES, strict=True):
            if size.dim_param:
                size.dim_param = name or channels
    onnx.save_model(model, path)


def onnx_runner(path: Path) -> Run:
    """Return a function that runs the file on the CPU.

    It raises PlanError for a size that the graph does not take.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = _NOTHING

    def run(images: Any) -> Any:
        try:
            return session.run([OUTPUT], {INPUT: images}, quiet)[0]
        except onnxruntime.capi.onnxruntime_pybind11_state.OnnxRuntimeException as error:
            raise PlanError(f"ONNX Runtime can't run the graph: {str(error)[:300]}.", code="not_exportable") from None

    return run


def _forget_origin(model: Any) -> None:
    """Delete what names files and folders of the machine that exported, and shapes under PyTorch's own names."""
    for part in (model.graph, *model.functions):
        del part.metadata_props[:]
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Any:
    # The exporter prints its steps and warns of its own internals.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
